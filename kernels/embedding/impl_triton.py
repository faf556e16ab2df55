"""embedding in Triton: a gather forward; backward sorts the ids and sums each table row's share in order, no atomics.

Mathematics:
    y_n = W[id_n]        dW[v] = Σ over n with id_n = v, in the order of n, of dy_n, in fp32
An id outside [0, V) reads nothing and makes its row of y NaN: loud, and without the host synchronisation that an error
would take. It takes no part in dW.

Shapes: N ids, V rows of the table, C width. Saved: the ids.

Backward, in four steps:
    1. keys: the ids, narrowed to 16 bits where V allows, so that the sort takes few passes; ids outside become a key
       beyond all others;
    2. torch.sort, stable: equal ids stand together, in the order of n;
    3. for each v, where its run of equal keys begins, by binary search;
       for each chunk of CHUNK sorted ids that are all equal, the sum of their rows (only long runs have such chunks);
    4. for each v, the sum over its run: up to a chunk's border row by row, whole chunks by their sums, then the rest.
       Every row of dW is written, zeros where no id names it.
So no program adds more than 2·CHUNK rows one by one, nor more than N/CHUNK sums, whatever the ids are.

Bytes, for elements of b bytes: forward 2·N·C·b; backward N·C·b read and V·C·b written, besides 8·N for the ids and
what their sort takes: the bound is memory bandwidth, for the table of GPT-2 that of its writing.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels.autograd import differentiable
from tritium.kernels.lib import triton_launch as launch
from tritium.kernels.lib import triton_pointwise as pointwise
from tritium.kernels.site import Site

DETERMINISTIC = True
NARROW_V = 65535  # rows of a table whose ids, and one key beyond them, fit 16 bits


@triton.jit(do_not_specialize=["N", "stride_ids"])
def _gather(
    IDS, WEIGHT, Y, stride_ids, stride_weight, N, V, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    n = (program // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = program % tiles * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    ids = tl.load(IDS + n * stride_ids, n < N, other=0)
    found, mask = ((ids >= 0) & (ids < V))[:, None], (n < N)[:, None]
    if C % BLOCK_C != 0:
        found, mask = found & (columns < C), mask & (columns < C)
    rows = tl.load(WEIGHT + ids[:, None] * stride_weight + columns, found, other=float("nan"))
    tl.store(Y + n[:, None] * C + columns, rows, mask)


@triton.jit(do_not_specialize=["N", "stride_ids"])
def _make_keys(IDS, KEYS, stride_ids, N, V, lowest, highest, BLOCK_N: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ids = tl.load(IDS + n * stride_ids, n < N, other=0)
    keys = tl.where((ids >= 0) & (ids < V), ids + lowest, highest)
    tl.store(KEYS + n, keys.to(KEYS.dtype.element_ty), n < N)


@triton.jit(do_not_specialize=["N", "steps"])
def _find_runs(KEYS, STARTS, N, V, lowest, steps, BLOCK_V: tl.constexpr):
    """STARTS[v] = the number of keys below v's, for v from 0 to V."""
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    low = tl.zeros((BLOCK_V,), tl.int32)
    high = low + N
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = low < high
        below = tl.load(KEYS + middle, open_, other=0).to(tl.int32) < v + lowest
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & (below == 0), middle, high)
    tl.store(STARTS + v, low, v <= V)


@triton.jit(do_not_specialize=["log_chunk"])
def _sum_chunks(
    DY, KEYS, ORDER, SUMS, stride_dy, log_chunk, C: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr
):
    """SUMS[chunk] = Σ of the chunk's rows of dy in sorted order, where all its keys are equal."""
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    chunk = tl.program_id(0) // tiles
    columns = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    real = columns < C
    first, last = chunk << log_chunk, (chunk + 1) << log_chunk
    if tl.load(KEYS + first) == tl.load(KEYS + last - 1):
        total = tl.zeros((BLOCK_C,), tl.float32)
        for i in range(first, last, UNROLL):
            for j in tl.static_range(UNROLL):
                n = tl.load(ORDER + i + j)
                total += tl.load(DY + n * stride_dy + columns, real, other=0.0).to(tl.float32)
        tl.store(SUMS + chunk.to(tl.int64) * C + columns, total, real)


@triton.jit
def _add_rows(
    total, ROWS, ORDER, first, last, stride, columns, C: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr
):
    """total (BLOCK_V, BLOCK_C) plus, for each of its rows, ROWS[first : last], one after another; with ORDER, those at
    ORDER[first : last]."""
    for i in range(0, tl.max(last - first, 0), UNROLL):
        for j in tl.static_range(UNROLL):
            at = first + i + j
            mask = at < last
            if ORDER is None:
                row = at.to(tl.int64)
            else:
                row = tl.load(ORDER + at, mask, other=0)
            mask = mask[:, None]
            if C % BLOCK_C != 0:
                mask = mask & (columns < C)
            total += tl.load(ROWS + row[:, None] * stride + columns, mask, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["log_chunk"])
def _sum_runs(
    DY, ORDER, STARTS, SUMS, DWEIGHT, stride_dy, V, log_chunk,
    C: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    v = tl.program_id(0) // tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    columns = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    start = tl.load(STARTS + v, v < V, other=0)
    end = tl.load(STARTS + v + 1, v < V, other=0)
    first, last = (start + (1 << log_chunk) - 1) >> log_chunk, end >> log_chunk  # whole chunks, if first < last
    head = tl.minimum(first << log_chunk, end)
    tail = tl.maximum(last << log_chunk, head)
    total = tl.zeros((BLOCK_V, BLOCK_C), tl.float32)
    total = _add_rows(total, DY, ORDER, start, head, stride_dy, columns, C, BLOCK_C, UNROLL)
    total = _add_rows(total, SUMS, None, first, last, C, columns, C, BLOCK_C, UNROLL)
    total = _add_rows(total, DY, ORDER, tail, end, stride_dy, columns, C, BLOCK_C, UNROLL)
    mask = (v < V)[:, None]
    if C % BLOCK_C != 0:
        mask = mask & (columns < C)
    tl.store(DWEIGHT + v.to(tl.int64)[:, None] * C + columns, total.to(DWEIGHT.dtype.element_ty), mask)


# ----------------------------------------------------------------------------------------------------------- launchers


class Config(NamedTuple):
    """A tile is ROWS rows, of y or of the table's gradient, and BLOCK_C columns, worked on by num_warps warps."""

    ROWS: int
    BLOCK_C: int
    num_warps: int


@launch.tuned
def config(C: int, itemsize: int) -> Config:
    """32 bytes a thread."""
    num_warps = 4
    elements = num_warps * 32 * 32 // itemsize
    BLOCK_C = pointwise.block_of(C, min(elements, 512), 128)
    return Config(elements // BLOCK_C, BLOCK_C, num_warps)


_gather_kernel, _make_keys_kernel = launch.Kernel(_gather), launch.Kernel(_make_keys)
_find_runs_kernel, _sum_chunks_kernel = launch.Kernel(_find_runs), launch.Kernel(_sum_chunks)
_sum_runs_kernel = launch.Kernel(_sum_runs)
_KEYS = launch.constants(BLOCK_N=1024, num_warps=4)
_RUNS = launch.constants(BLOCK_V=128, num_warps=4)


@cache
def _gathering(C: int, tile: Config) -> launch.Constants:
    return launch.constants(C=C, BLOCK_N=tile.ROWS, BLOCK_C=tile.BLOCK_C, num_warps=tile.num_warps)


@cache
def _summing(C: int, tile: Config) -> tuple[launch.Constants, launch.Constants]:
    """Of the kernels that sum chunks and runs. Most runs are of one row or two, so UNROLL rows in flight are enough.
    maxnreg: without it ptxas aims at fewer registers than there are, and spills one; so it does with 4 rows.
    """
    of_chunks = launch.constants(C=C, BLOCK_C=tile.BLOCK_C, UNROLL=8, num_warps=2)
    of_runs = launch.constants(
        C=C, BLOCK_V=tile.ROWS, BLOCK_C=tile.BLOCK_C, UNROLL=2, num_warps=tile.num_warps, maxnreg=64
    )
    return of_chunks, of_runs


def log_chunk_of(N: int) -> int:
    """log₂ CHUNK: CHUNK is from √N/4 to √N/2, and at least 32, so that one program adds neither many rows nor many
    sums."""
    return max(5, (math.isqrt(N) - 1).bit_length() - 2)


def _launch_forward(ids: Tensor, weight: Tensor) -> tuple[Tensor]:
    launch.require_dtype("embedding", weight=weight)
    if ids.dtype != torch.int64 or weight.dim() != 2:
        raise ValueError(
            f"embedding takes ids in int64 and a weight (V, C), they are {ids.dtype} and {tuple(weight.shape)}"
        )
    V, C = weight.shape
    y = torch.empty((*ids.shape, C), dtype=weight.dtype, device=weight.device)
    N = ids.numel()
    if N * C > 0:
        ids, weight = ids.reshape(-1), launch.unit_stride(weight)
        tile = config(C, weight.element_size())
        with launch.on_device(weight):
            _gather_kernel(
                (launch.cdiv(N, tile.ROWS) * launch.cdiv(C, tile.BLOCK_C),), _gathering(C, tile),
                ids, weight, y, ids.stride(0), weight.stride(0), N, V,
            )  # fmt: skip
    return (y,)


def _launch_backward(dy: Tensor, ids: Tensor, V: int) -> tuple[Tensor]:
    C, N = dy.shape[-1], ids.numel()
    dweight = torch.empty(V, C, dtype=dy.dtype, device=dy.device)
    if N == 0 or V * C == 0:
        return (dweight.zero_(),)
    dy, stride_dy = pointwise.rows_of(dy, C)
    ids = ids.reshape(-1)
    narrow = V <= NARROW_V
    lowest, highest = (-(2**15), 2**15 - 1) if narrow else (0, 2**31 - 1)
    keys = torch.empty(N, dtype=torch.int16 if narrow else torch.int32, device=dy.device)
    starts = torch.empty(V + 1, dtype=torch.int32, device=dy.device)
    log_chunk = log_chunk_of(N)
    chunks = N >> log_chunk
    sums = torch.empty(chunks, C, dtype=torch.float32, device=dy.device)
    tile = config(C, dy.element_size())
    tiles = -(-C // tile.BLOCK_C)
    of_chunks, of_runs = _summing(C, tile)
    with launch.on_device(dy):
        _make_keys_kernel((launch.cdiv(N, 1024),), _KEYS, ids, keys, ids.stride(0), N, V, lowest, highest)
        keys, order = torch.sort(keys, stable=True)
        _find_runs_kernel((launch.cdiv(V + 1, 128),), _RUNS, keys, starts, N, V, lowest, N.bit_length())
        if chunks > 0:
            _sum_chunks_kernel((chunks * tiles,), of_chunks, dy, keys, order, sums, stride_dy, log_chunk)
        _sum_runs_kernel(
            (launch.cdiv(V, tile.ROWS) * tiles,), of_runs, dy, order, starts, sums, dweight, stride_dy, V, log_chunk
        )
    return (dweight,)


# ------------------------------------------------------------------------------------------------------------- autograd


_embedding = differentiable(
    "embedding_triton",
    forward=_launch_forward,
    backward=_launch_backward,
    fake_forward=lambda ids, weight: (weight.new_empty((*ids.shape, weight.shape[1])),),
    fake_backward=lambda dy, ids, V: (dy.new_empty((V, dy.shape[-1])),),
    save=lambda args, results: (args[0], args[1].shape[0]),
    gradients=(1,),
)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """ids (...) int64 with 0 ≤ id < V, weight (V, C) → (..., C) in weight's dtype; NaN for an id outside."""
    return _embedding(ids, weight)


def unsupported(site: Site) -> str | None:
    return launch.unsupported(site)
