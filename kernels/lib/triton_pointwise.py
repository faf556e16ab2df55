"""Activations of the MLP in Triton: of one operand (gelu, relu2), or of a gate that multiplies another (swiglu, geglu).

Mathematics. σ(z) = 1/(1 + e⁻ᶻ), Φ and φ the normal distribution and density:

    activation   a(x)                                    a'(x)
    silu         x σ(x)                                  σ(x) + x σ'(x)
    gelu_tanh    x σ(2u)  (= x(1 + tanh u)/2)            σ(2u) + x σ'(2u)·2u'
                 u = √(2/π)(x + 0.044715 x³)             2u' = √(2/π)(2 + 0.26829 x²)
    gelu_erf     x Φ(x)                                  Φ(x) + x φ(x)
    relu2        max(x, 0)²                              2 max(x, 0)

    one operand:  y = a(x)           dx = dy a'(x)
    gated:        y = a(gate)·up     dgate = dy up a'(gate)     dup = dy a(gate)

All in fp32. With e = exp(-|z|), which is 1 at most, σ(z) is 1/(1 + e) or e/(1 + e), and σ'(z) = e/(1 + e)²: nothing
cancels in either tail and nothing overflows, so that no finite x gives ∞·0 or ∞ - ∞. NaN stays NaN.

Shapes: N rows (the product of the leading axes) · F width. A program has a tile of rows and columns; rows may lie
apart by any stride, so the two halves of one projection are read where they are; other layouts are copied. Saved: the
operands only, and backward computes a(x) again. Bound: bytes (see the ops' files).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels.lib import triton_launch as launch
from tritium.kernels.lib.triton_math import LOG2E

GELU = {"tanh": "gelu_tanh", "none": "gelu_erf"}  # the op's argument approximate → ACTIVATION
ROOT_2_OVER_PI = tl.constexpr(0.7978845608028654)
ROOT_1_OVER_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _sigmoid(z):
    """σ(z) and σ'(z)."""
    e = tl.exp2(tl.abs(z) * -LOG2E)
    r = 1 / (1 + e)
    return tl.where(z >= 0, r, e * r), e * r * r


@triton.jit
def _saturate(x):
    """x within ±32, where σ(2u) is long 0 or 1: so that no power of x overflows. NaN stays."""
    return tl.where(x > 32, 32.0, tl.where(x < -32, -32.0, x))


@triton.jit
def _normal(x):
    """Φ(x) to 2e-7, and to 1e-5 of itself as far as -5, where 1 + erf has cancelled; and φ(x).

    Φ(-|x|) = exp(-x²/2)·t·P(t) with t = 1/(1 + |x|/4); P of degree 6 is a minimax fit whose own error is 7e-9. The
    exponential serves φ too, and gelu's forward takes 29 instructions an element for 37 with erf, where a processor has
    about 38 while the memory brings a 16-bit one.
    """
    t = 1 / (1 + 0.25 * tl.abs(x))
    p = 0.34737363370318364 + t * -0.09293233527155409
    p = 0.2901137143985035 + t * (-0.2770515337723369 + t * p)
    p = 0.0987469800035792 + t * (0.11314081330225456 + t * (0.02060872081744075 + t * p))
    e = tl.exp2(x * x * (-0.5 * LOG2E))
    tail = e * t * p
    return tl.where(x >= 0, 1 - tail, tail), e * ROOT_1_OVER_2PI


@triton.jit
def _value_and_slope(x, ACTIVATION: tl.constexpr):
    """a(x) and a'(x)."""
    if ACTIVATION == "silu":
        s, ds = _sigmoid(x)
        value, slope = x * s, s + x * ds
    elif ACTIVATION == "gelu_tanh":
        z = _saturate(x)
        s, ds = _sigmoid(z * (2 * ROOT_2_OVER_PI) * (1 + 0.044715 * z * z))
        value, slope = x * s, s + z * ds * (ROOT_2_OVER_PI * (2 + 0.26829 * z * z))
    elif ACTIVATION == "gelu_erf":
        distribution, density = _normal(x)
        value, slope = x * distribution, distribution + x * density
    else:
        tl.static_assert(ACTIVATION == "relu2")
        positive = tl.where(x <= 0, 0.0, x)
        value, slope = positive * positive, 2 * positive
    return value, slope


@triton.jit
def _tile(N, F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr):
    """(rows, columns, mask) of this program: a row's tiles follow one another. Without a remainder of columns the mask
    is the same along a row, which leaves loads wide."""
    tiles: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    program = tl.program_id(0)
    rows = (program // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    tile = program % tiles
    if F >= 2**31:
        tile = tile.to(tl.int64)
    columns = tile * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    mask = rows < N
    if F % BLOCK_F != 0:
        mask = mask & (columns < F)
    return rows, columns, mask


@triton.jit(do_not_specialize=["N"])
def _unary_forward(
    X, Y, stride_x, N, F: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr
):
    rows, columns, mask = _tile(N, F, BLOCK_N, BLOCK_F)
    x = tl.load(X + rows * stride_x + columns, mask, other=0.0).to(tl.float32)
    value, _ = _value_and_slope(x, ACTIVATION)  # the compiler drops what is not used
    tl.store(Y + rows * F + columns, value.to(Y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["N"])
def _unary_backward(
    DY, X, DX, stride_dy, stride_x, N,
    F: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    rows, columns, mask = _tile(N, F, BLOCK_N, BLOCK_F)
    x = tl.load(X + rows * stride_x + columns, mask, other=0.0).to(tl.float32)
    dy = tl.load(DY + rows * stride_dy + columns, mask, other=0.0).to(tl.float32)
    _, slope = _value_and_slope(x, ACTIVATION)
    dx = dy * slope
    if ACTIVATION == "relu2":  # 0 where nothing comes through, of an infinite dy too
        dx = tl.where(x <= 0, 0.0, dx)
    tl.store(DX + rows * F + columns, dx.to(DX.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["N"])
def _gated_forward(
    GATE, UP, Y, stride_gate, stride_up, N,
    F: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    rows, columns, mask = _tile(N, F, BLOCK_N, BLOCK_F)
    gate = tl.load(GATE + rows * stride_gate + columns, mask, other=0.0).to(tl.float32)
    up = tl.load(UP + rows * stride_up + columns, mask, other=0.0).to(tl.float32)
    value, _ = _value_and_slope(gate, ACTIVATION)
    tl.store(Y + rows * F + columns, (value * up).to(Y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["N"])
def _gated_backward(
    DY, GATE, UP, DGATE, DUP, stride_dy, stride_gate, stride_up, N,
    F: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    rows, columns, mask = _tile(N, F, BLOCK_N, BLOCK_F)
    gate = tl.load(GATE + rows * stride_gate + columns, mask, other=0.0).to(tl.float32)
    up = tl.load(UP + rows * stride_up + columns, mask, other=0.0).to(tl.float32)
    dy = tl.load(DY + rows * stride_dy + columns, mask, other=0.0).to(tl.float32)
    value, slope = _value_and_slope(gate, ACTIVATION)
    tl.store(DGATE + rows * F + columns, (dy * up * slope).to(DGATE.dtype.element_ty), mask)
    tl.store(DUP + rows * F + columns, (dy * value).to(DUP.dtype.element_ty), mask)


# ----------------------------------------------------------------------------------------------------------- launchers


class Config(NamedTuple):
    """A tile of BLOCK_N rows and BLOCK_F columns, worked on by num_warps warps."""

    BLOCK_N: int
    BLOCK_F: int
    num_warps: int


@launch.tuned
def config(F: int, itemsize: int) -> Config:
    """The tile: 32 bytes a thread of each operand, two wide loads, which with 8 or more programs a processor keeps
    64 KB in flight there; and a width that divides F where a power of two of 128 or more does, or else leaves the
    fewest columns over."""
    num_warps = 4
    elements = num_warps * 32 * 32 // itemsize
    BLOCK_F = block_of(F, elements, 128)
    return Config(elements // BLOCK_F, BLOCK_F, num_warps)


_unary_forward_kernel, _unary_backward_kernel = launch.Kernel(_unary_forward), launch.Kernel(_unary_backward)
_gated_forward_kernel, _gated_backward_kernel = launch.Kernel(_gated_forward), launch.Kernel(_gated_backward)


@cache
def _plan(F: int, itemsize: int, activation: str) -> tuple[int, int, launch.Constants]:
    """Rows of a tile, tiles of a row, and what the kernels are compiled with."""
    tile = config(F, itemsize)
    constants = launch.constants(F=F, ACTIVATION=activation, **tile._asdict())
    return tile.BLOCK_N, launch.cdiv(F, tile.BLOCK_F), constants


def block_of(width: int, most: int, least: int) -> int:
    """The power of two from ``least`` to ``most`` whose multiple goes the least beyond width, the largest of equals;
    the next power of two from width where that is smaller than ``least``."""
    block = best = min(launch.power_of_two(width), most)
    while block > least:
        block //= 2
        if -width % block < -width % best:
            best = block
    return best


def width_of(x: Tensor) -> int:
    """The width of x (..., F), not empty, for the kernels, which are compiled for it. A vector may have any length, so
    it is taken as rows of a power of two: of 128 to 4096 where one divides its length, else of 1."""
    if x.dim() > 1:
        return x.shape[-1]
    width = min(x.numel() & -x.numel(), 4096)
    return width if width >= 128 else 1


def rows_of(x: Tensor, F: int) -> tuple[Tensor, int]:
    """x (..., F), not empty, as rows with a dense last axis: a tensor that begins at the first one, and the elements
    from one to the next. A view where the strides allow, else a contiguous copy."""
    if x.is_contiguous():
        return x, F
    x = launch.unit_stride(x.reshape(-1, F))
    return x, x.stride(0)


def unary_forward(x: Tensor, activation: str) -> Tensor:
    """a(x), contiguous, of x's shape and dtype."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    size = x.numel()
    if size > 0:
        F = width_of(x)
        N = size // F
        block, tiles, constants = _plan(F, x.element_size(), activation)
        x, stride = rows_of(x, F)
        with launch.on_device(x):
            _unary_forward_kernel((launch.cdiv(N, block) * tiles,), constants, x, y, stride, N)
    return y


def unary_backward(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    """dx, contiguous, of x's shape and dtype."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    size = x.numel()
    if size > 0:
        F = width_of(x)
        N = size // F
        block, tiles, constants = _plan(F, x.element_size(), activation)
        (x, stride), (dy, stride_dy) = rows_of(x, F), rows_of(dy, F)
        with launch.on_device(x):
            _unary_backward_kernel((launch.cdiv(N, block) * tiles,), constants, dy, x, dx, stride_dy, stride, N)
    return dx


def gated_forward(op: str, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """a(gate)·up, contiguous, of gate's shape and dtype. op: the name to raise under."""
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(
            f"{op} takes gate and up of one shape and dtype, they are {tuple(gate.shape)} {gate.dtype} and "
            f"{tuple(up.shape)} {up.dtype}; expand or cast one of them"
        )
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    size = gate.numel()
    if size > 0:
        F = width_of(gate)
        N = size // F
        block, tiles, constants = _plan(F, gate.element_size(), activation)
        (gate, stride_gate), (up, stride_up) = rows_of(gate, F), rows_of(up, F)
        with launch.on_device(gate):
            _gated_forward_kernel(
                (launch.cdiv(N, block) * tiles,), constants, gate, up, y, stride_gate, stride_up, N
            )  # fmt: skip
    return y


def gated_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(dgate, dup), contiguous."""
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty_like(dgate)
    size = gate.numel()
    if size > 0:
        F = width_of(gate)
        N = size // F
        block, tiles, constants = _plan(F, gate.element_size(), activation)
        (gate, stride_gate), (up, stride_up), (dy, stride_dy) = rows_of(gate, F), rows_of(up, F), rows_of(dy, F)
        with launch.on_device(gate):
            _gated_backward_kernel(
                (launch.cdiv(N, block) * tiles,), constants,
                dy, gate, up, dgate, dup, stride_dy, stride_gate, stride_up, N,
            )  # fmt: skip
    return dgate, dup


def gelu_activation(op: str, approximate: str) -> str:
    """ACTIVATION for gelu's and geglu's argument."""
    if approximate not in GELU:
        raise ValueError(f"{op}: approximate must be 'tanh' or 'none', not {approximate!r}")
    return GELU[approximate]


def fake_like(x: Tensor) -> Tensor:
    """What the launchers allocate for x: contiguous, whatever x's strides."""
    return x.new_empty(x.shape)
