"""cross_entropy in Triton: each row's loss in one pass over the logits, its gradient in a second, or both in one.

Mathematics, per row, over the V = vocab_size real columns (ε label_smoothing, ζ z_loss, t the target):
    z = logit, or c·tanh(logit/c) with softcap c        lse = log Σ_j exp z_j        p_j = exp(z_j - lse)
    loss = (1 - ε)(lse - z_t) + ε(lse - mean z) + ζ lse²
    dz_j = dloss · [p_j(1 + 2ζ lse) - (1 - ε)[j = t] - ε/V]        dlogit_j = dz_j (1 - (z_j/c)²)
A row whose target is ignore_index has loss 0 and gradient 0, and its logits are not read. A target outside [0, V) that
is not ignore_index reads nothing and makes the row's loss and gradient NaN: loud, and without the host synchronisation
that an error would take.

Shapes: N rows, V real columns, Vp ≥ V columns of the logits. The padding never enters; its gradient is zero.

One program per row walks it in tiles of BLOCK_V columns: the running maximum is a scalar, the running sum a vector that
is added up once at the end, so a tile costs one exp2 per element and one reduction. Full tiles carry no mask, which
keeps their loads wide. Saved: lse (N,) fp32, and the logits themselves.

A reduced loss ("sum", "mean") whose gradient is wanted has it in the forward launch already: the upstream gradient is
one number, in training usually a one. That launch writes losses and dlogits, for an upstream of one (of 1/count for the
mean, read on the device), into a buffer that is saved in the place of the logits; the second pass over a row finds it
(100 KB of GPT-2's vocabulary in bf16) in the cache. Backward multiplies the buffer in place by the upstream gradient,
by a kernel that returns at once where that is one, and hands it over: so a graph that is kept works once, and a second
backward is autograd's own error about a tensor changed in place. Under torch.compile backward is a plain product, for
the compiler to fuse. (fp16 takes two passes for the mean: 1/count would leave its range before a loss scale lifts it.)

Bytes, for elements of b bytes: forward N·V·b, backward N·(V + Vp)·b; in one pass N·(V + Vp)·b together. About 5 and 4
FLOPs a logit: the bound is memory bandwidth.

`losses_and_gradient_in_place` is for linear_cross_entropy: the gradient goes over the logits.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from tritium.kernels.autograd import bypass, differentiable
from tritium.kernels.cross_entropy.reference import check_options, check_reduction, counted_rows, reduce
from tritium.kernels.lib import triton_launch as launch
from tritium.kernels.lib.triton_math import LN2, LOG2E, tanh
from tritium.kernels.site import Site

DETERMINISTIC = True


@triton.jit
def _load(ROW, columns, mask, softcap, SOFTCAP: tl.constexpr, MASKED: tl.constexpr):
    """Softcapped logits in fp32; masked ones are -inf."""
    if MASKED:
        z = tl.load(ROW + columns, mask, other=0.0).to(tl.float32)
    else:
        z = tl.load(ROW + columns).to(tl.float32)
    if SOFTCAP:
        z = softcap * tanh(z / softcap)
    if MASKED:
        z = tl.where(mask, z, float("-inf"))
    return z


@triton.jit
def _accumulate(top, sums, total, z, mask, SMOOTH: tl.constexpr, MASKED: tl.constexpr):
    """One tile into the running maximum, the running Σ exp(z - top), and Σ z if SMOOTH. (z - top first: it is exact
    where it matters.)"""
    new_top = tl.maximum(top, tl.max(z, 0))
    sums = sums * tl.exp2((top - new_top) * LOG2E) + tl.exp2((z - new_top) * LOG2E)
    if SMOOTH:
        total += tl.where(mask, z, 0.0) if MASKED else z
    return new_top, sums, total


@triton.jit
def _row_loss(
    ROW, target, V, smoothing, z_loss, softcap,
    SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """(loss, lse) of one row whose target counts; NaN for a target out of range."""
    columns = tl.arange(0, BLOCK_V)
    full = V // BLOCK_V * BLOCK_V
    top = tl.full((), -3.4028234663852886e38, tl.float32)  # of fp32 nothing finite is lower
    sums = tl.zeros((BLOCK_V,), tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, full, BLOCK_V):
        z = _load(ROW + first, columns, None, softcap, SOFTCAP, MASKED=False)
        top, sums, total = _accumulate(top, sums, total, z, None, SMOOTH, MASKED=False)
    if full < V:
        mask = full + columns < V
        z = _load(ROW + full, columns, mask, softcap, SOFTCAP, MASKED=True)
        top, sums, total = _accumulate(top, sums, total, z, mask, SMOOTH, MASKED=True)
    lse = tl.where(top == float("inf"), top, top + tl.log2(tl.sum(sums, 0)) * LN2)  # ∞ - ∞ has made the sum NaN
    in_range = (target >= 0) & (target < V)
    true = tl.load(ROW + target, in_range, other=0.0).to(tl.float32)
    if SOFTCAP:
        true = softcap * tanh(true / softcap)
    loss = lse - true
    if SMOOTH:
        loss = (1 - smoothing) * loss + smoothing * (lse - tl.sum(total, 0) / V)
    loss += tl.where(z_loss > 0, z_loss * lse * lse, 0.0)
    return tl.where(in_range, loss, float("nan")), lse


@triton.jit
def _row_gradient(
    ROW, DROW, target, lse, dloss, V, Vp, smoothing, z_loss, softcap,
    SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write dlogits of one row whose target counts; DROW may be ROW. An option of 0 takes no part: times an infinite
    lse or dloss it would be NaN."""
    dloss = tl.where((target >= 0) & (target < V), dloss, float("nan"))
    scale = dloss * (1 + tl.where(z_loss > 0, 2 * z_loss * lse, 0.0))
    everywhere = tl.where(smoothing > 0, dloss * (smoothing / V), 0.0)
    at_target = dloss * (1 - smoothing + smoothing / V)  # one number to subtract: of one class all is to cancel
    columns = tl.arange(0, BLOCK_V)
    full = V // BLOCK_V * BLOCK_V
    for first in range(0, full, BLOCK_V):
        z = _load(ROW + first, columns, None, softcap, SOFTCAP, MASKED=False)
        dz = tl.exp2((z - lse) * LOG2E) * scale
        dz -= tl.where(first + columns == target, at_target, everywhere)
        if SOFTCAP:
            dz *= 1 - (z / softcap) * (z / softcap)
        tl.store(DROW + first + columns, dz.to(DROW.dtype.element_ty))
    for first in range(full, Vp, BLOCK_V):  # the last real columns and the padding
        real = first + columns < V
        z = _load(ROW + first, columns, real, softcap, SOFTCAP, MASKED=True)
        z = tl.where(real, z, 0.0)
        dz = tl.exp2((z - lse) * LOG2E) * scale
        dz -= tl.where(first + columns == target, at_target, everywhere)
        if SOFTCAP:
            dz *= 1 - (z / softcap) * (z / softcap)
        tl.store(DROW + first + columns, tl.where(real, dz, 0.0).to(DROW.dtype.element_ty), first + columns < Vp)


@triton.jit
def _row_zeros(DROW, Vp, BLOCK_V: tl.constexpr):
    columns = tl.arange(0, BLOCK_V)
    for first in range(0, Vp, BLOCK_V):
        tl.store(DROW + first + columns, tl.zeros((BLOCK_V,), DROW.dtype.element_ty), first + columns < Vp)


@triton.jit(do_not_specialize=["stride_target"])
def _forward(
    LOGITS, TARGETS, LOSSES, LSE, stride_logits, stride_target, V, ignore_index, smoothing, z_loss, softcap,
    SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(TARGETS + row * stride_target)
    if target == ignore_index:
        tl.store(LOSSES + row, 0.0)
        tl.store(LSE + row, 0.0)
    else:
        loss, lse = _row_loss(
            LOGITS + row * stride_logits, target, V, smoothing, z_loss, softcap, SMOOTH, SOFTCAP, BLOCK_V
        )
        tl.store(LOSSES + row, loss)
        tl.store(LSE + row, lse)


@triton.jit(do_not_specialize=["stride_target", "stride_dloss"])
def _backward(
    DLOSSES, LOGITS, TARGETS, LSE, DLOGITS, stride_dloss, stride_logits, stride_target, V, Vp, ignore_index,
    smoothing, z_loss, softcap, SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(TARGETS + row * stride_target)
    if target == ignore_index:
        _row_zeros(DLOGITS + row * Vp, Vp, BLOCK_V)
    else:
        _row_gradient(
            LOGITS + row * stride_logits, DLOGITS + row * Vp, target, tl.load(LSE + row),
            tl.load(DLOSSES + row * stride_dloss),
            V, Vp, smoothing, z_loss, softcap, SOFTCAP, BLOCK_V,
        )  # fmt: skip


@triton.jit(do_not_specialize=["stride_target"])
def _forward_backward(
    LOGITS, TARGETS, LOSSES, DLOGITS, UPSTREAM, stride_logits, stride_target, stride_dlogits, V, Vp, ignore_index,
    smoothing, z_loss, softcap, SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Losses, and dlogits for the same upstream gradient of every row, one without UPSTREAM. DLOGITS may be LOGITS."""
    row = tl.program_id(0).to(tl.int64)
    ROW, DROW = LOGITS + row * stride_logits, DLOGITS + row * stride_dlogits
    target = tl.load(TARGETS + row * stride_target)
    if target == ignore_index:
        tl.store(LOSSES + row, 0.0)
        _row_zeros(DROW, Vp, BLOCK_V)
    else:
        loss, lse = _row_loss(ROW, target, V, smoothing, z_loss, softcap, SMOOTH, SOFTCAP, BLOCK_V)
        tl.store(LOSSES + row, loss)
        upstream = tl.full((), 1.0, tl.float32)
        if UPSTREAM is not None:
            upstream = tl.load(UPSTREAM)
        tl.debug_barrier()  # the target's logit has been read by every thread before one of them writes over it
        _row_gradient(ROW, DROW, target, lse, upstream, V, Vp, smoothing, z_loss, softcap, SOFTCAP, BLOCK_V)


@triton.jit
def _scale(X, FACTOR, size, BLOCK: tl.constexpr):
    """X *= FACTOR in place; nothing is read where that is one. Zeros stay, padding's and ignored rows', though FACTOR
    be infinite."""
    factor = tl.load(FACTOR).to(tl.float32)
    if factor != 1:
        for block in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
            at = block * tl.full((), BLOCK, tl.int64) + tl.arange(0, BLOCK)
            x = tl.load(X + at, at < size, other=0.0).to(tl.float32)
            tl.store(X + at, tl.where(x == 0, x, x * factor).to(X.dtype.element_ty), at < size)


# ----------------------------------------------------------------------------------------------------------- launchers

_forward_kernel, _backward_kernel = launch.Kernel(_forward), launch.Kernel(_backward)
_forward_backward_kernel, _scale_kernel = launch.Kernel(_forward_backward), launch.Kernel(_scale)


class Config(NamedTuple):
    BLOCK_V: int
    num_warps: int


class ScaleConfig(NamedTuple):
    BLOCK: int
    num_warps: int
    programs_per_processor: int


@launch.tuned
def config(V: int) -> Config:
    """16 columns a thread: 4096 for 8 warps, fewer for a small vocabulary."""
    BLOCK_V = min(launch.power_of_two(V), 4096)
    return Config(BLOCK_V, min(max(BLOCK_V // 512, 1), 8))


def scale_config() -> ScaleConfig:
    """8 elements a thread; no more programs than are resident, so that returning at once costs nothing."""
    return ScaleConfig(2048, 8, programs_per_processor=8)


@cache
def _constants(tile: Config, smooth: bool, softcap: bool) -> launch.Constants:
    return launch.constants(SMOOTH=smooth, SOFTCAP=softcap, **tile._asdict())


@cache
def _scale_constants(tile: ScaleConfig) -> launch.Constants:
    return launch.constants(BLOCK=tile.BLOCK, num_warps=tile.num_warps)


def _launch_forward(
    logits: Tensor,
    targets: Tensor,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    launch.require_dtype("cross_entropy", logits=logits)
    _check_logits(logits, targets, vocab_size, label_smoothing, z_loss, softcap)
    logits = launch.unit_stride(logits)
    N = logits.shape[0]
    losses = torch.empty(N, dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(losses)
    if N > 0:
        tile = config(vocab_size)
        with launch.on_device(logits):
            _forward_kernel(
                (N,), _constants(tile, label_smoothing > 0, softcap > 0),
                logits, targets, losses, lse, logits.stride(0), targets.stride(0), vocab_size, ignore_index,
                label_smoothing, z_loss, softcap,
            )  # fmt: skip
    return losses, lse


def _launch_backward(
    dlosses: Tensor, logits: Tensor, targets: Tensor, lse: Tensor,
    vocab_size: int, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
) -> tuple[Tensor]:  # fmt: skip
    logits = launch.unit_stride(logits)
    N, Vp = logits.shape
    dlogits = torch.empty(N, Vp, dtype=logits.dtype, device=logits.device)
    if N > 0:
        tile = config(vocab_size)
        with launch.on_device(logits):
            _backward_kernel(
                (N,), _constants(tile, label_smoothing > 0, softcap > 0),
                dlosses, logits, targets, lse, dlogits, dlosses.stride(0), logits.stride(0), targets.stride(0),
                vocab_size, Vp, ignore_index, label_smoothing, z_loss, softcap,
            )  # fmt: skip
    return (dlogits,)


def losses_and_gradient_in_place(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    upstream: Tensor | None = None,
) -> None:
    """Fill ``losses`` (N,) fp32 and overwrite ``logits`` (N, Vp) with d losses.sum() / d logits, times ``upstream`` ()
    fp32 if given. For linear_cross_entropy; no autograd."""
    _launch_forward_backward(
        logits, targets, losses, logits, upstream, vocab_size, ignore_index, label_smoothing, z_loss, softcap
    )  # fmt: skip


def _launch_forward_backward(
    logits: Tensor, targets: Tensor, losses: Tensor, dlogits: Tensor, upstream: Tensor | None,
    vocab_size: int, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
) -> None:  # fmt: skip
    N, Vp = logits.shape
    if N > 0:
        with launch.on_device(logits):
            _forward_backward_kernel(
                (N,), _constants(config(vocab_size), label_smoothing > 0, softcap > 0),
                logits, targets, losses, dlogits, upstream, logits.stride(0), targets.stride(0), dlogits.stride(0),
                vocab_size, Vp, ignore_index, label_smoothing, z_loss, softcap,
            )  # fmt: skip


def _launch_one_pass(
    logits: Tensor, targets: Tensor, vocab_size: int, ignore_index: int, label_smoothing: float, z_loss: float,
    softcap: float, mean: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss (), dlogits (N, Vp) for an upstream gradient of one)."""
    launch.require_dtype("cross_entropy", logits=logits)
    _check_logits(logits, targets, vocab_size, label_smoothing, z_loss, softcap)
    logits = launch.unit_stride(logits)
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    share = 1 / counted_rows(targets, ignore_index) if mean else None
    _launch_forward_backward(
        logits, targets, losses, dlogits, share, vocab_size, ignore_index, label_smoothing, z_loss, softcap
    )  # fmt: skip
    total = losses.sum()
    return total if share is None else total * share, dlogits


def _launch_scale(dlogits: Tensor, factor: Tensor) -> None:
    """dlogits *= factor, in place."""
    size = dlogits.numel()
    if size > 0:
        tile = scale_config()
        with launch.on_device(dlogits):
            most = launch.processors() * tile.programs_per_processor
            _scale_kernel(
                (min(launch.cdiv(size, tile.BLOCK), most),), _scale_constants(tile), dlogits, factor, size
            )  # fmt: skip


def _check_logits(
    logits: Tensor, targets: Tensor, vocab_size: int, label_smoothing: float, z_loss: float, softcap: float
) -> None:
    if logits.dim() != 2:
        raise ValueError(
            f"cross_entropy takes logits (N, Vp), they are {tuple(logits.shape)}; flatten batch and time first"
        )
    check(logits.shape[0], logits.shape[1], targets, vocab_size, label_smoothing, z_loss, softcap)


def check(
    rows: int, columns: int, targets: Tensor, vocab_size: int, label_smoothing: float, z_loss: float, softcap: float
) -> None:
    """Raise ValueError unless ``targets`` and ``vocab_size`` fit logits of that shape, and the options are in range."""
    check_options(label_smoothing, z_loss, softcap)
    if not 1 <= vocab_size <= columns:
        raise ValueError(
            f"cross_entropy needs 1 ≤ vocab_size ≤ columns of the logits; they are {vocab_size} and {columns}"
        )
    if targets.shape != (rows,) or targets.dtype != torch.int64:
        raise ValueError(
            f"cross_entropy takes one int64 target a row: the logits have {rows} rows, "
            f"targets are {targets.dtype} of shape {tuple(targets.shape)}"
        )


# ------------------------------------------------------------------------------------------------------------- autograd


def _fake_forward(
    logits: Tensor,
    targets: Tensor,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return losses, torch.empty_like(losses)


def _fake_backward(
    dlosses: Tensor, logits: Tensor, targets: Tensor, lse: Tensor,
    vocab_size: int, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
) -> tuple[Tensor]:  # fmt: skip
    return (logits.new_empty(logits.shape),)


_cross_entropy = differentiable(
    "cross_entropy_triton",
    forward=_launch_forward,
    backward=_launch_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=lambda args, results: (args[0], args[1], results[1], *args[2:]),
    gradients=(0,),
)


def _fake_one_pass(
    logits: Tensor, targets: Tensor, vocab_size: int, ignore_index: int, label_smoothing: float, z_loss: float,
    softcap: float, mean: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return logits.new_empty((), dtype=torch.float32), logits.new_empty(logits.shape)


def _scaled(dloss: Tensor, dlogits: Tensor) -> tuple[Tensor]:
    # in fp32, since torch would round the factor to dlogits' dtype; zeros stay, as in _scale
    return (torch.where(dlogits == 0, dlogits, (dlogits.to(torch.float32) * dloss).to(dlogits.dtype)),)


_one_pass = differentiable(
    "cross_entropy_triton_one_pass",
    forward=_launch_one_pass,
    backward=_scaled,
    fake_forward=_fake_one_pass,
    fake_backward=lambda dloss, dlogits: (torch.empty_like(dlogits),),
    save=lambda args, results: (results[1],),
    gradients=(0,),
    backward_fuses=True,
)


class _OnePass(torch.autograd.Function):
    """The same for plain eager training, whose backward changes and hands over what forward made."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        loss, dlogits = _launch_one_pass(*args)
        ctx.save_for_backward(dlogits)
        ctx.arity = len(args)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        (dlogits,) = ctx.saved_tensors
        _launch_scale(dlogits, dloss)
        torch.autograd.graph.increment_version(dlogits)  # a second backward would scale what is scaled: it raises
        return dlogits, *[None] * (ctx.arity - 1)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    vocab_size: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "none",
) -> Tensor:
    """logits (N, Vp), targets (N,) int64 in [0, vocab_size) or ignore_index → losses (N,) fp32, or () for the
    reductions "sum" and "mean", whose graph serves one backward only."""
    args = (logits, targets, vocab_size, ignore_index, label_smoothing, z_loss, softcap)
    if reduction == "none":
        return _cross_entropy(*args)
    check_reduction(reduction)
    mean = reduction == "mean"
    wanted = logits.requires_grad and torch.is_grad_enabled()
    # fp16 has no room for the gradient of an upstream of one: what a loss scale would save is lost before it comes
    if not wanted or logits.dtype == torch.float16:
        return reduce(_cross_entropy(*args), targets, ignore_index, reduction)
    return _OnePass.apply(*args, mean) if bypass((logits, targets)) else _one_pass(*args, mean)


def unsupported(site: Site) -> str | None:
    return launch.unsupported(site)
