"""rope in Triton: q and k in one launch; backward is the same kernel turning the other way.

Mathematics, for channel d < R/2 of any head, with the angle's cos and sin at (t, d), or (b, t, d):
    y_d = x_d cos - x_(d+R/2) sin        y_(d+R/2) = x_(d+R/2) cos + x_d sin        y_e = x_e for e ≥ R
A rotation's gradient is the rotation by the opposite angle: dx = the same of dy with -sin. cos and sin get none.

Shapes: q (B, T, H, D), k (B, T, G, D), of any strides with a dense last axis, so q and k may be parts of one
projection; cos and sin (T, R/2) or (B, T, R/2); N = B·T tokens. A program turns a few heads of a few tokens, with cos
and sin read once for its heads; the programs of a token's heads, q's and then k's, follow one another. Saved: cos and
sin, which are the caller's own.

Bytes, for elements of b bytes: forward and backward 2·b·N·(H + G)·D, and cos and sin, 8·N·R/2 at most; 3 FLOPs an
element: the bound is memory bandwidth.
"""

from __future__ import annotations

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


@triton.jit
def _turn_heads(
    X, Y, COS, SIN, row, angle, real, first, stride_head, n,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of X from ``first``, for the tokens n (BLOCK_N,), of which some are real; row and angle: where
    their elements and their angles begin."""
    heads = first + tl.arange(0, BLOCK_H)[None, :, None]
    mask = real[:, None, None]
    if H % BLOCK_H != 0:
        mask = mask & (heads < H)
    X += row[:, None, None] + heads.to(tl.int64) * stride_head
    Y += (n[:, None, None] * H + heads) * D
    if HALF > 0:
        columns = tl.arange(0, BLOCK_HALF)
        turned, known = mask, real[:, None]
        if HALF != BLOCK_HALF:
            turned = mask & (columns < HALF)[None, None, :]
            known = known & (columns < HALF)[None, :]
        a = tl.load(X + columns[None, None, :], turned, other=0.0).to(tl.float32)
        b = tl.load(X + (columns[None, None, :] + HALF), turned, other=0.0).to(tl.float32)
        cos = tl.load(COS + angle[:, None] + columns[None, :], known, other=0.0).to(tl.float32)[:, None, :]
        sin = tl.load(SIN + angle[:, None] + columns[None, :], known, other=0.0).to(tl.float32)[:, None, :]
        if INVERSE:
            sin = -sin
        element = Y.dtype.element_ty
        tl.store(Y + columns[None, None, :], (a * cos - b * sin).to(element), turned)
        tl.store(Y + (columns[None, None, :] + HALF), (b * cos + a * sin).to(element), turned)
    if D > 2 * HALF:
        columns = 2 * HALF + tl.arange(0, BLOCK_REST)[None, None, :]
        if D - 2 * HALF != BLOCK_REST:
            mask = mask & (columns < D)
        tl.store(Y + columns, tl.load(X + columns, mask), mask)


@triton.jit(do_not_specialize=["N", "T"])
def _turn(
    Q, K, COS, SIN, Q_OUT, K_OUT,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_ab, stride_at, N, T,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    of_q: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    of_k: tl.constexpr = (G + BLOCK_G - 1) // BLOCK_G
    program = tl.program_id(0)
    group = program % (of_q + of_k)
    tokens = program // (of_q + of_k) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = tokens < N
    b, t, n = (tokens // T).to(tl.int64), (tokens % T).to(tl.int64), tokens.to(tl.int64)
    angle = b * stride_ab + t * stride_at
    if group < of_q:
        _turn_heads(
            Q, Q_OUT, COS, SIN, b * stride_qb + t * stride_qt, angle, real, group * BLOCK_H, stride_qh, n, H,
            D, HALF, INVERSE, BLOCK_H, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        _turn_heads(
            K, K_OUT, COS, SIN, b * stride_kb + t * stride_kt, angle, real, (group - of_q) * BLOCK_G, stride_kh, n, G,
            D, HALF, INVERSE, BLOCK_G, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- launchers


class Config(NamedTuple):
    """A tile is BLOCK_N tokens, BLOCK_H heads of q (BLOCK_G of k), and their channels: BLOCK_HALF on either side of
    R/2, and BLOCK_REST that do not turn. num_warps warps work on it."""

    BLOCK_N: int
    BLOCK_H: int
    BLOCK_G: int
    BLOCK_HALF: int
    BLOCK_REST: int
    num_warps: int


@launch.tuned
def config(H: int, G: int, D: int, half: int, itemsize: int) -> Config:
    """The tile: 32 bytes a thread of either half, and up to 8 heads that share an angle."""
    num_warps = 4
    BLOCK_HALF, BLOCK_REST = launch.power_of_two(max(half, 1)), launch.power_of_two(max(D - 2 * half, 1))
    rows = max(num_warps * 32 * 32 // itemsize // max(BLOCK_HALF, BLOCK_REST // 2), 1)
    BLOCK_H, BLOCK_G = (pointwise.block_of(heads, min(rows, 8), 4) for heads in (H, G))
    return Config(max(rows // max(BLOCK_H, BLOCK_G), 1), BLOCK_H, BLOCK_G, BLOCK_HALF, BLOCK_REST, num_warps)


_turn_kernel = launch.Kernel(_turn)


@cache
def _plan(H: int, G: int, D: int, half: int, itemsize: int, inverse: bool) -> tuple[int, int, launch.Constants]:
    """Tokens of a tile, tiles of a token, and what the kernel is compiled with."""
    tile = config(H, G, D, half, itemsize)
    constants = launch.constants(H=H, G=G, D=D, HALF=half, INVERSE=inverse, **tile._asdict())
    return tile.BLOCK_N, launch.cdiv(H, tile.BLOCK_H) + launch.cdiv(G, tile.BLOCK_G), constants


def _launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    B, T, H, D = q.shape
    G, half = k.shape[2], cos.shape[-1]
    if B * T * D * (H + G) > 0:
        block, groups, constants = _plan(H, G, D, half, q.element_size(), inverse)
        q, k = launch.unit_stride(q), launch.unit_stride(k)
        cos, sin = launch.unit_stride(cos), launch.unit_stride(sin)
        if cos.stride() != sin.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
        with launch.on_device(q):
            _turn_kernel(
                (launch.cdiv(B * T, block) * groups,), constants,
                q, k, cos, sin, q_out, k_out, *q.stride()[:3], *k.stride()[:3],
                cos.stride(0) if cos.dim() == 3 else 0, cos.stride(-2), B * T, T,
            )  # fmt: skip
    return q_out, k_out


def _launch_forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    launch.require_dtype("rope", q=q, k=k, cos=cos, sin=sin)
    B, T, _, D = q.shape
    if k.dim() != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (B, T, D) or k.dtype != q.dtype:
        raise ValueError(
            f"rope takes q (B, T, H, D) and k (B, T, G, D) of one dtype, they are {tuple(q.shape)} {q.dtype} and "
            f"{tuple(k.shape)} {k.dtype}"
        )
    if cos.shape != sin.shape or cos.shape[:-1] not in ((T,), (B, T)) or 2 * cos.shape[-1] > D:
        raise ValueError(
            f"rope takes cos and sin (T, R/2) or (B, T, R/2) with R ≤ D: here B = {B}, T = {T}, D = {D}, they are "
            f"{tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    return _launch(q, k, cos, sin, False)


def _launch_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _launch(dq, dk, cos, sin, True)


# ------------------------------------------------------------------------------------------------------------- autograd


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


_rope = differentiable(
    "rope_triton",
    forward=_launch_forward,
    backward=_launch_backward,
    fake_forward=_fake,
    fake_backward=_fake,
    save=lambda args, results: args[2:],
    gradients=(0, 1),
    outputs=2,
)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, T, H, D), k (B, T, G, D), cos and sin (T, R/2) or (B, T, R/2) with R ≤ D → rotated (q, k).

    The first R channels turn, the rest pass through; computed in fp32, returned in the inputs' dtype.
    """
    return _rope(q, k, cos, sin)


def unsupported(site: Site) -> str | None:
    return launch.unsupported(site)
