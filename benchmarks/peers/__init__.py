"""Other implementations of a GPT to be compared with, each as fast as its users can make it.

A peer is a module with

    NAME                                          how tables call it
    why_not(device) -> str | None                 None = can run here; otherwise one sentence: rule, value, remedy
    fit(model) -> (GPTConfig, str)                the nearest model that it implements, and the name of that model's
                                                  parts; "" where it implements the model itself
    variants(device) -> list[Variant]             the settings worth trying, likeliest first; the fastest in tritium's
                                                  precision represents the peer (:func:`variants_in`)
    build(config, variant, device, optim) -> Training

Weights travel in one common naming, that of the published GPT-2 checkpoints (``wte.weight``,
``h.0.attn.c_attn.weight`` of shape (in, out), ...): :func:`initial_weights` makes them, and every peer's ``load``
takes them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import math
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tritium.engine.config import GPTConfig, OptimConfig
from tritium.engine.precision import bf16_gain_on_cpu

NAMES = ("textbook", "huggingface", "huggingface_eager", "huggingface_liger", "litgpt", "torchtitan")
REQUIRED = ("textbook", "huggingface", "litgpt")  # run on any device: a comparison without one of them is not whole
KEEPS_MEMORY = "freed memory kept"
AUTOTUNE = "max-autotune-no-cudagraphs"
INSTALL = "in the source tree: pip install -e '.[peers]'"  # tritium is in no package index


def peer(name: str) -> ModuleType:
    """The peer's module; KeyError for an unknown name."""
    if name not in NAMES:
        raise KeyError(name)
    return importlib.import_module(f"{__name__}.{name}")


def variants_in(name: str, device: str, precision: str) -> list[Variant]:
    """The peer's variants in ``precision``; where it has none, since that is slow here, its others put into it."""
    variants = peer(name).variants(device)
    found = [variant for variant in variants if variant.precision == precision]
    others = (dataclasses.replace(variant, precision=precision, matmul="highest") for variant in variants)
    return found or list(dict.fromkeys(others))


@dataclass(frozen=True)
class Variant:
    """One way to set a peer up.

    precision: "fp32", or "bf16" for autocast over fp32 weights. matmul: torch.set_float32_matmul_precision of the
    process; what is below "highest" lets products of fp32 be computed in less, so that fp32 would not be tritium's.
    padded: the token table has a multiple of 128 rows, and the loss leaves the surplus out. compile:
    "false", or a mode of torch.compile. extra: the peer's own option. keep_memory: on a CPU, the C library keeps freed
    memory in the process, as tritium has it (engine/allocator.py); a user of the peer would have to know to set it.
    """

    precision: str = "fp32"
    matmul: str = "highest"
    padded: bool = True
    compile: str = "default"
    extra: str = ""
    keep_memory: bool = False

    def __str__(self) -> str:
        vocabulary = "padded V" if self.padded else "exact V"
        compiled = {"false": "eager", "default": "compiled"}.get(self.compile, f"compiled {self.compile}")
        matmul = "" if self.matmul == "highest" else f"matmul {self.matmul}"
        memory = KEEPS_MEMORY if self.keep_memory else ""
        return ", ".join(filter(None, (self.precision, matmul, vocabulary, compiled, self.extra, memory)))


class Training:
    """A model in training: the step of a careful user, the same for every peer.

    loss(ids, targets): mean cross-entropy, both (B, T) int64 → () fp32. rename(weights): the common naming → the
    module's own.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
        variant: Variant,
        device: str,
        optim: OptimConfig,
        attention: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    ):
        torch.set_float32_matmul_precision(variant.matmul)
        self.module, self.device, self.optim, self.attention = module, device, optim, attention
        self.bf16 = variant.precision == "bf16"
        self.rename = rename
        self.uncompiled = self.forward = loss
        if variant.compile != "false":
            mode = None if variant.compile == "default" else variant.compile
            self.forward = torch.compile(loss, dynamic=False, fullgraph=True, mode=mode)
        self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.Optimizer:
        """AdamW over flat lists, one fused call per group; matrices decay, vectors do not."""
        parameters = list(self.module.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.optim.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        betas = (self.optim.beta1, self.optim.beta2)
        return torch.optim.AdamW(groups, lr=self.optim.lr, betas=betas, eps=self.optim.eps, fused=True)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take weights in the common naming and start the optimizer anew; every parameter must be given."""
        assign(dict(self.module.named_parameters()), self.rename(weights))
        self.optimizer = self._optimizer()

    def settings(self, ids: Tensor, targets: Tensor) -> dict[str, str]:
        """What was built, for comparison with other implementations: the precision as its products show it, and the
        optimizer's numbers."""
        seen = Products()
        with self._uncompiled(), torch.no_grad(), seen:
            self._mean_loss(ids, targets)
        groups = self.optimizer.param_groups
        return settings(
            precision=seen.dtypes, lr={g["lr"] for g in groups}, beta1={g["betas"][0] for g in groups},
            beta2={g["betas"][1] for g in groups}, eps={g["eps"] for g in groups}, grad_clip={self.optim.grad_clip},
            decay_of_matrices={g["weight_decay"] for g in groups for p in g["params"] if p.ndim >= 2},
            decay_of_vectors={g["weight_decay"] for g in groups for p in g["params"] if p.ndim < 2},
        )  # fmt: skip

    @contextlib.contextmanager
    def _uncompiled(self) -> Iterator[None]:
        saved = self.forward
        self.forward = self.uncompiled
        try:
            yield
        finally:
            self.forward = saved

    @contextlib.contextmanager
    def in_fp32(self) -> Iterator[None]:
        """For the duration: uncompiled, and fp32 throughout, whatever the variant."""
        bf16, matmul = self.bf16, torch.get_float32_matmul_precision()
        self.bf16 = False
        torch.set_float32_matmul_precision("highest")
        try:
            with self._uncompiled():
                yield
        finally:
            self.bf16 = bf16
            torch.set_float32_matmul_precision(matmul)

    def _mean_loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        with self.attention(), torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            return self.forward(ids, targets)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean loss without a gradient, () fp32."""
        with torch.no_grad():
            return self._mean_loss(ids, targets)

    def step(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Forward, backward, clip, AdamW, zero; returns the loss before the update, () fp32, unread by the host."""
        loss = self._mean_loss(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.optim.grad_clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class Products(TorchDispatchMode):
    """While it is active: the dtypes in which matrices are multiplied and attention is computed, as "fp32", "bf16"."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm") or "scaled_dot_product" in name:
            tensors = [a for a in args if isinstance(a, Tensor)]
            self.dtypes |= {{torch.float32: "fp32", torch.bfloat16: "bf16"}.get(t.dtype, str(t.dtype)) for t in tensors}
        return func(*args, **(kwargs or {}))


def settings(**found: Set[str | float]) -> dict[str, str]:
    """What has to be equal beside the losses: name → all values that it has in an implementation, in six digits."""
    return {
        name: " and ".join(sorted(value if isinstance(value, str) else f"{value:.6g}" for value in values))
        for name, values in found.items()
    }


def gpt2(model: GPTConfig) -> tuple[GPTConfig, str]:
    """What ``fit`` gives for a peer that implements GPT-2 alone: a GPT-2 of the model's size."""
    fitted = dataclasses.replace(
        plainly_trained(model), position="learned", norm="layer_norm", activation="gelu", n_kv_head=0, mlp_width=0,
        bias=True, qk_norm=False, tie_head=True,
    )  # fmt: skip
    same = (fitted.kv_heads, fitted.hidden_width) == (model.kv_heads, model.hidden_width) and all(
        getattr(fitted, field.name) == getattr(model, field.name)
        for field in dataclasses.fields(GPTConfig)
        if field.name not in ("n_kv_head", "mlp_width")
    )
    return (model, "") if same else (fitted, "GPT-2's parts")


def plainly_trained(model: GPTConfig) -> GPTConfig:
    """Without what no peer has: dropout, and terms of the loss beside the cross-entropy."""
    return dataclasses.replace(model, dropout=0.0, logit_softcap=0.0, z_loss=0.0, label_smoothing=0.0)


def changed(before: GPTConfig, after: GPTConfig) -> str:
    """The fields in which two models differ, as "position=rope, ..." with the values of the second."""
    names = [field.name for field in dataclasses.fields(GPTConfig)]
    return ", ".join(f"{n}={getattr(after, n)}" for n in names if getattr(before, n) != getattr(after, n))


def missing(package: str) -> str | None:
    """Why a peer cannot run when it needs ``package``, or None when that is installed."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"needs the package {package}, which is not installed; {INSTALL}"
    return None


def initial_weights(model: GPTConfig, seed: int = 0) -> dict[str, Tensor]:
    """Weights in the common naming, fp32 on the CPU; a function of its arguments alone.

    Beyond GPT-2's names: c_attn holds H query heads, then G key and G value heads; of a gated activation c_fc holds the
    gate before the value; lm_head.weight (V, C) is there when the head is not tied. Wider than GPT-2's initialisation
    (3 × its deviation, norms and biases drawn as well), so that an implementation that leaves a part out shows a
    different loss.
    """
    generator = torch.Generator().manual_seed(seed)
    C, std = model.n_embd, 3 * model.init_std
    D, H, G, F = model.head_width, model.n_head, model.kv_heads, model.hidden_width
    up = 2 * F if model.activation in ("swiglu", "geglu") else F

    def normal(*shape: int, std: float = std, mean: float = 0.0) -> Tensor:
        return torch.empty(shape).normal_(mean, std, generator=generator)

    weights: dict[str, Tensor] = {}

    def norm(name: str) -> None:
        weights[f"{name}.weight"] = normal(C, std=0.2, mean=1.0)
        if model.norm == "layer_norm" and model.bias:
            weights[f"{name}.bias"] = normal(C, std=0.2)

    weights["wte.weight"] = normal(model.vocab_size, C)
    if model.position == "learned":
        weights["wpe.weight"] = normal(model.block_size, C)
    shapes = {"attn.c_attn": (C, (H + 2 * G) * D), "attn.c_proj": (H * D, C), "mlp.c_fc": (C, up), "mlp.c_proj": (F, C)}
    for layer in range(model.n_layer):
        h = f"h.{layer}."
        norm(f"{h}ln_1")
        norm(f"{h}ln_2")
        for name, shape in shapes.items():
            narrow = std / math.sqrt(2 * model.n_layer) if name.endswith("c_proj") else std
            weights[f"{h}{name}.weight"] = normal(*shape, std=narrow)
            if model.bias:
                weights[f"{h}{name}.bias"] = normal(shape[1])
    norm("ln_f")
    if not model.tie_head:
        weights["lm_head.weight"] = normal(model.vocab_size, C)
    return weights


def rename(
    weights: Mapping[str, Tensor],
    parts: Mapping[str, str],
    *,
    blocks: str = "blocks",
    others: Mapping[str, str] = {"ln_f": "norm", "lm_head": "head"},
) -> dict[str, Tensor]:
    """The common naming → BLOCKS.LAYER.PART, matrices of blocks turned to (out, in).

    parts: the common name of a part → PART. others: the same outside the blocks; what it lacks keeps its name.
    """
    renamed = {}
    for name, value in weights.items():
        stem, _, kind = name.rpartition(".")
        if stem.startswith("h."):
            _, layer, part = stem.split(".", 2)
            stem = f"{blocks}.{layer}.{parts[part]}"
            value = value.t() if value.ndim == 2 else value
        renamed[f"{others.get(stem, stem)}.{kind}"] = value
    return renamed


@torch.no_grad()
def assign(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy every value into its parameter; surplus rows (the padding of a token table) become 0. ValueError on any
    mismatch.
    """
    if parameters.keys() != values.keys():
        raise ValueError(f"parameters and weights differ in {', '.join(sorted(parameters.keys() ^ values.keys()))}")
    for name, parameter in parameters.items():
        rows = values[name].shape[0]
        if parameter.shape[1:] != values[name].shape[1:] or rows > parameter.shape[0]:
            raise ValueError(f"{name} has the shape {tuple(parameter.shape)}, the weights {tuple(values[name].shape)}")
        parameter[:rows].copy_(values[name])
        parameter[rows:].zero_()


def batches(model: GPTConfig, B: int, T: int, count: int, device: str, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """``count`` pairs ids, targets (B, T) int64, contiguous, drawn from ``seed``; targets are ids shifted by one."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(model.vocab_size, (B, T + 1), generator=generator) for _ in range(count)]
    return [(r[:, :-1].contiguous().to(device), r[:, 1:].contiguous().to(device)) for r in rows]


def fast_bf16(device: str) -> bool:
    """Whether bf16 is worth a try: where matrices are multiplied in hardware, and on a CPU not clearly slower than in
    fp32 (measured)."""
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    return bf16_gain_on_cpu() > 1 / 1.4
