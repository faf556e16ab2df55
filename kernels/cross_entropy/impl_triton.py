"""cross_entropy in Triton: each row's loss in one pass over the logits, its gradient in a second.

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

Bytes, for elements of b bytes: forward N·V·b, backward N·(V + Vp)·b; about 5 and 4 FLOPs a logit: the bound is memory
bandwidth.

`losses_and_gradient_in_place` is for linear_cross_entropy: losses, and the gradient for an upstream of one written over
the logits, in one launch. Its second pass finds the row (100 KB of GPT-2's vocabulary in bf16) in the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels.autograd import differentiable
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
    top = tl.full((), -1e30, tl.float32)
    sums = tl.zeros((BLOCK_V,), tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, full, BLOCK_V):
        z = _load(ROW + first, columns, None, softcap, SOFTCAP, MASKED=False)
        top, sums, total = _accumulate(top, sums, total, z, None, SMOOTH, MASKED=False)
    if full < V:
        mask = full + columns < V
        z = _load(ROW + full, columns, mask, softcap, SOFTCAP, MASKED=True)
        top, sums, total = _accumulate(top, sums, total, z, mask, SMOOTH, MASKED=True)
    lse = top + tl.log2(tl.sum(sums, 0)) * LN2
    in_range = (target >= 0) & (target < V)
    true = tl.load(ROW + target, in_range, other=0.0).to(tl.float32)
    if SOFTCAP:
        true = softcap * tanh(true / softcap)
    loss = lse - true
    if SMOOTH:
        loss = (1 - smoothing) * loss + smoothing * (lse - tl.sum(total, 0) / V)
    loss += z_loss * lse * lse
    return tl.where(in_range, loss, float("nan")), lse


@triton.jit
def _row_gradient(
    ROW, DROW, target, lse, dloss, V, Vp, smoothing, z_loss, softcap,
    SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write dlogits of one row whose target counts; DROW may be ROW."""
    dloss = tl.where((target >= 0) & (target < V), dloss, float("nan"))
    scale = dloss * (1 + 2 * z_loss * lse)
    at_target = dloss * (1 - smoothing)
    everywhere = dloss * smoothing / V
    columns = tl.arange(0, BLOCK_V)
    full = V // BLOCK_V * BLOCK_V
    for first in range(0, full, BLOCK_V):
        z = _load(ROW + first, columns, None, softcap, SOFTCAP, MASKED=False)
        dz = tl.exp2((z - lse) * LOG2E) * scale
        dz -= tl.where(first + columns == target, at_target, 0.0)
        if SMOOTH:
            dz -= everywhere
        if SOFTCAP:
            dz *= 1 - (z / softcap) * (z / softcap)
        tl.store(DROW + first + columns, dz.to(DROW.dtype.element_ty))
    for first in range(full, Vp, BLOCK_V):  # the last real columns and the padding
        real = first + columns < V
        z = _load(ROW + first, columns, real, softcap, SOFTCAP, MASKED=True)
        z = tl.where(real, z, 0.0)
        dz = tl.exp2((z - lse) * LOG2E) * scale
        dz -= tl.where(first + columns == target, at_target, 0.0)
        if SMOOTH:
            dz -= everywhere
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
            V, Vp, smoothing, z_loss, softcap, SMOOTH, SOFTCAP, BLOCK_V,
        )  # fmt: skip


@triton.jit(do_not_specialize=["stride_target"])
def _forward_backward_in_place(
    LOGITS, TARGETS, LOSSES, stride_logits, stride_target, V, Vp, ignore_index, smoothing, z_loss, softcap,
    SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    ROW = LOGITS + row * stride_logits
    target = tl.load(TARGETS + row * stride_target)
    if target == ignore_index:
        tl.store(LOSSES + row, 0.0)
        _row_zeros(ROW, Vp, BLOCK_V)
    else:
        loss, lse = _row_loss(ROW, target, V, smoothing, z_loss, softcap, SMOOTH, SOFTCAP, BLOCK_V)
        tl.store(LOSSES + row, loss)
        tl.debug_barrier()  # the target's logit has been read by every thread before one of them writes over it
        _row_gradient(ROW, ROW, target, lse, 1.0, V, Vp, smoothing, z_loss, softcap, SMOOTH, SOFTCAP, BLOCK_V)


# ----------------------------------------------------------------------------------------------------------- launchers


class Config(NamedTuple):
    BLOCK_V: int
    num_warps: int


def config(V: int) -> Config:
    """16 columns a thread: 4096 for 8 warps, fewer for a small vocabulary."""
    BLOCK_V = min(launch.power_of_two(V), 4096)
    return Config(BLOCK_V, min(max(BLOCK_V // 512, 1), 8))


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
    check(logits.shape[0], logits.shape[1], targets, vocab_size)
    logits = launch.unit_stride(logits)
    N = logits.shape[0]
    losses = torch.empty(N, dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(losses)
    if N > 0:
        tile = config(vocab_size)
        with launch.on_device(logits):
            _forward[(N,)](
                logits, targets, losses, lse, logits.stride(0), targets.stride(0), vocab_size, ignore_index,
                label_smoothing, z_loss, softcap,
                SMOOTH=label_smoothing > 0, SOFTCAP=softcap > 0, BLOCK_V=tile.BLOCK_V, num_warps=tile.num_warps,
                **launch.OPTIONS,
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
            _backward[(N,)](
                dlosses, logits, targets, lse, dlogits, dlosses.stride(0), logits.stride(0), targets.stride(0),
                vocab_size, Vp,
                ignore_index, label_smoothing, z_loss, softcap,
                SMOOTH=label_smoothing > 0, SOFTCAP=softcap > 0, BLOCK_V=tile.BLOCK_V, num_warps=tile.num_warps,
                **launch.OPTIONS,
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
) -> None:
    """Fill ``losses`` (N,) fp32 and overwrite ``logits`` (N, Vp) with d losses.sum() / d logits. For
    linear_cross_entropy; no autograd."""
    N, Vp = logits.shape
    if N == 0:
        return
    tile = config(vocab_size)
    with launch.on_device(logits):
        _forward_backward_in_place[(N,)](
            logits, targets, losses, logits.stride(0), targets.stride(0), vocab_size, Vp, ignore_index,
            label_smoothing, z_loss, softcap,
            SMOOTH=label_smoothing > 0, SOFTCAP=softcap > 0, BLOCK_V=tile.BLOCK_V, num_warps=tile.num_warps,
            **launch.OPTIONS,
        )  # fmt: skip


def check(rows: int, columns: int, targets: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless ``targets`` and ``vocab_size`` fit logits of that shape."""
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


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    vocab_size: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """logits (N, Vp), targets (N,) int64 in [0, vocab_size) or ignore_index → losses (N,) fp32."""
    return _cross_entropy(logits, targets, vocab_size, ignore_index, label_smoothing, z_loss, softcap)


def unsupported(site: Site) -> str | None:
    return launch.unsupported(site)
