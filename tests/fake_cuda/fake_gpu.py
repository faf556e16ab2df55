"""An H100 that is not there: engines on FakeTensor(device="cuda"), their graphs and their live bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._library.custom_ops import OPDEFS
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tritium.engine import presets, recompute, train
from tritium.engine.config import Config
from tritium.engine.parallel import World
from tritium.engine.step import MicroBatch, train_step
from tritium.kernels import aot, op, ops
from tritium.kernels.autograd import NAMESPACE
from tritium.kernels.site import Machine

B, T = 8, 1024
DEVICE = torch.device("cuda", 0)
H100 = Machine("cuda", "sm_90", "an H100 that is not there", packages={"triton": "3.9.0"})

GPT2 = presets.load("gpt2_124m").replace(
    model={"vocab_size": 50257}, train={"precision": "bf16", "batch_rows": B, "micro_rows": B}
)
LLAMA = GPT2.replace(
    model={
        "position": "rope", "norm": "rms_norm", "activation": "swiglu", "n_kv_head": 4, "qk_norm": True,
        "tie_head": False, "bias": False, "mlp_width": 2048,
    },
    data={"documents": True},
)  # fmt: skip
# the activations and the loss that neither has, and what else changes a site
OTHERS = {
    "geglu": LLAMA.replace(model={"activation": "geglu", "qk_norm": False}, data={"documents": False}),
    "relu2": GPT2.replace(model={"activation": "relu2", "fused_loss": False, "bias": False}),
}
MODELS = {"gpt2": GPT2, "llama": LLAMA, **OTHERS}


def layers(config: Config, count: int) -> Config:
    return config.replace(model={"n_layer": count})


def _generator_state(device: object = None) -> Tensor:
    return torch.empty(16, dtype=torch.uint8, device="cpu")


@contextlib.contextmanager
def present(compiler: Callable[..., object] | None = None) -> Iterator[None]:
    """The GPU is there: Machine.here() says so and new tensors are fake; compiler: torch.compile's backend."""
    patches = [
        mock.patch.object(Machine, "here", staticmethod(lambda device=None: H100)),
        # torch's flash attention counts as random: where it is computed again, a graph keeps the generator's state
        torch._functorch.config.patch(graphsafe_rng_functionalization=False),
        mock.patch.object(torch.cuda, "get_rng_state", _generator_state),
        mock.patch.object(torch.cuda, "set_rng_state"),
    ]
    if compiler is not None:
        patches.append(mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=compiler)))
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(FakeTensorMode())
        yield


def sdpa_of_a_gpu(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    """What torch's CUDA build makes of F.scaled_dot_product_attention where its fused kernels serve: the choice itself
    is made in C++ that the CPU build lacks. Of those enabled flash comes first, efficient where there is a mask.
    Grouped heads are repeated before.
    """
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    if torch.backends.cuda.flash_sdp_enabled() and attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    bias = None
    if attn_mask is not None:
        bias = torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(~attn_mask, -torch.inf)
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if torch.backends.cuda.mem_efficient_sdp_enabled():
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(q, k, v, bias, True, dropout_p, is_causal, scale=scale)[0]
    assert torch.backends.cuda.cudnn_sdp_enabled()
    kernel = torch.ops.aten._scaled_dot_product_cudnn_attention
    return kernel(q, k, v, bias, True, dropout_p, is_causal, False, scale=scale)[0]


_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl("scaled_dot_product_attention", sdpa_of_a_gpu, "AutogradCUDA")


def build(config: Config, choices: dict[str, str] | str = "triton", *, compile: bool = False) -> train.Engine:
    """An engine of ``config`` with these kernels; within ``present``."""
    named = {"*": choices} if isinstance(choices, str) else choices
    kernels = {("default" if key == "*" else key): value for key, value in named.items()}
    return train.build(config.replace(kernels=kernels), World(device=DEVICE), compile=compile)


def batch(config: Config, rows: int = B) -> MicroBatch:
    ids = torch.randint(0, config.model.vocab_size, (rows, T), device=DEVICE)
    starts = torch.zeros(rows, T, dtype=torch.int32, device=DEVICE) if config.data.documents else None
    return MicroBatch(ids, ids.clone(), starts)


def scalars() -> tuple[Tensor, Tensor]:
    """(lr, inverse_count) as the loop makes them."""
    return torch.zeros((), device=DEVICE), torch.full((), 1 / (B * T), device=DEVICE)


def step(engine: train.Engine) -> tuple[Tensor, Tensor]:
    return train_step(engine.loss, engine.optimizer, [batch(engine.config)], *scalars())


def serving(config: Config, compiled: bool) -> dict[str, dict[str, str | None]]:
    """Op → backend → None where it serves every call site of the model that the op has in training, or why not."""
    table: dict[str, dict[str, str | None]] = {}
    for path, call in op.call_sites(train.on_meta(layers(config, 1), torch.bfloat16)):
        site = call.site(H100, path, "train", torch.bfloat16, compiled=compiled)
        known = table.setdefault(call.op.name, {})
        for name, reason in call.op.why_not(site).items():
            known[name] = known.get(name) or reason
    return table


class Graphs:
    """A compiler for torch.compile that keeps the forward and backward graphs and runs them as they are."""

    def __init__(self, within: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext):
        self.graphs: list[torch.fx.GraphModule] = []
        self.within = within
        self.compiler = aot_autograd(
            fw_compiler=self._keep, bw_compiler=self._keep, partition_fn=min_cut_rematerialization_partition
        )

    def __call__(self, graph, inputs, **options):
        return self.compiler(graph, inputs, **options)

    def _keep(self, graph: torch.fx.GraphModule, inputs):
        self.graphs.append(graph)

        def run(*args):
            with self.within():
                return graph.forward(*args)

        return make_boxed_func(run)

    def targets(self, index: int | None = None) -> list[object]:
        """What the nodes of all graphs (or of one) call, subgraphs (flex's functions) included. Of an op that is called
        with a saved state of the generator: the op."""
        chosen = self.graphs if index is None else [self.graphs[index]]
        modules = [m for g in chosen for m in g.modules() if isinstance(m, torch.fx.GraphModule)]
        nodes = [n for m in modules for n in m.graph.nodes if n.op == "call_function"]
        return [next((a for a in n.args if isinstance(a, torch._ops.OpOverload)), n.target) for n in nodes]


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive, and their peak: of what was given to ``track`` and what ops made since.

    An op of a model runs what it would on a GPU, its launcher, so that its temporary tensors count; within
    ``launchers_run``. (The optimizer's ask for addresses, which fake tensors lack; theirs are small tables.)
    """

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def track(self, values: object) -> None:
        for tensor in tree_leaves(values):
            if not isinstance(tensor, Tensor) or tensor.device.type != "cuda":
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata)

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == NAMESPACE and ops.OPS[recompute.op_of(function)].has_gradient:
            with self:
                result = OPDEFS[function._name.partition(".")[0]]._init_fn(*args, **(kwargs or {}))
        else:
            result = function(*args, **(kwargs or {}))
        self.track(result)
        return result


@contextlib.contextmanager
def launchers_run() -> Iterator[list[aot.Launch]]:
    """Triton's launches are recorded and do nothing; launchers find the device that they ask for."""
    with aot.compiling_for("sm_90", compile=False) as launched, mock.patch.object(torch.cuda, "current_device", int):
        yield launched


class Executed(TorchDispatchMode):
    """The ops that ran, in order. (torch.compile compiles nothing under it.)"""

    def __init__(self):
        super().__init__()
        self.functions: list[torch._ops.OpOverload] = []

    def names(self) -> list[str]:
        return [function._opname for function in self.functions]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.functions.append(function)
        return function(*args, **(kwargs or {}))


KERNELS = {
    "triton": {"*": "triton", "linear": "reference"},  # the GEMMs are cuBLAS's
    "all_triton": {"*": "triton"},
    "reference": {"*": "reference"},
    "sdpa_flash": {"*": "triton", "linear": "reference", "attention": "sdpa_flash"},
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """One eager training step of one micro-batch.

    flops: of forward and of backward, as torch counts them. Bytes: state, of weights, masters, copies and moments;
    kept, by forward for backward; peak, at any moment of the step. executed: every op that ran.
    """

    flops: tuple[int, int]
    state: int
    kept: int
    peak: int
    executed: frozenset[torch._ops.OpOverload]


class Flops(FlopCounterMode):
    """torch's counter without its tracker of modules, whose hooks keep tensors alive that training would not."""

    class _Everywhere(contextlib.nullcontext):
        parents = frozenset({"Global"})

    def __init__(self):
        super().__init__(display=False)
        self.mod_tracker = self._Everywhere()


@functools.cache
def measure(model: str, kernels: str, policy: str, rows: int = B) -> Measured:
    """model: a key of MODELS; kernels: of KERNELS; policy: of recompute.POLICIES."""
    config = MODELS[model].replace(train={"recompute": policy})
    with present():
        engine = build(config, KERNELS[kernels])
        data, (lr, inverse_count) = batch(config, rows), scalars()
        with launchers_run(), Live() as live, Executed() as executed:
            optimizer = engine.optimizer
            for group in optimizer.groups:
                live.track([group.leaves, group.params, group.copies, group.exp_avgs, group.exp_avg_sqs])
            live.track([list(engine.model.buffers()), optimizer.state_dict()])
            state = live.now
            live.track([data.ids, data.targets, data.seq_start, lr, inverse_count])
            before = live.now
            with Flops() as forward:
                loss = engine.loss(data)
            kept = live.now - before
            with Flops() as backward:
                loss.backward()
            optimizer.step(lr, inverse_count)
            optimizer.zero_grad()
    flops = (forward.get_total_flops(), backward.get_total_flops())
    return Measured(flops, state, kept, live.peak, frozenset(executed.functions))
