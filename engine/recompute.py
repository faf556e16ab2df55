"""Activation checkpointing: what a block computes again in backward instead of keeping (Chen et al., arXiv:1604.06174).

    none        keep everything
    full        keep each block's input, compute the rest again: about a third more FLOPs, least memory
    every       full for every K-th block, none for the others
    selective   keep each block's input and the results of the ops named in ``keep``, compute the cheap rest again
    budget      keep, within a number of bytes, those results that take longest to compute again for their size
    offload     compute nothing again: keep everything, in the host's memory (engine/offload.py)

Selective works on what runs below the call sites: the custom ops of our kernels, which carry their op's name, and the
aten ops that stand for an op in its reference. A reference that is several aten ops (attention, rms_norm, rope, …) and
shall be kept becomes one custom op: its result is kept and the inside computed again in its own backward, as our
kernels do.

Budget looks at one block on tensors without contents (all blocks are alike): which ops its backward computes again, how
many bytes each one's result has, and how long the op takes at least (kernels/peaks.py). It then keeps results, the
dearest for their size first, of as many blocks as the budget holds: the greedy answer to a knapsack of many small equal
pieces.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tritium.engine.config import ConfigError
from tritium.engine.model import GPT, Block, call
from tritium.kernels import op as binding
from tritium.kernels import ops, peaks
from tritium.kernels.autograd import NAMESPACE, register
from tritium.kernels.op import Op
from tritium.kernels.site import Machine

POLICIES = ("none", "full", "every", "selective", "budget", "offload")
Kept = frozenset[tuple[str, int]]  # (op, its number in the block): results that a block keeps
KEEPABLE = (
    "attention", "linear", "layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "rope", "gelu", "swiglu",
    "geglu", "relu2",
)  # fmt: skip

# what torch's own kernels are called below the call site
_TORCH = {
    "mm": "linear",
    "addmm": "linear",
    "_scaled_mm": "linear",  # in fp8
    "native_layer_norm": "layer_norm",
    "gelu": "gelu",
    "flex_attention": "attention",
    "_scaled_dot_product_flash_attention": "attention",
    "_scaled_dot_product_flash_attention_for_cpu": "attention",
    "_scaled_dot_product_efficient_attention": "attention",
    "_scaled_dot_product_cudnn_attention": "attention",
    "_scaled_dot_product_fused_attention_overrideable": "attention",
    "_flash_attn_forward": "attention",  # of the package flash-attn
    "_flash_attn_varlen_forward": "attention",
}
_ONE_ATEN_OP = ("linear", "layer_norm", "gelu")  # the references that have a name in _TORCH


def apply(
    model: GPT,
    policy: str,
    keep: Collection[str] = ("attention", "linear"),
    *,
    every: int = 2,
    budget: int = 0,
    rows: int = 1,
    machine: Machine | None = None,
) -> None:
    """Make ``model`` recompute by ``policy`` from now on, in training with gradients only. Raises ConfigError.

    Losses and gradients do not change, dropout included; with the reference of rms_norm, swiglu, geglu, relu2 or an
    add_* norm in ``keep``, up to the order in which the gradients of a tensor that it reads twice are added. A model
    that is to be bound must be bound before.

    keep: for "selective", ops whose results are kept. every: for "every", K. budget: for "budget", bytes that all
    blocks together may keep for the backward of one micro-batch of ``rows`` rows of block_size tokens; for "offload",
    bytes that the last blocks may keep on the device. machine: what the ops' times are judged for, the model's own by
    default.
    """
    if policy not in POLICIES:
        raise ConfigError(f"train.recompute must be one of {', '.join(POLICIES)}, not {policy!r}")
    unknown = [name for name in keep if name not in KEEPABLE]
    if policy == "selective" and unknown:
        raise ConfigError(
            f"train.recompute_keep names {', '.join(unknown)}, which no block computes; "
            f"choose from {', '.join(KEEPABLE)}"
        )
    layers = len(model.blocks)
    options: dict[str, Any] = {"preserve_rng_state": model.config.dropout > 0.0}
    chosen: list[dict[str, Any] | None] = [options] * layers  # of each block; None: it recomputes nothing
    one_op = frozenset(keep) if policy == "selective" else frozenset()
    if policy == "selective":
        context = _context(_keeping, one_op)
        chosen = [{**options, "context_fn": context}] * layers
    elif policy == "every":
        chosen = [options if layer % every == every - 1 else None for layer in range(layers)]
    elif policy == "budget":
        found = look_at(model, rows, machine)
        kept = choose(found, layers, budget)
        one_op = frozenset(op for of_block in kept or () for op, _ in of_block)
        if kept is None:
            policy = "none"
        else:
            kinds = {k: {**options, "context_fn": _context(_counting, k)} for k in kept}
            chosen = [kinds[k] for k in kept]
    _keepable(model, one_op)
    if policy == "none":
        model.run_block = call
        return
    if policy == "offload":
        _offload(model, budget, rows, machine)
        return

    ways = {id(own): _way(model, own) for own in chosen}
    by_layer = [ways[id(own)] for own in chosen]
    model.run_block = by_layer[0] if len(ways) == 1 else ByLayer(by_layer)


def _offload(model: GPT, budget: int, rows: int, machine: Machine | None) -> None:
    from tritium.engine import offload

    device = model.blocks[0].mlp.down.weight.device
    if (machine or Machine.here(device)).device != "cuda":
        raise ConfigError(
            f"train.recompute=offload moves to the host what lies on a GPU, and this run is on {device.type}, whose "
            "memory is the host's: nothing would be gained. Use --train.recompute full, or budget"
        )
    stay = max(offload.STAY, budget // look_at(model, rows, machine).most if budget else 0)
    if stay >= len(model.blocks):
        raise ConfigError(
            f"train.recompute=offload leaves the last {stay} blocks on the device and this model has "
            f"{len(model.blocks)}: nothing would go to the host. Use --train.recompute none, or a smaller "
            "--train.recompute_budget_gb"
        )
    streams = torch.cuda if device.type == "cuda" else None
    model.run_block = offload.Offloaded(model, [call] * len(model.blocks), stay, streams)


def _way(model: GPT, own: dict[str, Any] | None) -> Callable[..., Tensor]:
    """How to run a block with these options of ``checkpoint``; None: without recomputing."""
    if own is None:
        return call

    def run_block(block: Block, *args: Any) -> Tensor:
        if not model.training:
            return block(*args)
        return checkpoint(block, *args, use_reentrant=False, **own)

    return run_block


def _context(contexts: Callable[[tuple[Any, ...]], Any], kept: Collection[Any]) -> Any:
    """``checkpoint``'s context_fn: ``contexts`` of what is kept. A function with a name and constants, which torch's
    caches of compiled graphs can write down, and ``cache_hash``, by which they know it, or they are passed by. (That
    the sources of this file are the same, they know: ``compiling.sources``.)
    """
    context: Any = functools.partial(contexts, tuple(sorted(kept)))
    context.cache_hash = f"keeps {sorted(kept)}"
    return context


class ByLayer:
    """Runs each block in its layer's way; a compiler of single blocks compiles the ways, not the choice."""

    def __init__(self, ways: Sequence[Callable[..., Tensor]]):
        self.ways = list(ways)

    def with_ways(self, ways: Sequence[Callable[..., Tensor]]) -> ByLayer:
        """The same with other ways."""
        return ByLayer(ways)

    def __call__(self, block: Block, *args: Any) -> Tensor:
        return self.ways[block.attention.layer](block, *args)


def keeping(keep: frozenset[str]) -> Callable[..., CheckpointPolicy]:
    """The selective policy that keeps the results of the ops in ``keep``."""

    def policy(context: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op_of(function) in keep else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def counting(kept: Kept) -> Callable[..., CheckpointPolicy]:
    """The selective policy, for one run of a block, that keeps the n-th result of an op for (op, n) in ``kept``:
    forward and recomputation, which run the same ops in the same order, each count for themselves."""
    seen: dict[tuple[bool, str], int] = collections.defaultdict(int)

    def policy(context: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        op = op_of(function)
        if op is None:
            return CheckpointPolicy.PREFER_RECOMPUTE
        number = seen[context.is_recompute, op]
        seen[context.is_recompute, op] = number + 1
        return CheckpointPolicy.MUST_SAVE if (op, number) in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def _keeping(keep: tuple[str, ...]) -> Any:
    return create_selective_checkpoint_contexts(keeping(frozenset(keep)))


def _counting(kept: tuple[tuple[str, int], ...]) -> Any:
    return create_selective_checkpoint_contexts(counting(frozenset(kept)))


# --------------------------------------------------------------------------------------------------------------- budget


@dataclasses.dataclass(frozen=True)
class Item:
    """A result that a block may keep. bytes: of everything that its op returns. seconds: that the op takes at least; 0
    where the block's backward does not need the result."""

    op: str
    number: int  # of the op in the block
    place: str  # path in the block of the module that calls it
    bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Looked:
    """One block: its items; bytes that it keeps with every op's result computed again, and with none."""

    items: tuple[Item, ...]
    least: int
    most: int


# FLOP/s and bytes/s of a CPU with bf16 GEMMs. Only their ratio matters, and only to order what is kept: the order must
# not depend on a measurement, or a run that goes on from a checkpoint would keep, and compile, something else
_CPU = peaks.Peak("CPU", "", 4e11, 4e11, 2e10, 1, 1e12, "of two cores: docs/log.md, 2026-11-24")


def peak_of(machine: Machine) -> peaks.Peak:
    """The board's of kernels/peaks.py, or of the same or the nearest older architecture; a CPU's is a nominal one."""
    if machine.device == "cpu":
        return _CPU
    named = [peak for peak in peaks.PEAKS if peak.name.split()[0] in machine.name.split()]
    same = [peak for peak in peaks.PEAKS if int(peak.arch.removeprefix("sm_")) <= machine.capability]
    return (named or same[-1:] or [peaks.A100])[0]


def look_at(model: GPT, rows: int, machine: Machine | None = None) -> Looked:
    """The first block on ``rows`` rows of block_size tokens, forward and backward without contents; the model is left
    as it was."""
    block, device = model.blocks[0], model.blocks[0].mlp.down.weight.device
    peak = peak_of(machine or Machine.here(device))
    weight = block.mlp.down.weight
    fake = weight.fake_mode if isinstance(weight, FakeTensor) else FakeTensorMode(allow_non_fake_inputs=True)
    sites = [(site, site.function, dict(site.bound)) for _, site in binding.call_sites(model.blocks)]
    try:
        _keepable(model, frozenset(KEEPABLE))
        with fake, torch.random.fork_rng(devices=[]), _Seen(peak) as seen, seen.placed(block):
            x, rest = _inputs(model, rows, device)
            weights = [p for p in block.parameters() if p.requires_grad]
            y = seen.run(block, x, *rest)
            results, most = seen.results, seen.alive
            del y
            y = checkpoint(seen.run, block, x, *rest, use_reentrant=False, preserve_rng_state=False)
            torch.autograd.grad(y, [x, *weights], torch.empty_like(y), allow_unused=True)
            again = {(item.op, item.number) for item in seen.results}
    finally:
        for site, function, bound in sites:
            site.function, site.bound = function, bound
    items = [
        item if (item.op, item.number) in again else dataclasses.replace(item, seconds=0.0)
        for item in results
        if item.op in KEEPABLE
    ]
    return Looked(tuple(items), x.nbytes, x.nbytes + most)


def choose(looked: Looked, layers: int, budget: int) -> list[Kept] | None:
    """What each block keeps so that all keep at most ``budget`` bytes; None: everything, which fits. ConfigError where
    the blocks' inputs alone are more."""
    if budget < layers * looked.least:
        raise ConfigError(
            f"train.recompute_budget_gb={budget / 1e9:g} is less than the blocks' inputs, which are kept in any case: "
            f"{layers} × {looked.least / 1e9:.3g} GB; use --train.recompute_budget_gb "
            f"{layers * looked.least / 1e9 + 5e-4:.3f} or more, or fewer rows at a time (train.micro_rows)"
        )
    if budget >= layers * looked.most:
        return None
    left = budget - layers * looked.least
    kept: list[set[tuple[str, int]]] = [set() for _ in range(layers)]
    for item in sorted((i for i in looked.items if i.seconds > 0.0), key=lambda i: i.bytes / i.seconds):
        count = min(layers, left // item.bytes)
        for of_block in kept[layers - count :]:  # backward comes to the last blocks first, and frees what they keep
            of_block.add((item.op, item.number))
        left -= count * item.bytes
    return [frozenset(of_block) for of_block in kept]


def _inputs(model: GPT, rows: int, device: torch.device) -> tuple[Tensor, tuple[Any, ...]]:
    """What a block is called with, without contents."""
    c, T = model.config, model.config.block_size
    x = torch.empty(rows, T, c.n_embd, dtype=model.compute_dtype, device=device, requires_grad=True)
    rotation = (model.cos[:T], model.sin[:T]) if c.position == "rope" else None
    starts = None
    if model.blocks[0].attention.attention.options["documents"]:
        starts = torch.zeros(rows, T, dtype=torch.int32, device=device)
    seed = torch.zeros((), dtype=torch.int64, device=device) if c.dropout > 0.0 else None
    return x, (rotation, model._prepared(starts)[0], seed)


class _Seen(TorchDispatchMode):
    """The ops of the catalogue that the last ``run`` of a block executed, and the bytes alive of what any made."""

    def __init__(self, peak: peaks.Peak):
        super().__init__()
        self.peak, self.place = peak, ""
        self.results: list[Item] = []
        self.running = False
        self.alive = 0
        self.known: set[int] = set()

    def run(self, block: Block, *args: Any) -> Tensor:
        self.results, self.running = [], True
        try:
            return block(*args)
        finally:
            self.running = False

    @contextlib.contextmanager
    def placed(self, block: Block) -> Iterator[None]:
        """``place`` is the path of the call site that is running."""

        def marked(path: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.place = path
                return function(*args, **kwargs)

            return call

        sites = [(path, site, site.function) for path, site in binding.call_sites(block)]
        for path, site, function in sites:
            site.function = marked(path, function)
        try:
            yield
        finally:
            for _, site, function in sites:
                site.function = function

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        op = op_of(function)
        if self.running and op is not None:
            number = sum(item.op == op for item in self.results)
            size = sum(t.nbytes for t in made)
            self.results.append(
                Item(op, number, self.place, size, _seconds(function, args, kwargs or {}, made, self.peak))
            )
        return result

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def _seconds(function: Any, args: Any, kwargs: Any, made: Sequence[Tensor], peak: peaks.Peak) -> float:
    """What an op takes at least: its products of matrices, or what it reads and writes."""
    from torch.utils.flop_counter import flop_registry

    formula = flop_registry.get(getattr(function, "_overloadpacket", None))
    out = made[0] if len(made) == 1 else tuple(made)
    flops = 0 if formula is None else formula(*args, **kwargs, out_val=out)
    read = {id(t): t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    moved = sum(read.values()) + sum(t.nbytes for t in made)
    return max(flops / peak.reached_matrix, moved / peak.reached_copy)


def _keepable(model: GPT, keep: frozenset[str]) -> None:
    """Where a block trains with the reference of an op in ``keep``, give it as one op; elsewhere the reference."""
    for block in model.blocks:
        for _, site in binding.call_sites(block):
            function = named(site.op) if site.op.name in keep else site.op.reference
            backend = site.bound.get("train")
            if backend is not None and backend.name == "reference":
                site.bound["train"] = dataclasses.replace(backend, function=function)
                if model.training:
                    site.enter("train")
            elif not site.bound:
                site.function = function


@functools.cache
def named(op: Op) -> Callable[..., Any]:
    """The op's reference as something with a name that ``op_of`` knows: itself, or the custom op OP_reference."""
    if op.name in _ONE_ATEN_OP:
        return op.reference
    reference = op.reference
    whole = register(f"{op.name}_reference", reference)
    whole.register_fake(reference)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.constants = [None if isinstance(value, Tensor) else (value,) for value in inputs]

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        values = [next(saved).detach() if constant is None else constant[0] for constant in ctx.constants]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        with torch.enable_grad():
            for i in wanted:
                values[i].requires_grad_()
            results = reference(*values)
        results = results if isinstance(results, tuple) else (results,)
        found: list[Tensor | None] = [None] * len(values)
        for i, gradient in zip(wanted, torch.autograd.grad(results, [values[i] for i in wanted], grads), strict=True):
            found[i] = gradient
        return tuple(found)

    whole.register_autograd(backward, setup_context=setup)
    if op.name == "attention":
        from torch.utils.flop_counter import register_flop_formula

        register_flop_formula(getattr(torch.ops, NAMESPACE).attention_reference)(_attention_flops)
    return whole


def _attention_flops(q: torch.Size, k: torch.Size, *args: object, **kwargs: object) -> int:
    """Two GEMMs over all pairs, which is what the reference computes, causal or not."""
    B, Tq, H, D = q
    return 4 * B * H * Tq * k[1] * D


def op_of(function: Any) -> str | None:
    """The op of the catalogue that ``function`` (an OpOverload or higher-order op) computes, or None.

    ``tritium::layer_norm_triton`` and ``aten::native_layer_norm`` → "layer_norm".
    """
    namespace, _, name = function.name().rpartition("::")
    name = name.partition(".")[0]
    if namespace == NAMESPACE:
        # the longest match: linear_cross_entropy_triton is not linear
        return max((op for op in ops.OPS if name == op or name.startswith(op + "_")), key=len, default=None)
    return _TORCH.get(name)
