"""The Triton kernels of layer_norm and rms_norm, and of both with a residual add before them.

Mathematics, per row:
    s = x + residual, rounded to x's dtype; without a residual s = x
    m = mean(s), for rms_norm m = 0      r = 1/√(mean((s - m)²) + eps)
    ŝ = (s - m)·r                        y = ŝ·weight + bias
    g = dy·weight                        ds' = r·(g - ŝ·mean(g·ŝ) - mean(g)) + ds, for rms_norm without mean(g)
    dweight = Σ_rows dy·ŝ                dbias = Σ_rows dy
ds' is the gradient of x and of the residual; ds is the one that comes along the residual, where there is one.

Shapes: N rows (the product of the leading axes), C width, P programs that share the backward's rows. A pointer that is
None is a part that the op does not have: RESIDUAL, S, MEAN (rms_norm), WEIGHT, BIAS, DS, PARTIAL.

Forward: a program reads BLOCK_N whole rows, keeps them in registers and takes mean and variance in two passes, in fp32.
    Saved: s, and m and r in fp32, 8 bytes a row; backward then reads s and dy once.
Backward: P programs, a fixed number per processor, each walk every P-th block of rows, the next ones on their way to
    shared memory meanwhile, and keep their share of dweight and dbias in fp32 registers; one row per program goes to
    memory and a second kernel adds the P rows. No atomics: bitwise repeatable on one GPU model.
Wide rows, of more than MAX_FORWARD and MAX_BACKWARD columns, do not fit the registers. Forward walks them in tiles
    twice. Backward takes the two means of each row first, and then gives each program one tile of the columns.

Bytes, for elements of b bytes: forward 2·N·C·b, backward 3·N·C·b, with the add 4·N·C·b and 4·N·C·b; 16·P·C for the
shares; wide rows are read twice. About 8 and 14 FLOPs an element: the bound is memory bandwidth.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels.lib import triton_launch as launch


@triton.jit
def _summed(X, RESIDUAL, at_x, at_residual, mask):
    """s in x's dtype, 0 where masked."""
    s = tl.load(X + at_x, mask, other=0.0)
    if RESIDUAL is not None:
        residual = tl.load(RESIDUAL + at_residual, mask, other=0.0)
        s = (s.to(tl.float32) + residual.to(tl.float32)).to(s.dtype)
    return s


@triton.jit
def _vector(VECTOR, columns, real):
    """One row of elements in fp32, to be spread over the rows of a tile."""
    return tl.load(VECTOR + columns, real, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["N"])
def _forward(
    X, RESIDUAL, WEIGHT, BIAS, Y, S, MEAN, RSTD, stride_x, stride_residual, N, eps,
    C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_C)
    real = columns < C
    mask = (rows < N)[:, None] & real[None, :]
    row, at = rows[:, None], rows[:, None] * C + columns[None, :]
    s = _summed(X, RESIDUAL, row * stride_x + columns[None, :], row * stride_residual + columns[None, :], mask)
    if S is not None:
        tl.store(S + at, s, mask)
    centred = s.to(tl.float32)
    if MEAN is not None:
        mean = tl.sum(centred, 1) / C
        centred = tl.where(real[None, :], centred - mean[:, None], 0.0)
        tl.store(MEAN + rows, mean, rows < N)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    tl.store(RSTD + rows, rstd, rows < N)
    y = centred * rstd[:, None]
    if WEIGHT is not None:
        y *= _vector(WEIGHT, columns, real)
    if BIAS is not None:
        y += _vector(BIAS, columns, real)
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask)


@triton.jit
def _forward_wide(
    X, RESIDUAL, WEIGHT, BIAS, Y, S, MEAN, RSTD, stride_x, stride_residual, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row in tiles: its statistics, each tile's joined to those of the tiles before; then y. s is formed again, and
    not read back, for another thread may have written it."""
    row = tl.program_id(0).to(tl.int64)
    X += row * stride_x
    if RESIDUAL is not None:
        RESIDUAL += row * stride_residual
    mean = tl.full((), 0.0, tl.float32)
    squares = tl.full((), 0.0, tl.float32)  # Σ (s - mean)²
    for first in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        columns = first + tl.arange(0, BLOCK_C)
        real = columns < C
        centred = _summed(X, RESIDUAL, columns, columns, real).to(tl.float32)
        if MEAN is not None:
            count = tl.minimum(C - first, BLOCK_C).to(tl.float32)
            tile_mean = tl.sum(centred, 0) / count
            centred = tl.where(real, centred - tile_mean, 0.0)
            further = tile_mean - mean
            share = count / (first + count)
            mean += further * share
            squares += further * further * first * share
        squares += tl.sum(centred * centred, 0)
    rstd = tl.rsqrt(squares / C + eps)
    if MEAN is not None:
        tl.store(MEAN + row, mean)
    tl.store(RSTD + row, rstd)
    for first in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        columns = first + tl.arange(0, BLOCK_C)
        real = columns < C
        s = _summed(X, RESIDUAL, columns, columns, real)
        if S is not None:
            tl.store(S + row * C + columns, s, real)
        y = (s.to(tl.float32) - mean) * rstd
        if WEIGHT is not None:
            y *= tl.load(WEIGHT + columns, real, other=0.0).to(tl.float32)
        if BIAS is not None:
            y += tl.load(BIAS + columns, real, other=0.0).to(tl.float32)
        tl.store(Y + row * C + columns, y.to(Y.dtype.element_ty), real)


@triton.jit
def _means_wide(
    DY, S, WEIGHT, MEAN, RSTD, MEANS, stride_dy, stride_s, C: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr
):
    """mean(g·ŝ) and, for layer_norm, mean(g) of one row, into MEANS (N, 2)."""
    row = tl.program_id(0).to(tl.int64)
    DY += row * stride_dy
    S += row * stride_s
    rstd = tl.load(RSTD + row)
    sums_gs = tl.zeros((BLOCK_C,), tl.float32)
    sums_g = tl.zeros((BLOCK_C,), tl.float32)
    for first in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        columns = first + tl.arange(0, BLOCK_C)
        real = columns < C
        g = tl.load(DY + columns, real, other=0.0).to(tl.float32)
        if WEIGHT is not None:
            g *= tl.load(WEIGHT + columns, real, other=0.0).to(tl.float32)
        centred = tl.load(S + columns, real, other=0.0).to(tl.float32)
        if MEAN is not None:
            centred -= tl.load(MEAN + row)
            sums_g += g
        sums_gs += g * centred
    tl.store(MEANS + row * 2, tl.sum(sums_gs, 0) * rstd / C)
    if MEAN is not None:
        tl.store(MEANS + row * 2 + 1, tl.sum(sums_g, 0) / C)


@triton.jit(do_not_specialize=["N"])
def _backward(
    DY, DS, S, WEIGHT, MEAN, RSTD, MEANS, DX, PARTIAL, stride_dy, stride_ds, stride_s, N,
    C: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows of the columns of one tile: all of them, or those of the program's second index, and MEANS are given."""
    program, P = tl.program_id(0), tl.num_programs(0)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = columns < C
    if WEIGHT is not None:
        weight = _vector(WEIGHT, columns, real)
    dweight = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for block in tl.range(program, tl.cdiv(N, BLOCK_N), P, num_stages=STAGES):
        rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (rows < N)[:, None] & real[None, :]
        row = rows.to(tl.int64)[:, None]
        dy = tl.load(DY + row * stride_dy + columns[None, :], mask, other=0.0).to(tl.float32)
        normed = tl.load(S + row * stride_s + columns[None, :], mask, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + rows, rows < N, other=0.0)[:, None]
        if MEAN is not None:
            normed -= tl.load(MEAN + rows, rows < N, other=0.0)[:, None]
        normed *= rstd
        g = dy
        if WEIGHT is not None:
            g = dy * weight
        if MEANS is None:
            mean_gs = tl.sum(g * normed, 1)[:, None] / C
        else:
            mean_gs = tl.load(MEANS + row * 2, (rows < N)[:, None], other=0.0)
        dx = g - normed * mean_gs
        if MEAN is not None:
            if MEANS is None:
                mean_g = tl.sum(g, 1)[:, None] / C
            else:
                mean_g = tl.load(MEANS + row * 2 + 1, (rows < N)[:, None], other=0.0)
            dx -= mean_g
        dx *= rstd
        if DS is not None:
            dx += tl.load(DS + row * stride_ds + columns[None, :], mask, other=0.0).to(tl.float32)
        tl.store(DX + row * C + columns[None, :], dx.to(DX.dtype.element_ty), mask)
        if PARTIAL is not None:
            dweight += dy * normed
            if HAS_BIAS:
                dbias += dy
    if PARTIAL is not None:
        share = PARTIAL + program.to(tl.int64) * C + columns
        tl.store(share, tl.sum(dweight, 0), real)
        if HAS_BIAS:
            tl.store(share + P.to(tl.int64) * C, tl.sum(dbias, 0), real)


@triton.jit(do_not_specialize=["P"])
def _add_partials(PARTIAL, DWEIGHT, DBIAS, P, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    which = tl.program_id(1)  # 0: dweight, 1: dbias
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = columns < C
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for first in range(0, P, BLOCK_N):
        p = first + tl.arange(0, BLOCK_N)
        at = (which * P + p).to(tl.int64)[:, None] * C + columns[None, :]
        total += tl.load(PARTIAL + at, (p < P)[:, None] & real[None, :], other=0.0)
    result = tl.sum(total, 0)
    if which == 0:
        tl.store(DWEIGHT + columns, result.to(DWEIGHT.dtype.element_ty), real)
    elif DBIAS is not None:
        tl.store(DBIAS + columns, result.to(DBIAS.dtype.element_ty), real)


# ----------------------------------------------------------------------------------------------------------- launchers

MAX_FORWARD, MAX_BACKWARD = 16384, 8192  # columns of a tile that holds whole rows: of more, registers would spill


class Config(NamedTuple):
    """A tile is BLOCK_N rows of BLOCK_C columns, worked on by num_warps warps; a loop over tiles reads STAGES - 1 of
    them ahead; programs: of the backward on each processor, all resident."""

    BLOCK_N: int
    BLOCK_C: int
    num_warps: int
    STAGES: int = 1
    programs: int = 0


@launch.tuned
def config(C: int, itemsize: int, *, add: bool, backward: bool) -> Config:
    """The tile for rows of C elements of itemsize bytes: whole rows as long as they fit, short ones grouped.

    Forward, 4 warps and more programs on a processor than needed; a thread reads 32 elements, or 16 of each summand
    and of rows that are not aligned.
    Backward, 8 warps; a thread reads 8 elements of each operand, beside as many of both sums, and two tiles are on
    their way. Either has some 40 KB in flight on a processor, about twice what the memory's latency asks for.
    """
    if backward:
        wide, elements = C > MAX_BACKWARD, 2048
        BLOCK_C = min(MAX_BACKWARD, 2048) if wide else launch.power_of_two(C)
        BLOCK_N = min(max(elements // BLOCK_C, 1), 256)
        num_warps = min(max(BLOCK_N * BLOCK_C // 256, 4), 16)
        STAGES = 3 if BLOCK_N * BLOCK_C * itemsize <= 16384 else 2
        warps = 16 if C % 16 else 24  # on a processor
        return Config(BLOCK_N, BLOCK_C, num_warps, STAGES, programs=max(warps // num_warps, 1))
    if C > MAX_FORWARD:
        BLOCK_C = min(MAX_FORWARD, 16384 // itemsize)
        return Config(1, BLOCK_C, num_warps=max(BLOCK_C // 512, 4), STAGES=2)
    each = 16 if add or C % 16 else 32  # narrow loads, of rows that are not aligned, take more registers
    BLOCK_C = launch.power_of_two(C)
    BLOCK_N = min(max(128 * each // BLOCK_C, 1), 256)
    return Config(BLOCK_N, BLOCK_C, num_warps=min(max(BLOCK_N * BLOCK_C // (32 * each), 4), 16))


def shares_config(most: int, C: int) -> Config:
    """The tile that adds up to ``most`` programs' rows of C sums: all rows at once, 32 sums a thread."""
    BLOCK_N = min(launch.power_of_two(most), 512)
    return Config(BLOCK_N, max(min(8192 // BLOCK_N, launch.power_of_two(C)), 16), num_warps=8)


_launch_forward, _launch_forward_wide = launch.Kernel(_forward), launch.Kernel(_forward_wide)
_launch_means_wide, _launch_backward = launch.Kernel(_means_wide), launch.Kernel(_backward)
_launch_add_partials = launch.Kernel(_add_partials)


@cache
def _forward_plan(C: int, itemsize: int, add: bool) -> tuple[Config, launch.Constants]:
    """The tile, and what the kernel is compiled with: of whole rows, or of wide ones."""
    tile = config(C, itemsize, add=add, backward=False)
    if C <= tile.BLOCK_C:
        return tile, launch.constants(C=C, BLOCK_N=tile.BLOCK_N, BLOCK_C=tile.BLOCK_C, num_warps=tile.num_warps)
    return tile, launch.constants(C=C, BLOCK_C=tile.BLOCK_C, STAGES=tile.STAGES, num_warps=tile.num_warps)


class _BackwardPlan(NamedTuple):
    """tiles: of a row; most: programs; columns: of a tile of the sums. What the three kernels are compiled with: rows,
    means of wide ones, sums of shares."""

    BLOCK_N: int
    tiles: int
    most: int
    columns: int
    rows: launch.Constants
    means: launch.Constants
    shares: launch.Constants


@cache
def _backward_plan(C: int, itemsize: int, add: bool, bias: bool, processors: int) -> _BackwardPlan:
    tile = config(C, itemsize, add=add, backward=True)
    tiles = launch.cdiv(C, tile.BLOCK_C)
    most = max(processors * tile.programs // tiles, 1)
    sums = shares_config(most, C)
    walk: dict[str, int] = {"C": C, "BLOCK_C": tile.BLOCK_C, "STAGES": tile.STAGES, "num_warps": tile.num_warps}
    return _BackwardPlan(
        tile.BLOCK_N, tiles, most, sums.BLOCK_C,
        launch.constants(HAS_BIAS=bias, BLOCK_N=tile.BLOCK_N, **walk),
        launch.constants(**walk),
        launch.constants(C=C, BLOCK_N=sums.BLOCK_N, BLOCK_C=sums.BLOCK_C, num_warps=sums.num_warps),
    )  # fmt: skip


def _rows(x: Tensor, C: int) -> tuple[Tensor, int]:
    """x as rows of C dense elements, and the elements from one row to the next; a view where its strides allow."""
    if x.is_contiguous():
        return x, C
    rows = launch.unit_stride(x.reshape(math.prod(x.shape[:-1]), C))
    return rows, rows.stride(0)


def check(op: str, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
    """Raise TypeError or ValueError unless the tensors fit each other and the kernels."""
    launch.require_dtype(op, x=x, weight=weight, bias=bias)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op} takes rows of at least one element along x's last axis; x is {tuple(x.shape)}")
    C = x.shape[-1]
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != (C,):
            raise ValueError(f"{op}: {name} must have shape ({C},) like x's last axis, it has {tuple(vector.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"{op}: residual must have x's shape and dtype, {tuple(x.shape)} {x.dtype}; "
            f"it is {tuple(residual.shape)} {residual.dtype}"
        )


def allocate_forward(x: Tensor, *, add: bool, centre: bool) -> tuple[Tensor, Any, Any, Tensor]:
    """y, s (None unless add), mean (None unless centre), rstd: what forward returns, without values."""
    y = x.new_empty(x.shape)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return y, x.new_empty(x.shape) if add else None, torch.empty_like(rstd) if centre else None, rstd


def forward(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    centre: bool,
) -> tuple[Tensor, Any, Any, Tensor]:
    """y, s = x + residual (None without a residual), mean (None unless centre: layer_norm), rstd. op: for messages."""
    check(op, x, residual, weight, bias)
    y, s, mean, rstd = found = allocate_forward(x, add=residual is not None, centre=centre)
    N, C = rstd.numel(), x.shape[-1]
    if N == 0:
        return found
    tile, constants = _forward_plan(C, x.element_size(), residual is not None)
    x, stride_x = _rows(x, C)
    stride_residual = 0
    if residual is not None:
        residual, stride_residual = _rows(residual, C)
    weight, bias = _dense(weight), _dense(bias)
    with launch.on_device(x):
        if C <= tile.BLOCK_C:
            _launch_forward(
                (launch.cdiv(N, tile.BLOCK_N),), constants,
                x, residual, weight, bias, y, s, mean, rstd, stride_x, stride_residual, N, eps,
            )  # fmt: skip
        else:
            _launch_forward_wide(
                (N,), constants,
                x, residual, weight, bias, y, s, mean, rstd, stride_x, stride_residual, eps,
            )  # fmt: skip
    return found


def allocate_backward(s: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias without values; empty ones in the place of those that are not."""
    dx = s.new_empty(s.shape)
    dweight = s.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    dbias = s.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return dx, dweight, dbias


def backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias; s is what was normed (x, or x + residual), ds the gradient that comes along it if it is an
    output. bias gives its gradient's dtype only."""
    dx, dweight, dbias = found = allocate_backward(s, weight, bias)
    N, C = rstd.numel(), s.shape[-1]
    if N == 0:
        dweight.zero_()
        dbias.zero_()
        return found
    dy, stride_dy = _rows(dy, C)
    s, stride_s = _rows(s, C)
    stride_ds = 0
    if ds is not None:
        ds, stride_ds = _rows(ds, C)
    weight = _dense(weight)
    means = partial = None
    with launch.on_device(s):
        plan = _backward_plan(C, s.element_size(), ds is not None, bias is not None, launch.processors())
        P = min(launch.cdiv(N, plan.BLOCK_N), plan.most)
        if weight is not None:
            partial = rstd.new_empty((1 if bias is None else 2, P, C))
        if plan.tiles > 1:
            means = rstd.new_empty((N, 2))
            _launch_means_wide(
                (N,), plan.means, dy, s, weight, mean, rstd, means, stride_dy, stride_s
            )  # fmt: skip
        _launch_backward(
            (P, plan.tiles), plan.rows,
            dy, ds, s, weight, mean, rstd, means, dx, partial, stride_dy, stride_ds, stride_s, N,
        )  # fmt: skip
        if partial is not None:
            _launch_add_partials(
                (launch.cdiv(C, plan.columns), partial.shape[0]), plan.shares,
                partial, dweight, None if bias is None else dbias, P,
            )  # fmt: skip
    return found


def _dense(vector: Tensor | None) -> Tensor | None:
    return vector if vector is None else vector.contiguous()
