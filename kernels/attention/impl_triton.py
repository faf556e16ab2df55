"""attention in Triton: the FlashAttention-2 algorithm, forward and backward, without atomics; attention_lse shares it.

Mathematics, for query i of one head and the keys j it sees (reference.py says which), c the softcap:
    s_ij = scale·q_i·k_j, softcapped c·tanh(s_ij/c)      lse_i = log Σ_j exp s_ij      p_ij = exp(s_ij - lse_i)
    y_i = Σ_j p_ij v_j
    dv_j = Σ_i p_ij dy_i      dp_ij = dy_i·v_j           delta_i = Σ_j p_ij dp_ij = y_i·dy_i
    ds_ij = p_ij (dp_ij - delta_i), softcapped times 1 - (s_ij/c)²
    dq_i = scale Σ_j ds_ij k_j                           dk_j = scale Σ_i ds_ij q_i
With dropout r and the keep mask z of reference.keep_mask (the same hash, bit for bit) y and dv have p_ij z_ij/(1 - r)
for p_ij, and dp_ij is multiplied by z_ij/(1 - r). A query that sees no key is blind: y = 0, lse = +∞, so p = 0 and no
gradient. attention_lse returns lse too, whose gradient adds p_ij dlse_i to ds_ij: delta_i - dlse_i replaces delta_i.
Any finite scale: the kernels multiply s by |scale| once its maximum is known, and give the sign to the operand they
hold (SIGN; q forward and for dq, k for dk and dv). Scale 0 puts zeros there: equal weights, and dq = dk = 0.

Shapes: B batch, Tq queries, Tk keys, H query heads, G key/value heads, R = H/G, D head width; a tile is BLOCK_M queries
by BLOCK_N keys; BLOCK_D is the power of two that holds D.

Forward: a program holds BLOCK_M queries and walks the keys with the running maximum m, the running sum l and the
    unnormalised y in fp32, in base 2: log₂e is folded into the scale. Saved: q, k, v, y, and lse (B, H, Tq), base 2.
Backward: delta; then dk and dv, a program holding BLOCK_N keys of one key head and walking the queries of its R heads;
    then dq, where a program holds BLOCK_M queries and walks the keys.
A walk has up to three parts: tiles that a window or a document cuts at its beginning; tiles seen whole, which carry no
mask; tiles that the diagonal or the end cuts.

What FlashAttention promises and this keeps:
    memory grows with T and not with T²: beside inputs, outputs and gradients there are lse and delta, 4 bytes a query
    and head each;
    tiles that nobody sees are neither read nor computed, for causal, window and documents alike;
    q, k, v and dy are read in place at any strides with a dense last axis: a packed projection is not copied;
    grouped heads read their keys in place and add up dk and dv in registers;
    every result has one writer, which adds in one order: gradients are bitwise repeatable, at no cost in buffers;
    another batch size or length compiles nothing new.

FLOPs over the P visible pairs: forward 4·P·H·D, backward 10·P·H·D, of which 2 compute s again; as the two walks of the
backward share no products, 14·P·H·D are executed. Bytes: q, k, v, y and their gradients once. The bound is the tensor
cores; beside them each pair costs an exp2 in either direction, which at D = 64 takes as long as its products.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels.attention.reference import check_options
from tritium.kernels.autograd import differentiable
from tritium.kernels.lib import triton_launch as launch
from tritium.kernels.lib.triton_math import LN2, LOG2E, tanh
from tritium.kernels.site import Site

DETERMINISTIC = True
MAX_D = 256
MAX_ROWS = 128  # of a tile: times the stride of time it fits in 32 bits, or _dense copies
LOWEST = tl.constexpr(
    -3e38
)  # where the running maximum starts: finite, so that a tile with nothing visible subtracts no infinities
SCAN = tl.constexpr(1024)  # entries of seq_start looked at in one step


# ---------------------------------------------------------------------------------------------- masks, ranges and
# scores


@triton.jit
def _visible(i, j, start, Tk, past, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether query i sees key j; i, j and start broadcast. past = Tk - Tq, so that i + past is the query's
    position."""
    seen = j < Tk
    if CAUSAL:
        seen = seen & (j <= i + past)
    if WINDOW:
        seen = seen & (i + past - j < window)
    if start is not None:
        seen = seen & (j >= start)
    return seen


@triton.jit
def _starts(START, i, Tq, stride_st):
    """The document starts of queries i; one past the end has the largest."""
    return tl.load(START + i.to(tl.int64) * stride_st, i < Tq, other=2147483647)


@triton.jit
def _key_ranges(
    START, m0, Tq, Tk, past, window, stride_st,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The keys for queries m0 … m0 + BLOCK_M - 1: (first, whole, tail, last) with first ≤ whole ≤ tail multiples of
    BLOCK_N; tiles in
    [whole, tail) are seen whole, those in [first, whole) and [tail, last) in part."""
    last, tail = Tk, Tk
    first, whole = 0, 0
    if CAUSAL:
        last = tl.minimum(Tk, m0 + BLOCK_M + past)
        tail = tl.minimum(Tk, m0 + past + 1)
    if WINDOW:
        first = m0 + past - window + 1
        whole = first + BLOCK_M - 1
    if START is not None:
        i = m0 + tl.arange(0, BLOCK_M)
        starts = _starts(START, i, Tq, stride_st)
        first = tl.maximum(first, tl.min(starts, 0))
        whole = tl.maximum(whole, tl.max(tl.where(i < Tq, starts, 0), 0))
    last = tl.maximum(last, 0)
    first = tl.minimum(tl.maximum(first, 0), last) // BLOCK_N * BLOCK_N
    # to last before it is rounded up: a document may start at the highest integer, which has none above it
    whole = tl.cdiv(tl.minimum(tl.maximum(whole, 0), last), BLOCK_N) * BLOCK_N
    tail = tl.maximum(tl.maximum(tail, 0) // BLOCK_N * BLOCK_N, whole)
    return first, whole, tail, last


@triton.jit
def _query_ranges(
    START, n0, Tq, Tk, past, window, stride_st,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The queries that see keys n0 … n0 + BLOCK_N - 1, as in _key_ranges with the axes exchanged."""
    last, tail = Tq, Tq
    first, whole = 0, 0
    end = tl.minimum(n0 + BLOCK_N, Tk) - 1  # the last key of this tile
    if CAUSAL:
        first = n0 - past
        whole = end - past
    if WINDOW:
        last = tl.minimum(Tq, end + window - past)
        tail = tl.minimum(Tq, n0 + window - past)
    first = tl.maximum(first, 0)
    if START is not None:
        # queries from `unseen` on belong to documents that start after this tile; those before `cut` to documents
        # that start before it
        cut = Tq
        unseen = 0
        for t in range(first, Tq, SCAN):
            i = t + tl.arange(0, SCAN)
            starts = _starts(START, i, Tq, stride_st)
            cut = tl.minimum(cut, tl.min(tl.where((starts > n0) & (i < Tq), i, Tq), 0))
            unseen = tl.maximum(unseen, tl.max(tl.where(starts <= end, i + 1, 0), 0))
        last = tl.minimum(last, unseen)
        tail = tl.minimum(tail, tl.minimum(cut, last))  # padding sees nothing: its document starts after it
    last = tl.maximum(last, 0)
    first = tl.minimum(first, last) // BLOCK_M * BLOCK_M
    whole = tl.maximum(tl.minimum(tl.cdiv(tl.maximum(whole, 0), BLOCK_M), tl.cdiv(last, BLOCK_M)) * BLOCK_M, first)
    tail = tl.maximum(tl.maximum(tail, 0) // BLOCK_M * BLOCK_M, whole)
    return first, whole, tail, last


@triton.jit
def _keep(row, j, Tk, seed, threshold):
    """reference.keep_mask at weight (row, j), row counting the rows of all heads and batches; everything modulo 2³²."""
    x = (row.to(tl.uint32) * Tk.to(tl.uint32) + j.to(tl.uint32)) ^ (seed.to(tl.uint32) * 0x9E3779B1)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 16)) * 0x846CA68B
    return (x ^ (x >> 15)) >= threshold.to(tl.uint32)


@triton.jit
def _load_rows(
    X, first, T, stride, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """The tile of rows first … first + ROWS - 1 by D columns, zeros beyond T (if MASKED) and beyond D. The tile's
    place is one 64-bit
    number and the offsets in it are 32-bit ones that no loop changes."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    at = X + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    if MASKED:
        if D == BLOCK_D:
            return tl.load(at, (first + rows < T)[:, None], other=0.0)
        else:
            return tl.load(at, (first + rows < T)[:, None] & (columns < D)[None, :], other=0.0)
    else:
        if D == BLOCK_D:
            return tl.load(at)
        else:
            return tl.load(at, (columns < D)[None, :], other=0.0)


@triton.jit
def _signed(x, SIGN: tl.constexpr):
    """The factor that s is multiplied by after its maximum was taken cannot be negative or 0: the sign is put here."""
    if SIGN == 0:
        return tl.zeros_like(x)
    elif SIGN < 0:
        return -x
    else:
        return x


@triton.jit
def _store_rows(X, tile, first, T, stride, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The opposite of _load_rows, rounded to X's dtype."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    at = X + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    tl.store(at, tile.to(X.dtype.element_ty), (first + rows < T)[:, None] & (columns < D)[None, :])


# -------------------------------------------------------------------------------------------------------------- forward


@triton.jit
def _forward_part(
    y, m, l, q, K, V, begin, end, i, row, start, seed, Tk, past, window, stride_kt, stride_vt, factor, softcap,
    threshold,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Walk the key tiles in [begin, end)."""
    for n0 in range(begin, end, BLOCK_N):
        j = n0 + tl.arange(0, BLOCK_N)
        k = _load_rows(K, n0, Tk, stride_kt, BLOCK_N, D, BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SOFTCAP:
            s = softcap * tanh(s * (factor / softcap))
            to_base_2 = LOG2E
        else:
            to_base_2 = factor
        if MASKED:
            s = tl.where(_visible(i[:, None], j[None, :], start, Tk, past, window, CAUSAL, WINDOW), s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * to_base_2)
        p = tl.exp2(s * to_base_2 - m_new[:, None])
        rescale = tl.exp2(m - m_new)
        l = l * rescale + tl.sum(p, 1)
        y = y * rescale[:, None]
        if DROPOUT:
            p = tl.where(_keep(row[:, None], j[None, :], Tk, seed, threshold), p, 0.0)
        v = _load_rows(V, n0, Tk, stride_vt, BLOCK_N, D, BLOCK_D, MASKED)
        y = tl.dot(p.to(v.dtype), v, y, input_precision=PRECISION)
        m = m_new
    return y, m, l


@triton.jit(do_not_specialize=["stride_sb", "Tq", "Tk", "H", "window", "threshold"])
def _forward(
    Q, K, V, START, SEED, Y, LSE, NATURAL, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb,
    stride_vt, stride_vh,
    stride_sb, stride_st, Tq, Tk, window, H, factor, softcap, threshold, keep_scale,
    SIGN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    # blocks of one head are neighbours, to share its keys in the cache; the longest (the last of a causal head) go
    # first
    blocks = tl.cdiv(Tq, BLOCK_M)
    bh = tl.program_id(0) // blocks
    m0 = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    Q += b * stride_qb + h * stride_qh
    K += b * stride_kb + (h // R) * stride_kh
    V += b * stride_vb + (h // R) * stride_vh
    past = Tk - Tq
    i = m0 + tl.arange(0, BLOCK_M)
    row = bh * Tq + i
    start = None
    if START is not None:
        START += b * stride_sb
        start = _starts(START, i, Tq, stride_st)[:, None]
    seed = tl.load(SEED) if DROPOUT else 0
    q = _signed(_load_rows(Q, m0, Tq, stride_qt, BLOCK_M, D, BLOCK_D, True), SIGN)
    y = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    m = tl.full((BLOCK_M,), LOWEST, tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    first, whole, tail, last = _key_ranges(START, m0, Tq, Tk, past, window, stride_st, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    if WINDOW or START is not None:
        y, m, l = _forward_part(
            y, m, l, q, K, V, first, whole, i, row, start, seed, Tk, past, window, stride_kt, stride_vt, factor,
            softcap, threshold,
            True, CAUSAL, WINDOW, SOFTCAP, DROPOUT, PRECISION, D, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    y, m, l = _forward_part(
        y, m, l, q, K, V, whole, tail, i, row, start, seed, Tk, past, window, stride_kt, stride_vt, factor, softcap,
        threshold,
        False, CAUSAL, WINDOW, SOFTCAP, DROPOUT, PRECISION, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    y, m, l = _forward_part(
        y, m, l, q, K, V, tail, last, i, row, start, seed, Tk, past, window, stride_kt, stride_vt, factor, softcap,
        threshold,
        True, CAUSAL, WINDOW, SOFTCAP, DROPOUT, PRECISION, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    blind = l == 0.0  # these rows saw no key
    y = y * (keep_scale / tl.where(blind, 1.0, l))[:, None]
    lse = tl.where(blind, float("inf"), m + tl.log2(tl.where(blind, 1.0, l)))
    at = bh.to(tl.int64) * Tq + i
    tl.store(LSE + at, lse, i < Tq)
    if NATURAL is not None:
        tl.store(NATURAL + at, tl.where(blind, float("-inf"), lse * LN2), i < Tq)
    _store_rows(Y + (b * Tq * H + h) * D, y, m0, Tq, H * D, BLOCK_M, D, BLOCK_D)


# ------------------------------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=["Tq", "H", "stride_lb", "stride_lh", "stride_lt"])
def _delta(
    Y, DY, LSE, DLSE, DELTA, stride_db, stride_dt, stride_dh, stride_lb, stride_lh, stride_lt, Tq, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Tq, BLOCK_M)
    bh = tl.program_id(0) // blocks
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    m0 = tl.program_id(0) % blocks * BLOCK_M
    i = m0 + tl.arange(0, BLOCK_M)
    y = _load_rows(Y + (b * Tq * H + h) * D, m0, Tq, H * D, BLOCK_M, D, BLOCK_D, True).to(tl.float32)
    dy = _load_rows(DY + b * stride_db + h * stride_dh, m0, Tq, stride_dt, BLOCK_M, D, BLOCK_D, True).to(tl.float32)
    delta = tl.sum(y * dy, 1)
    at = bh.to(tl.int64) * Tq + i
    if DLSE is not None:
        # a blind row's lse is a constant, whatever comes back for it
        blind = tl.load(LSE + at, i < Tq, other=0.0) == float("inf")
        dlse = tl.load(DLSE + b * stride_lb + h * stride_lh + i.to(tl.int64) * stride_lt, i < Tq, other=0.0)
        delta = tl.where(blind, 0.0, delta - dlse)
    tl.store(DELTA + at, delta, i < Tq)


@triton.jit
def _backward_keys_part(
    dk, dv, k, v, Q, DY, LSE, DELTA, START, begin, end, j, row, seed, Tq, Tk, past, window, stride_qh, stride_qt,
    stride_dh, stride_dt,
    stride_st, factor, softcap, threshold, keep_scale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Walk the query tiles in [begin, end) of R heads, in one loop: nested ones cost registers. Q … DELTA and row are
    the first head's.
    Tiles are transposed, keys by queries, so that no product needs p or ds turned. Queries past the end are read as
    zeros with an lse of +∞, so their p is 0 once their s is finite: a key of -∞ times their zeros is NaN, which is why
    their tile is one of the MASKED."""
    tiles = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_M)
    for t in range(0, tiles * R):
        if R == 1:
            r, m0 = 0, begin + t * BLOCK_M
        else:
            r, m0 = t // tiles, begin + t % tiles * BLOCK_M
        i = m0 + tl.arange(0, BLOCK_M)
        q = _load_rows(Q + tl.cast(r, tl.int64) * stride_qh, m0, Tq, stride_qt, BLOCK_M, D, BLOCK_D, True)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if MASKED:
            s = tl.where((i < Tq)[None, :], s, 0.0)
        if SOFTCAP:
            tanh_s = tanh(s * (factor / softcap))
            s = softcap * tanh_s
            to_base_2 = LOG2E
        else:
            to_base_2 = factor
        lse = tl.load(LSE + r * Tq + i, i < Tq, other=float("inf"))
        delta = tl.load(DELTA + r * Tq + i, i < Tq, other=0.0)
        p = tl.exp2(s * to_base_2 - lse[None, :])
        if MASKED:
            start = None
            if START is not None:
                start = _starts(START, i, Tq, stride_st)[None, :]
            p = tl.where(_visible(i[None, :], j[:, None], start, Tk, past, window, CAUSAL, WINDOW), p, 0.0)
        dy = _load_rows(DY + tl.cast(r, tl.int64) * stride_dh, m0, Tq, stride_dt, BLOCK_M, D, BLOCK_D, True)
        dp = tl.dot(v, tl.trans(dy), input_precision=PRECISION)
        if DROPOUT:
            kept = _keep((row + r * Tq + i)[None, :], j[:, None], Tk, seed, threshold)
            dp = tl.where(kept, dp * keep_scale, 0.0)
            dv = tl.dot(tl.where(kept, p * keep_scale, 0.0).to(dy.dtype), dy, dv, input_precision=PRECISION)
        else:
            dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        if SOFTCAP:
            ds = ds * (1 - tanh_s * tanh_s)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["stride_sb", "Tq", "Tk", "G", "window", "threshold"])
def _backward_keys(
    Q, K, V, DY, START, SEED, LSE, DELTA, DK, DV,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_db,
    stride_dt, stride_dh,
    stride_sb, stride_st, Tq, Tk, window, G, scale, factor, softcap, threshold, keep_scale,
    SIGN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Tk, BLOCK_N)
    bg = tl.program_id(0) // blocks
    n0 = tl.program_id(0) % blocks * BLOCK_N  # the first keys of a causal head have the longest walk, and go first
    b, g = (bg // G).to(tl.int64), (bg % G).to(tl.int64)
    past = Tk - Tq
    j = n0 + tl.arange(0, BLOCK_N)
    if START is not None:
        START += b * stride_sb
    seed = tl.load(SEED) if DROPOUT else 0
    k = _signed(_load_rows(K + b * stride_kb + g * stride_kh, n0, Tk, stride_kt, BLOCK_N, D, BLOCK_D, True), SIGN)
    v = _load_rows(V + b * stride_vb + g * stride_vh, n0, Tk, stride_vt, BLOCK_N, D, BLOCK_D, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    first, whole, tail, last = _query_ranges(
        START, n0, Tq, Tk, past, window, stride_st, CAUSAL, WINDOW, BLOCK_M, BLOCK_N
    )
    head = b * (G * R) + g * R  # the first of the R query heads
    Q += b * stride_qb + g * R * stride_qh
    DY += b * stride_db + g * R * stride_dh
    LSE += head * Tq
    DELTA += head * Tq
    if CAUSAL:
        dk, dv = _backward_keys_part(
            dk, dv, k, v, Q, DY, LSE, DELTA, START, first, whole, j, head * Tq, seed, Tq, Tk, past, window,
            stride_qh, stride_qt, stride_dh, stride_dt, stride_st, factor, softcap, threshold, keep_scale,
            True, CAUSAL, WINDOW, SOFTCAP, DROPOUT, PRECISION, R, D, BLOCK_D, BLOCK_M,
        )  # fmt: skip
    dk, dv = _backward_keys_part(
        dk, dv, k, v, Q, DY, LSE, DELTA, START, whole, tail, j, head * Tq, seed, Tq, Tk, past, window,
        stride_qh, stride_qt, stride_dh, stride_dt, stride_st, factor, softcap, threshold, keep_scale,
        False, CAUSAL, WINDOW, SOFTCAP, DROPOUT, PRECISION, R, D, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    dk, dv = _backward_keys_part(
        dk, dv, k, v, Q, DY, LSE, DELTA, START, tail, last, j, head * Tq, seed, Tq, Tk, past, window,
        stride_qh, stride_qt, stride_dh, stride_dt, stride_st, factor, softcap, threshold, keep_scale,
        True, CAUSAL, WINDOW, SOFTCAP, DROPOUT, PRECISION, R, D, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    _store_rows(DK + (b * Tk * G + g) * D, dk * scale, n0, Tk, G * D, BLOCK_N, D, BLOCK_D)
    _store_rows(DV + (b * Tk * G + g) * D, dv, n0, Tk, G * D, BLOCK_N, D, BLOCK_D)


@triton.jit
def _backward_queries_part(
    dq, q, dy, lse, delta, K, V, begin, end, i, row, start, seed, Tk, past, window, stride_kt, stride_vt,
    factor, softcap, threshold, keep_scale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Walk the key tiles in [begin, end)."""
    for n0 in range(begin, end, BLOCK_N):
        j = n0 + tl.arange(0, BLOCK_N)
        k = _load_rows(K, n0, Tk, stride_kt, BLOCK_N, D, BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SOFTCAP:
            tanh_s = tanh(s * (factor / softcap))
            s = softcap * tanh_s
            to_base_2 = LOG2E
        else:
            to_base_2 = factor
        p = tl.exp2(s * to_base_2 - lse[:, None])
        if MASKED:
            p = tl.where(_visible(i[:, None], j[None, :], start, Tk, past, window, CAUSAL, WINDOW), p, 0.0)
        v = _load_rows(V, n0, Tk, stride_vt, BLOCK_N, D, BLOCK_D, MASKED)
        dp = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            dp = tl.where(_keep(row[:, None], j[None, :], Tk, seed, threshold), dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds = ds * (1 - tanh_s * tanh_s)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["stride_sb", "Tq", "Tk", "H", "window", "threshold"])
def _backward_queries(
    Q, K, V, DY, START, SEED, LSE, DELTA, DQ,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_db,
    stride_dt, stride_dh,
    stride_sb, stride_st, Tq, Tk, window, H, scale, factor, softcap, threshold, keep_scale,
    SIGN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Tq, BLOCK_M)
    bh = tl.program_id(0) // blocks
    m0 = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    K += b * stride_kb + (h // R) * stride_kh
    V += b * stride_vb + (h // R) * stride_vh
    past = Tk - Tq
    i = m0 + tl.arange(0, BLOCK_M)
    row = bh * Tq + i
    start = None
    if START is not None:
        START += b * stride_sb
        start = _starts(START, i, Tq, stride_st)[:, None]
    seed = tl.load(SEED) if DROPOUT else 0
    q = _signed(_load_rows(Q + b * stride_qb + h * stride_qh, m0, Tq, stride_qt, BLOCK_M, D, BLOCK_D, True), SIGN)
    dy = _load_rows(DY + b * stride_db + h * stride_dh, m0, Tq, stride_dt, BLOCK_M, D, BLOCK_D, True)
    lse = tl.load(LSE + bh.to(tl.int64) * Tq + i, i < Tq, other=float("inf"))
    delta = tl.load(DELTA + bh.to(tl.int64) * Tq + i, i < Tq, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    first, whole, tail, last = _key_ranges(START, m0, Tq, Tk, past, window, stride_st, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    if WINDOW or START is not None:
        dq = _backward_queries_part(
            dq, q, dy, lse, delta, K, V, first, whole, i, row, start, seed, Tk, past, window, stride_kt, stride_vt,
            factor, softcap, threshold, keep_scale, True, CAUSAL, WINDOW, SOFTCAP, DROPOUT, PRECISION, D, BLOCK_D,
            BLOCK_N,
        )  # fmt: skip
    dq = _backward_queries_part(
        dq, q, dy, lse, delta, K, V, whole, tail, i, row, start, seed, Tk, past, window, stride_kt, stride_vt,
        factor, softcap, threshold, keep_scale, False, CAUSAL, WINDOW, SOFTCAP, DROPOUT, PRECISION, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    dq = _backward_queries_part(
        dq, q, dy, lse, delta, K, V, tail, last, i, row, start, seed, Tk, past, window, stride_kt, stride_vt,
        factor, softcap, threshold, keep_scale, True, CAUSAL, WINDOW, SOFTCAP, DROPOUT, PRECISION, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    _store_rows(DQ + (b * Tq * H + h) * D, dq * scale, m0, Tq, H * D, BLOCK_M, D, BLOCK_D)


# ----------------------------------------------------------------------------------------------------------- launchers


_forward_kernel, _delta_kernel = launch.Kernel(_forward), launch.Kernel(_delta)
_backward_keys_kernel, _backward_queries_kernel = launch.Kernel(_backward_keys), launch.Kernel(_backward_queries)


class Config(NamedTuple):
    """BLOCK_M queries by BLOCK_N keys a tile, on num_warps warps, num_stages tiles of the walk in flight."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


# (kernel, family, largest D) → tile, for 16-bit inputs: the largest that compiles without spills (kernels/aot.py says)
TILES = {
    ("forward", "ampere", 64): Config(128, 64, 8, 3),
    ("forward", "hopper", 64): Config(128, 64, 8, 3),
    ("forward", "blackwell", 64): Config(128, 64, 8, 3),
    ("forward", "ampere", 128): Config(128, 64, 8, 3),
    ("forward", "hopper", 128): Config(128, 64, 8, 3),
    ("forward", "blackwell", 128): Config(128, 64, 8, 3),
    ("forward", "ampere", 256): Config(64, 32, 8, 2),
    ("forward", "hopper", 256): Config(64, 32, 8, 2),
    ("forward", "blackwell", 256): Config(64, 32, 8, 2),
    ("backward_keys", "ampere", 64): Config(32, 128, 8, 2),
    ("backward_keys", "hopper", 64): Config(64, 64, 4, 2),
    ("backward_keys", "blackwell", 64): Config(64, 64, 8, 2),
    ("backward_keys", "ampere", 128): Config(32, 64, 8, 2),  # with 4 warps Triton 3.6 spills
    ("backward_keys", "hopper", 128): Config(32, 128, 8, 2),
    ("backward_keys", "blackwell", 128): Config(32, 64, 8, 2),
    ("backward_keys", "ampere", 256): Config(32, 32, 8, 1),
    ("backward_keys", "hopper", 256): Config(32, 32, 8, 1),
    ("backward_keys", "blackwell", 256): Config(32, 64, 8, 1),
    ("backward_queries", "ampere", 64): Config(64, 64, 4, 2),
    ("backward_queries", "hopper", 64): Config(64, 64, 4, 3),
    ("backward_queries", "blackwell", 64): Config(64, 64, 4, 2),
    ("backward_queries", "ampere", 128): Config(64, 32, 4, 2),
    ("backward_queries", "hopper", 128): Config(64, 64, 8, 2),
    ("backward_queries", "blackwell", 128): Config(64, 64, 8, 2),
    ("backward_queries", "ampere", 256): Config(32, 32, 8, 1),
    ("backward_queries", "hopper", 256): Config(32, 32, 8, 1),
    ("backward_queries", "blackwell", 256): Config(64, 32, 8, 1),
}  # fmt: skip


# where features need registers that the tile above does not leave: "mask" is documents or a window, "several" more than
# one feature, "" none as well. sm_86 is sm_89 too, and sm_120 all of sm_12x
SMALLER = {
    ("forward", "sm_120", 128, "dropout"): Config(128, 32, 8, 3),
    ("backward_keys", "sm_120", 64, "softcap"): Config(32, 32, 4, 2),
    ("backward_queries", "sm_86", 128, ""): Config(64, 32, 8, 2),
    ("backward_queries", "sm_86", 256, ""): Config(32, 32, 8, 2),
    ("forward", "ampere", 128, "mask"): Config(128, 32, 8, 3),
    ("forward", "ampere", 128, "softcap"): Config(128, 32, 8, 3),
    ("forward", "hopper", 128, "dropout"): Config(128, 32, 8, 3),
    ("forward", "hopper", 256, "several"): Config(32, 32, 8, 2),
    ("backward_keys", "hopper", 64, "several"): Config(64, 64, 8, 2),
    ("backward_keys", "hopper", 128, "several"): Config(32, 64, 8, 2),
    ("backward_keys", "blackwell", 64, "mask"): Config(32, 64, 8, 2),
    ("backward_queries", "ampere", 64, "mask"): Config(64, 32, 4, 2),
    ("backward_queries", "ampere", 64, "softcap"): Config(64, 32, 4, 2),
    ("backward_queries", "ampere", 64, "dropout"): Config(64, 32, 4, 2),
    ("backward_queries", "hopper", 128, "several"): Config(64, 32, 8, 2),
    ("backward_queries", "blackwell", 128, "softcap"): Config(64, 32, 8, 2),
    ("backward_queries", "blackwell", 128, "several"): Config(64, 16, 8, 2),
}


@launch.tuned
def config(kernel: str, arch: int, D: int, dtype: torch.dtype, features: Sequence[str] = ()) -> Config:
    """The tile of ``kernel``: "forward", "backward_keys" or "backward_queries"; features: "mask", "softcap", "dropout".

    fp32 multiplies without tensor cores, in small tiles: a thread holds whole rows of both operands, D numbers each.
    """
    if dtype == torch.float32:
        if D <= 64:
            return Config(32, 32, 8, 1)
        return Config(16, 32 if D <= 128 and kernel == "forward" else 16, 8, 1)
    # what the tensor cores are: mma, warp-group mma, tcgen05; sm_120 has mma again
    family = "hopper" if arch // 10 == 9 else "blackwell" if arch // 10 in (10, 11) else "ampere"
    board = "sm_86" if arch in (86, 89) else "sm_120" if arch // 10 == 12 else family
    width = 64 if D <= 64 else 128 if D <= 128 else 256
    for where in (board, family):
        for feature in ("several", *features, "") if len(features) > 1 else (*features, ""):
            if (kernel, where, width, feature) in SMALLER:
                return SMALLER[kernel, where, width, feature]
    return TILES[kernel, family, width]


class Plan(NamedTuple):
    """One kernel's launch but for its tensors. BLOCK: rows of a program; numbers: factor, softcap, threshold,
    keep_scale."""

    BLOCK: int
    numbers: tuple[float, float, int, float]
    constants: launch.Constants


@functools.lru_cache(maxsize=1024)  # a call looks its plans up: making one costs as much as a launch
def _plan(
    kernel: str, arch: int, D: int, R: int, dtype: torch.dtype,
    documents: bool, causal: bool, scale: float, window: bool, softcap: float, dropout: float,
) -> Plan:  # fmt: skip
    if not math.isfinite(scale):
        raise ValueError(f"attention takes a finite scale, it is {scale}: every score would be NaN")
    sign = (scale > 0) - (scale < 0)
    factor = abs(scale) if sign else 1.0
    constants = _constants(kernel, arch, D, R, dtype, documents, causal, sign, bool(window), softcap > 0, dropout > 0)
    numbers = (
        float(factor if softcap > 0 else factor * LOG2E.value), float(softcap), int(dropout * 2**32), 1 / (1 - dropout),
    )  # fmt: skip
    return Plan(constants["BLOCK_N" if kernel == "backward_keys" else "BLOCK_M"], numbers, constants)


@functools.cache
def _constants(
    kernel: str, arch: int, D: int, R: int, dtype: torch.dtype,
    documents: bool, causal: bool, sign: int, window: bool, softcap: bool, dropout: bool,
) -> launch.Constants:  # fmt: skip
    present = {"mask": documents or window, "softcap": softcap, "dropout": dropout}
    tile = config(kernel, arch, D, dtype, tuple(name for name, there in present.items() if there))
    return launch.constants(
        SIGN=sign, CAUSAL=causal, WINDOW=window, SOFTCAP=softcap, DROPOUT=dropout,
        PRECISION="ieee" if dtype == torch.float32 else "tf32", R=R, D=D, BLOCK_D=_block_d(D), **tile._asdict(),
    )  # fmt: skip


@functools.cache
def _delta_constants(D: int) -> launch.Constants:
    """16 elements a thread of y and of dy: with 32 ptxas spills one register on this or that architecture."""
    BLOCK_M = min(max(2048 // _block_d(D), 16), MAX_ROWS)
    return launch.constants(D=D, BLOCK_D=_block_d(D), BLOCK_M=BLOCK_M, num_warps=4)


def _block_d(D: int) -> int:
    return max(launch.power_of_two(D), 16)


def _dense(x: Tensor) -> Tensor:
    """x itself where the kernels read it in place: its last axis is dense, and a tile's offsets fit in 32 bits."""
    stride = x.stride()
    if (stride[3] == 1 or x.shape[3] == 1) and stride[1] * MAX_ROWS < 2**31:
        return x
    return x.contiguous()


def forward(
    q: Tensor, k: Tensor, v: Tensor, seq_start: Tensor | None, seed: Tensor | None,
    causal: bool, scale: float, window: int, softcap: float, dropout: float, natural: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, lse in base 2, +∞ for blind rows); ``natural`` (B, H, Tq) fp32 is filled with attention_lse's lse."""
    _check(q, k, v, seq_start, seed, softcap, dropout)
    q, k, v = _dense(q), _dense(k), _dense(v)
    B, Tq, H, D = q.shape
    Tk, G = k.shape[1], k.shape[2]
    y = torch.empty(B, Tq, H, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, Tq, dtype=torch.float32, device=q.device)
    if y.numel() == 0:
        return y, lse
    qb, qt, qh, _ = q.stride()
    kb, kt, kh, _ = k.stride()
    vb, vt, vh, _ = v.stride()
    sb, st = (0, 0) if seq_start is None else seq_start.stride()
    with launch.on_device(q):
        plan = _plan(
            "forward", launch.arch(), D, H // G, q.dtype, seq_start is not None, causal, scale, window > 0, softcap,
            dropout,
        )  # fmt: skip
        _forward_kernel(
            (B * H * -(-Tq // plan.BLOCK),), plan.constants,
            q, k, v, seq_start, seed, y, lse, natural, qb, qt, qh, kb, kt, kh, vb, vt, vh, sb, st, Tq, Tk,
            min(window, Tk), H, *plan.numbers,
        )  # fmt: skip
    return y, lse


def backward(
    dy: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, seq_start: Tensor | None, seed: Tensor | None,
    y: Tensor, lse: Tensor, causal: bool, scale: float, window: int, softcap: float, dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv). y, lse: what forward gave. dlse (B, H, Tq), any strides: the gradient of attention_lse's lse."""
    q, k, v, dy = _dense(q), _dense(k), _dense(v), _dense(dy)
    B, Tq, H, D = q.shape
    Tk, G = k.shape[1], k.shape[2]
    dq, dk, dv = allocate_gradients(q, k, v)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    options = (D, H // G, q.dtype, seq_start is not None, causal, scale, window > 0, softcap, dropout)
    delta = torch.empty(B, H, Tq, dtype=torch.float32, device=q.device)
    db, dt, dh, _ = dy.stride()
    lb, lh, lt = (0, 0, 0) if dlse is None else dlse.stride()
    strides = (
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], db, dt, dh,
        *((0, 0) if seq_start is None else seq_start.stride()), Tq, Tk, min(window, Tk),
    )  # fmt: skip
    with launch.on_device(q):
        arch = launch.arch()
        keys, queries = _plan("backward_keys", arch, *options), _plan("backward_queries", arch, *options)
        of_delta = _delta_constants(D)
        _delta_kernel(
            (B * H * -(-Tq // of_delta["BLOCK_M"]),), of_delta, y, dy, lse, dlse, delta, db, dt, dh, lb, lh, lt, Tq, H
        )  # fmt: skip
        _backward_keys_kernel(
            (B * G * -(-Tk // keys.BLOCK),), keys.constants,
            q, k, v, dy, seq_start, seed, lse, delta, dk, dv, *strides, G, float(scale), *keys.numbers,
        )  # fmt: skip
        _backward_queries_kernel(
            (B * H * -(-Tq // queries.BLOCK),), queries.constants,
            q, k, v, dy, seq_start, seed, lse, delta, dq, *strides, H, float(scale), *queries.numbers,
        )  # fmt: skip
    return dq, dk, dv


def allocate_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    return dq, dk, dv


def _check(
    q: Tensor, k: Tensor, v: Tensor, seq_start: Tensor | None, seed: Tensor | None, softcap: float, dropout: float
) -> None:
    launch.require_dtype("attention", q=q, k=k, v=v)
    check_options(softcap, dropout)
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            "attention takes q (B, Tq, H, D) and k, v (B, Tk, G, D); "
            f"they are {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    B, Tq, H, D = q.shape
    G = k.shape[2]
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != D or (H % G if G else H):
        raise ValueError(
            "attention takes q (B, Tq, H, D) and k, v (B, Tk, G, D) with H a multiple of G; "
            f"they are {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"attention takes q, k and v of one dtype; they are {q.dtype}, {k.dtype} and {v.dtype}")
    if reason := _width(D):
        raise ValueError(f"attention in Triton: {reason}")
    if seq_start is not None and seq_start.shape != (B, Tq):
        raise ValueError(f"attention takes seq_start of shape (B, Tq) = ({B}, {Tq}); it is {tuple(seq_start.shape)}")
    if seq_start is not None and seq_start.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"attention takes seq_start in int32, key positions; it is {seq_start.dtype}")
    if dropout > 0 and seed is None:
        raise ValueError("attention with dropout needs a seed tensor, or the result could not be repeated")


def _width(D: int) -> str | None:
    if D % 8 or not 8 <= D <= MAX_D:
        return f"the head width must be a multiple of 8 up to {MAX_D}, it is {D}; choose reference"
    return None


# ------------------------------------------------------------------------------------------------------------- autograd


def _forward_alone(
    q: Tensor, k: Tensor, v: Tensor, seq_start: Tensor | None, seed: Tensor | None,
    causal: bool, scale: float, window: int, softcap: float, dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return forward(q, k, v, seq_start, seed, causal, scale, window, softcap, dropout)


def _backward_alone(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, seq_start: Tensor | None, seed: Tensor | None, y: Tensor, lse: Tensor,
    causal: bool, scale: float, window: int, softcap: float, dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return backward(dy, None, q, k, v, seq_start, seed, y, lse, causal, scale, window, softcap, dropout)


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, seq_start: Tensor | None, seed: Tensor | None,
    causal: bool, scale: float, window: int, softcap: float, dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, Tq, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, Tq), dtype=torch.float32)


def _fake_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, seq_start: Tensor | None, seed: Tensor | None, y: Tensor, lse: Tensor,
    causal: bool, scale: float, window: int, softcap: float, dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return allocate_gradients(q, k, v)


def _pairs(Tq: int, Tk: int, causal: bool, window: int) -> float:
    """Visible (query, key) pairs as model FLOPs count them: the area, so that a causal square is half of a full one."""
    if not causal:
        return Tq * Tk

    def seen(T: float) -> float:  # ∫₀ᵀ min(p, window) dp
        return T * T / 2 if window <= 0 or window >= T else window * window / 2 + window * (T - window)

    return seen(Tk) - seen(max(Tk - Tq, 0))


def flops(
    q_shape: torch.Size, k_shape: torch.Size, v_shape: torch.Size, seq_start: object, seed: object, causal: bool,
    scale: float,
    window: int, *args: object, out_shape: object = None, **kwargs: object,
) -> int:  # fmt: skip
    """The two GEMMs over the visible pairs; documents are not known to a formula and count as one."""
    B, Tq, H, D = q_shape
    return int(4 * B * H * D * _pairs(Tq, k_shape[1], causal, window))


def _flops_backward(
    dy_shape: torch.Size, q_shape: torch.Size, k_shape: torch.Size, v_shape: torch.Size, seq_start: object,
    seed: object, y_shape: object,
    lse_shape: object, causal: bool, scale: float, window: int, *args: object, out_shape: object = None,
    **kwargs: object,
) -> int:  # fmt: skip
    """Four GEMMs: dv, dp, dq and dk. Recomputing the scores is a cost of this algorithm, not work of the model, and
    is not counted."""
    return 2 * flops(q_shape, k_shape, v_shape, seq_start, seed, causal, scale, window)


_attention = differentiable(
    "attention_triton",
    forward=_forward_alone,
    backward=_backward_alone,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=lambda args, results: (*args[:5], *results, *args[5:]),
    gradients=(0, 1, 2),
    flops=flops,
    flops_backward=_flops_backward,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_start: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """q (B, Tq, H, D), k and v (B, Tk, G, D), strided views read in place → (B, Tq, H, D) in q's dtype; the options
    are the reference's."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _attention(q, k, v, seq_start, seed, causal, scale, window, softcap, dropout)


def unsupported(site: Site) -> str | None:
    return launch.unsupported(site) or (_width(site.shape["D"]) if "D" in site.shape else None)
