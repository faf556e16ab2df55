"""Config: everything that decides a run, as frozen dataclasses. ``config.problems()`` reports every mistake at once.

This file imports no torch, so that ``tritium --help`` is quick. A preset (``presets/NAME.py``) is a function that
returns a Config.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


class ConfigError(ValueError):
    """A configuration that cannot be run; the message lists every problem."""


@dataclass(frozen=True)
class GPTConfig:
    """The network. The defaults are GPT-2 124M."""

    vocab_size: int = 50257
    """Number of real token ids (V). `tritium train` sets it from the prepared data's tokenizer when left 0."""
    vocab_multiple: int = 128
    """The embedding table is padded up to a multiple of this, for the GEMM; padding never enters the loss."""
    block_size: int = 1024
    """Tokens in one row: the longest context (T)."""
    n_layer: int = 12
    """Number of blocks."""
    n_head: int = 12
    """Query heads (H)."""
    n_kv_head: int = 0
    """Key/value heads (G), a divisor of n_head; 0 means n_head (no grouping)."""
    n_embd: int = 768
    """Model width (C)."""
    mlp_width: int = 0
    """Hidden width of the MLP (F); 0 means 4·C, or 8/3·C rounded up to a multiple of 64 for swiglu."""
    position: Literal["learned", "rope"] = "learned"
    """How positions enter: a learned table (GPT-2) or rotary embedding."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_fraction: float = 1.0
    """Fraction of each head's channels that rotate."""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """Normalisation in front of attention, MLP and head."""
    norm_eps: float = 1e-5
    """Added to the variance."""
    activation: Literal["gelu", "swiglu", "geglu", "relu2"] = "gelu"
    """The MLP's activation (gelu is the tanh approximation, as GPT-2)."""
    bias: bool = True
    """Biases in linear layers and LayerNorm."""
    qk_norm: bool = False
    """RMSNorm of each query and key head, without weights."""
    tie_head: bool = True
    """Head and token embedding share one table."""
    dropout: float = 0.0
    """Dropout probability at GPT-2's places: embedding, attention weights, residual branches."""
    init_std: float = 0.02
    """Standard deviation of the normal initialisation; residual projections use init_std/√(2·n_layer)."""
    fused_loss: bool = True
    """Head and loss in one op (linear_cross_entropy); false keeps linear and cross_entropy apart, for ablations."""
    label_smoothing: float = 0.0
    """Label smoothing ε of the loss."""
    z_loss: float = 0.0
    """Weight of the squared log-normaliser added to the loss."""
    logit_softcap: float = 0.0
    """c > 0 replaces a logit z by c·tanh(z/c)."""

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        return self.n_embd // self.n_head

    @property
    def hidden_width(self) -> int:
        if self.mlp_width:
            return self.mlp_width
        return -(-(8 * self.n_embd // 3) // 64) * 64 if self.activation in ("swiglu", "geglu") else 4 * self.n_embd

    def problems(self) -> list[str]:
        found = []
        for name in ("block_size", "n_layer", "n_head", "n_embd", "vocab_multiple"):
            if getattr(self, name) < 1:
                found.append(f"model.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("vocab_size", "n_kv_head", "mlp_width", "z_loss", "logit_softcap"):
            if getattr(self, name) < 0:
                found.append(f"model.{name} must not be negative, it is {getattr(self, name)}")
        if found:
            return found
        if self.n_embd % self.n_head:
            found.append(
                f"model.n_embd={self.n_embd} must be a multiple of model.n_head={self.n_head}, "
                "or heads have no whole width"
            )
        if self.n_head % self.kv_heads:
            found.append(
                f"model.n_head={self.n_head} must be a multiple of model.n_kv_head={self.n_kv_head}, "
                "or heads cannot be grouped"
            )
        if self.position == "rope" and int(self.head_width * self.rope_fraction) % 2:
            found.append(
                f"rope turns pairs of channels: head width {self.head_width} × rope_fraction {self.rope_fraction} "
                "must be even"
            )
        if not 0.0 < self.rope_fraction <= 1.0:
            found.append(f"model.rope_fraction must be in (0, 1], not {self.rope_fraction}")
        for name in ("dropout", "label_smoothing"):
            if not 0.0 <= getattr(self, name) < 1.0:
                found.append(f"model.{name} is a probability in [0, 1), not {getattr(self, name)}")
        return found


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes rows."""

    sources: tuple[str, ...] = ("demo",)
    """Files, folders, globs (text, JSONL, .gz, .zst), or `demo` for the built-in corpus."""
    folder: str = ""
    """Folder of prepared shards; empty means data/NAME with NAME from sources and tokenizer."""
    tokenizer: str = "gpt2"
    """gpt2, bytes, bpe:SIZE (trained on the sources), or a path to a tokenizer.json."""
    field: str = "text"
    """Which JSONL field holds the text."""
    val_fraction: float = 0.02
    """Fraction of documents held out for validation."""
    documents: bool = False
    """Attention stays inside each document of a row (off: plain rows, as GPT-2 and nanoGPT)."""
    seed: int = 0
    """Seed of the split and of the sample order."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how much, how precise, how often."""

    steps: int = 1000
    """Optimizer steps in the whole run."""
    batch_rows: int = 480
    """Rows (sequences of block_size tokens) per optimizer step, over all processes."""
    micro_rows: int = 16
    """Rows per forward/backward on one process; batch_rows must be a multiple of micro_rows × processes. 0: the number
    that `tritium plan` finds fastest among those that fit into the memory that is free.
    """
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """bf16: compute weights in bf16 beside fp32 masters. fp8: as bf16, with the matrix products of fp8_layers in fp8
    (on a CPU: emulated, at no gain in speed). auto: bf16 where the device multiplies bf16 matrices faster than fp32
    ones (on a CPU: measured), else fp32.
    """
    fp8_recipe: Literal["tensorwise", "rowwise"] = "rowwise"
    """With precision=fp8: one scale a matrix (less work, coarser), or one a row and column."""
    fp8_layers: tuple[str, ...] = ("blocks.*",)
    """With precision=fp8: patterns of the layers whose products are in fp8, as in blocks.*.mlp.* and head."""
    compile: Literal["auto", "true", "false"] = "auto"
    """torch.compile of forward and backward as one graph. auto: if this machine can; true: or fail."""
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    """torch.compile's mode: max-autotune-no-cudagraphs times several ways to compute each GEMM and keeps the fastest,
    at minutes of compilation.
    """
    compile_scope: Literal["model", "block"] = "model"
    """What is compiled as one graph: the whole model, which runs fastest, or its blocks one by one, which all share one
    graph: the first step comes sooner, as the compiler sees one block instead of all.
    """
    compile_cache: bool = True
    """Keep what was compiled with the run (compile_cache.bin), so that a resumed one begins sooner, here or on another
    machine of the same kind.
    """
    cuda_graphs: Literal["auto", "true", "false"] = "auto"
    """Capture a step's work on the GPU once and replay it without the host. auto: not yet, until measured; true: or
    fail.
    """
    weight_layout: Literal["auto", "out_in", "in_out"] = "auto"
    """How the matrices of the blocks' GEMMs lie in memory: row by row as (out, in), or as (in, out). The mathematics
    and the checkpoints are the same, the GEMMs read and write their operands in another order. auto: as was measured on
    such a device, else (out, in).
    """
    flat: Literal["auto", "true", "false"] = "auto"
    """Parameters, their working copies, gradients and moments in one buffer each (for each kind of parameter), so that
    one long tensor is summed over processes, normed and updated; gradients are copied there. Either way continues the
    other's checkpoints, and to the bit, but for moments in bf16: an element's random rounding depends on its place in
    the buffer. auto: with several processes, but for moments in int8.
    """
    recompute: Literal["none", "full", "every", "selective", "budget", "offload"] = "none"
    """Activations recomputed in backward: none; every block (full); every recompute_every-th block; everything but the
    ops in recompute_keep (selective); or whatever exceeds recompute_budget_gb, the cheapest first (budget). offload:
    none, but all except the last blocks' lie in the host's pinned memory meanwhile (a GPU; eager, or compiled block by
    block).
    """
    recompute_every: int = 2
    """With recompute=every: K; each K-th block is recomputed."""
    recompute_keep: tuple[str, ...] = ("attention", "linear")
    """With recompute=selective: ops whose results are kept."""
    recompute_budget_gb: float = 0.0
    """With recompute=budget: GB (10⁹ bytes) that all blocks together keep for one micro-batch's backward. With offload:
    GB that the last blocks, at least two, may keep on the device.
    """
    loss_chunk: int = 0
    """Rows (tokens) whose logits exist at one time, for the backends of linear_cross_entropy that chunk (native,
    triton; with another one training warns that it changes nothing); 0: their own choice.
    """
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cpu, cuda, or auto: a GPU where there is one."""
    deterministic: Literal["auto", "true", "false"] = "auto"
    """Bitwise repeatable on the same machine and thread count. auto: on a CPU, where it costs next to nothing."""
    seed: int = 1337
    """Seed of initialisation and dropout."""
    eval_every: int = 250
    """Steps between validation losses; 0: only at the end."""
    eval_tokens: int = 262144
    """Validation tokens per evaluation; 0: all."""
    sample_every: int = 0
    """Steps between printed samples; 0: only at the end."""
    sample_tokens: int = 100
    """Tokens of a printed sample."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl and on the terminal."""
    rollback_after: int = 0
    """After this many bad steps in a row (skipped ones: not finite, or outliers) go back to the last good checkpoint
    and go on behind the rows read by then; 0: never. Looked at every log_every steps.
    """


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 6e-4
    """Peak learning rate."""
    min_lr_fraction: float = 0.1
    """Final learning rate as a fraction of the peak."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After warm-up: cosine to the end, or stable then linear decay (wsd), or constant."""
    decay_fraction: float = 0.2
    """wsd: fraction of the steps that decay, at the end."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices (vectors have none)."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    moments: Literal["fp32", "bf16", "int8"] = "fp32"
    """What AdamW's two moments are kept in: 8 bytes a parameter, 4 (bf16), or 2 (int8: codes and a scale for 256 of
    them; of matrices, the vectors' stay fp32). Computed in fp32 and rounded stochastically, repeatably.
    """
    skip_outliers: float = 0.0
    """Skip a step whose loss or gradient norm lies more than this many standard deviations above the mean of the last
    128 (6 is a good value); 0: only what is not finite is skipped.
    """


@dataclass(frozen=True)
class KernelsConfig:
    """Which backend computes each op: a backend's name, a module path of your own, or auto. `--kernels=NAME` sets
    default.
    """

    default: str = "auto"
    """For every op that has this backend; auto picks by measurement, the rest use auto."""
    linear: str = ""
    """Backend of linear; empty: default."""
    embedding: str = ""
    """Backend of embedding; empty: default."""
    attention: str = ""
    """Backend of attention; empty: default."""
    attention_lse: str = ""
    """Backend of attention_lse; empty: default."""
    layer_norm: str = ""
    """Backend of layer_norm; empty: default."""
    rms_norm: str = ""
    """Backend of rms_norm; empty: default."""
    add_layer_norm: str = ""
    """Backend of add_layer_norm; empty: default."""
    add_rms_norm: str = ""
    """Backend of add_rms_norm; empty: default."""
    rope: str = ""
    """Backend of rope; empty: default."""
    gelu: str = ""
    """Backend of gelu; empty: default."""
    swiglu: str = ""
    """Backend of swiglu; empty: default."""
    geglu: str = ""
    """Backend of geglu; empty: default."""
    relu2: str = ""
    """Backend of relu2; empty: default."""
    cross_entropy: str = ""
    """Backend of cross_entropy; empty: default."""
    linear_cross_entropy: str = ""
    """Backend of linear_cross_entropy; empty: default."""
    global_norm: str = ""
    """Backend of global_norm; empty: default."""
    adamw: str = ""
    """Backend of adamw; empty: default."""
    adamw_8bit: str = ""
    """Backend of adamw_8bit (optim.moments=int8); empty: default."""
    override: tuple[str, ...] = ()
    """Single places: [PATTERN:]OP[@PHASE]=BACKEND, e.g. blocks.0.*:attention=reference attention@decode=reference."""

    def choices(self) -> dict[str, str]:
        """The mapping that tritium.kernels.op.bind takes."""
        chosen = {"*": self.default}
        for f in dataclasses.fields(self):
            if f.name not in ("default", "override") and getattr(self, f.name):
                chosen[f.name] = getattr(self, f.name)
        for item in self.override:
            key, _, backend = item.partition("=")
            chosen[key] = backend
        return chosen

    def problems(self) -> list[str]:
        return [
            f"kernels.override entries read [PATTERN:]OP[@PHASE]=BACKEND, {item!r} does not"
            for item in self.override
            if not all(item.partition("="))
        ]


@dataclass(frozen=True)
class RunConfig:
    """Where results go and how they are kept."""

    out: str = ""
    """Folder of the run (checkpoints, metrics.jsonl, loss.png, samples); empty means runs/NAME."""
    save_every: int = 250
    """Steps between checkpoints; 0: only at the end and on Ctrl-C."""
    keep: int = 2
    """Checkpoints kept, the newest ones."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: continue from the newest good checkpoint in out; never: refuse when there is one; must: fail without
    one.
    """
    tensorboard: bool = True
    """Also write TensorBoard events into out."""
    bad_steps: int = 3
    """How many bad steps are kept in out/bad_steps for `tritium replay`, each with its batch and a state as large as a
    checkpoint: the first of a streak, and of streaks the first ones; 0: none.
    """
    profile: str = ""
    """Steps to profile, FIRST:LAST (or one): a Chrome trace and the memory over time go to out/profile."""
    require_bigram: bool = False
    """Exit with status 1 at the end unless validation bits/byte beats the corpus's bigram model."""


@dataclass(frozen=True)
class Config:
    """One run."""

    name: str = "custom"
    """Name of the preset or run."""
    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def batch_tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.train.batch_rows * self.model.block_size

    @property
    def profiled(self) -> tuple[int, int] | None:
        """run.profile as (first, last) step, None where it is empty or no such range."""
        first, colon, last = self.run.profile.partition(":")
        last = last if colon else first
        if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            return None
        return int(first), int(last)

    def problems(self, world_size: int = 1, device: str = "") -> list[str]:
        """Every reason why this cannot run, as sentences; empty when it can. device: "cpu" or "cuda", where it is known
        what train.device=auto comes to.
        """
        t, o, d = self.train, self.optim, self.data
        found = self.model.problems() + self.kernels.problems()
        for section, name, low in (
            (t, "steps", 0), (t, "batch_rows", 1), (t, "micro_rows", 0), (t, "eval_every", 0), (t, "eval_tokens", 0),
            (t, "sample_every", 0), (t, "sample_tokens", 0), (t, "log_every", 1), (o, "warmup_steps", 0),
            (t, "rollback_after", 0), (self.run, "save_every", 0), (self.run, "keep", 1), (self.run, "bad_steps", 0),
            (t, "recompute_every", 1), (t, "loss_chunk", 0),
            (o, "lr", 0), (o, "grad_clip", 0), (o, "skip_outliers", 0), (o, "eps", 0), (o, "weight_decay", 0),
        ):  # fmt: skip
            if getattr(section, name) < low:
                found.append(f"{_section(section)}.{name} must be at least {low}, not {getattr(section, name)}")
        for part, name in ((o, "beta1"), (o, "beta2"), (d, "val_fraction")):
            if not 0.0 <= getattr(part, name) < 1.0:
                found.append(f"{_section(part)}.{name} must be in [0, 1), not {getattr(part, name)}")
        for section, name in ((o, "min_lr_fraction"), (o, "decay_fraction")):
            if not 0.0 <= getattr(section, name) <= 1.0:
                found.append(f"{_section(section)}.{name} must be in [0, 1], not {getattr(section, name)}")
        if t.precision == "fp8" and not t.fp8_layers:
            found.append(
                "train.precision=fp8 and train.fp8_layers names no layer, so that all would be bf16; give patterns "
                "such as 'blocks.*', or use train.precision=bf16"
            )
        if o.moments == "int8" and t.weight_layout == "in_out":
            found.append(
                "optim.moments=int8 has a scale for 256 elements in the order of (out, in), and train.weight_layout="
                "in_out stores matrices in another; use --train.weight_layout out_in, or --optim.moments bf16"
            )
        if o.moments == "int8" and t.flat == "true":
            found.append(
                "optim.moments=int8 has a scale for 256 elements of one parameter, and train.flat=true puts all into "
                "one buffer; use --train.flat false, or --optim.moments bf16"
            )
        if t.recompute == "budget" and not t.recompute_budget_gb > 0.0:
            found.append(
                f"train.recompute=budget needs train.recompute_budget_gb above 0, it is {t.recompute_budget_gb:g}: "
                "without bytes to keep nothing can be chosen; give it, or use --train.recompute full"
            )
        if t.recompute == "offload" and t.compile != "false" and t.compile_scope == "model":
            found.append(
                "train.recompute=offload moves what blocks keep between them, which a model compiled as one graph has "
                "inside of it; use --train.compile_scope block, or --train.compile false"
            )
        if t.recompute == "offload" and t.cuda_graphs == "true":
            found.append(
                "train.recompute=offload with train.cuda_graphs=true: copies to the host inside of a captured step "
                "have never been tried; use --train.cuda_graphs false"
            )
        share = max(t.micro_rows, 1) * world_size
        if t.batch_rows >= 1 and t.micro_rows >= 0 and t.batch_rows % share:
            near = max(share, t.batch_rows // share * share)
            rows = f"train.micro_rows={t.micro_rows} × " if t.micro_rows else ""
            found.append(
                f"train.batch_rows={t.batch_rows} must be a multiple of {rows}{world_size} process(es) = {share}, "
                f"or the last micro-batch would be short; use e.g. --train.batch_rows {near}"
            )
        if t.cuda_graphs == "true" and (device or t.device) == "cpu":
            found.append(graphs_need_a_gpu("cpu"))
        if t.cuda_graphs == "true" and t.recompute != "none" and self.model.dropout > 0.0:
            found.append(
                f"train.cuda_graphs=true with train.recompute={t.recompute} and model.dropout={self.model.dropout}: a "
                "recomputed block must draw the same random numbers, which a captured graph cannot; use "
                "--train.cuda_graphs false, or --model.dropout 0"
            )
        if t.rollback_after and not self.run.save_every:
            found.append(
                f"train.rollback_after={t.rollback_after} goes back to a checkpoint, and with run.save_every=0 there "
                "is none before the end; use e.g. --run.save_every 250"
            )
        if self.run.profile and self.profiled is None:
            found.append(
                f"run.profile={self.run.profile!r} must be FIRST:LAST, steps counted from 1, FIRST at most LAST, or "
                "one step; e.g. --run.profile 10:13"
            )
        if not d.sources and not d.folder:
            found.append(
                "data.sources is empty and data.folder is not set: there is nothing to train on; give files, or demo"
            )
        return found

    def kernel_choices(self) -> dict[str, str]:
        """The mapping that tritium.kernels.op.bind takes: what precision=fp8 chooses, and ``kernels``, which overrides
        it by places."""
        chosen: dict[str, str] = {}
        if self.train.precision == "fp8":
            for pattern in self.train.fp8_layers:
                chosen[f"{pattern}:linear"] = f"fp8_{self.train.fp8_recipe}"
                if fnmatch.fnmatch("head", pattern) and self.model.fused_loss:
                    chosen[f"{pattern}:linear_cross_entropy"] = f"fp8_{self.train.fp8_recipe}"
        return chosen | self.kernels.choices()

    def check(self, world_size: int = 1, device: str = "") -> None:
        """Raise ConfigError with every problem; arguments as those of ``problems``."""
        found = self.problems(world_size, device)
        if found:
            raise ConfigError("this configuration cannot run:\n" + "\n".join(f"  - {p}" for p in found))

    def replace(self, **sections: Mapping[str, Any]) -> Config:
        """With other values in some sections: ``config.replace(train={"steps": 3}, kernels={"default": "native"})``."""
        changed = {name: dataclasses.replace(getattr(self, name), **values) for name, values in sections.items()}
        return dataclasses.replace(self, **changed)

    def to_json(self) -> str:
        """The resolved configuration; ``Config.from_json`` is its inverse."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @staticmethod
    def from_json(text: str) -> Config:
        return _build(Config, json.loads(text))


_SECTIONS = {
    "model": GPTConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "optim": OptimConfig,
    "kernels": KernelsConfig,
    "run": RunConfig,
}


def _section(value: object) -> str:
    return next(name for name, kind in _SECTIONS.items() if isinstance(value, kind))


def _build(kind: type, values: dict[str, Any]) -> Any:
    """A dataclass from JSON values; a field it does not know is an error, since it would silently mean nothing."""
    known = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(
            f"{kind.__name__} has no field {', '.join(unknown)}; this file was written by another version of tritium"
        )
    built = {
        name: _build(_SECTIONS[name], value)
        if kind is Config and name in _SECTIONS
        else tuple(value)
        if isinstance(value, list)
        else value
        for name, value in values.items()
    }
    return kind(**built)


def graphs_need_a_gpu(device: str) -> str:
    """What is wrong with train.cuda_graphs=true on any other device."""
    return (
        f"train.cuda_graphs=true captures the work of a GPU and this run is on {device}; use --train.cuda_graphs auto"
    )


def data_folder(config: Config) -> pathlib.Path:
    """Where the prepared shards of ``config`` are: data.folder, or a name made from sources and tokenizer."""
    if config.data.folder:
        return pathlib.Path(config.data.folder)
    parts = [*(pathlib.Path(s).stem for s in config.data.sources), pathlib.Path(config.data.tokenizer).stem]
    return pathlib.Path("data") / "-".join("".join(ch if ch.isalnum() else "_" for ch in part) for part in parts)


def differences(a: Config, b: Config) -> list[str]:
    """Fields in which two configurations differ, as "section.field: A → B"."""
    left, right = _flat(a), _flat(b)
    return [f"{key}: {left[key]!r} → {right[key]!r}" for key in left if left[key] != right[key]]


def _flat(config: Config) -> dict[str, Any]:
    flat: dict[str, Any] = {"name": config.name}
    for name in _SECTIONS:
        flat |= {
            f"{name}.{f.name}": getattr(getattr(config, name), f.name) for f in dataclasses.fields(_SECTIONS[name])
        }
    return flat
