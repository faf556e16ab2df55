"""layer_norm in Triton: one pass forward, one pass backward and a small reduction.

Mathematics, per row, with mean and variance over its C elements:
    r = 1/√(var + eps)        x̂ = (x - mean)·r        y = x̂·weight + bias
    g = dy·weight             dx = r·(g - mean(g) - x̂·mean(g·x̂))
    dweight = Σ_rows dy·x̂     dbias = Σ_rows dy

Shapes: N rows (the product of the leading axes), C width, P programs of the backward.

Forward: a program reads BLOCK_N whole rows, keeps them in registers and takes mean and variance in two passes,
    in fp32. Saved: mean and r, (N,) fp32, 8 bytes a row; backward then reads x and dy once.
Backward: P programs, a fixed number per processor, each walk every P-th block of rows and keep their share of dweight
    and dbias in fp32 registers; one row per program goes to memory and a second kernel adds the P rows. No atomics:
    bitwise repeatable on one GPU model.

Bytes, for elements of b bytes: forward 2·N·C·b, backward 3·N·C·b, plus 16·P·C for the partial sums. About 8 and 14
FLOPs an element: the bound is memory bandwidth.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels.autograd import differentiable
from tritium.kernels.lib import triton_launch as launch
from tritium.kernels.site import Site

DETERMINISTIC = True
MAX_C = 65536  # a row is one tile; beyond this a tile no longer fits the register file even at 1024 threads


@triton.jit(do_not_specialize=["N"])
def _forward(
    X, WEIGHT, BIAS, Y, MEAN, RSTD, stride_x, N, eps, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_C)
    real = (columns < C)[None, :]
    mask = (rows < N)[:, None] & real
    x = tl.load(X + rows.to(tl.int64)[:, None] * stride_x + columns[None, :], mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / C
    centred = tl.where(real, x - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    y = centred * rstd[:, None] * tl.load(WEIGHT + columns, columns < C, other=0.0).to(tl.float32)[None, :]
    if BIAS is not None:
        y += tl.load(BIAS + columns, columns < C, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + rows.to(tl.int64)[:, None] * C + columns[None, :], y.to(Y.dtype.element_ty), mask)
    tl.store(MEAN + rows, mean, rows < N)
    tl.store(RSTD + rows, rstd, rows < N)


@triton.jit(do_not_specialize=["N"])
def _backward(
    DY, X, WEIGHT, MEAN, RSTD, DX, PARTIAL, stride_dy, stride_x, N,
    C: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program, P = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK_C)
    real = columns < C
    weight = tl.load(WEIGHT + columns, real, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((BLOCK_C,), tl.float32)
    dbias = tl.zeros((BLOCK_C,), tl.float32)
    for block in range(program, tl.cdiv(N, BLOCK_N), P):
        rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (rows < N)[:, None] & real[None, :]
        at = rows.to(tl.int64)[:, None]
        dy = tl.load(DY + at * stride_dy + columns[None, :], mask, other=0.0).to(tl.float32)
        x = tl.load(X + at * stride_x + columns[None, :], mask, other=0.0).to(tl.float32)
        mean = tl.load(MEAN + rows, rows < N, other=0.0)[:, None]
        rstd = tl.load(RSTD + rows, rows < N, other=0.0)[:, None]
        xhat = tl.where(mask, (x - mean) * rstd, 0.0)
        g = dy * weight
        mean_g = tl.sum(g, 1)[:, None] / C
        mean_gx = tl.sum(g * xhat, 1)[:, None] / C
        dx = (g - mean_g - xhat * mean_gx) * rstd
        tl.store(DX + at * C + columns[None, :], dx.to(DX.dtype.element_ty), mask)
        dweight += tl.sum(dy * xhat, 0)
        if HAS_BIAS:
            dbias += tl.sum(dy, 0)
    tl.store(PARTIAL + program * C + columns, dweight, real)
    if HAS_BIAS:
        tl.store(PARTIAL + (P + program) * C + columns, dbias, real)


@triton.jit(do_not_specialize=["P"])
def _add_partials(PARTIAL, DWEIGHT, DBIAS, P, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    which = tl.program_id(1)  # 0: dweight, 1: dbias
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = columns < C
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, P, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        at = (which * P + p)[:, None] * C + columns[None, :]
        total += tl.load(PARTIAL + at, (p < P)[:, None] & real[None, :], other=0.0)
    result = tl.sum(total, 0)
    if which == 0:
        tl.store(DWEIGHT + columns, result.to(DWEIGHT.dtype.element_ty), real)
    else:
        tl.store(DBIAS + columns, result.to(DBIAS.dtype.element_ty), real)


# ----------------------------------------------------------------------------------------------------------- launchers


class Config(NamedTuple):
    """A tile is BLOCK_N rows of BLOCK_C columns, worked on by num_warps warps; programs_per_processor: of the
    backward's grid."""

    BLOCK_N: int
    BLOCK_C: int
    num_warps: int
    programs_per_processor: int


def config(C: int, *, backward: bool) -> Config:
    """The tile: whole rows, small ones grouped, so that a thread holds 16 elements of each operand as long as 16
    warps allow."""
    BLOCK_C = launch.power_of_two(C)
    elements = 2048 if backward else 4096
    BLOCK_N = max(1, min(elements // BLOCK_C, 64))
    num_warps = min(max(BLOCK_N * BLOCK_C // (32 * (16 if backward else 32)), 4), 16)
    return Config(BLOCK_N, BLOCK_C, num_warps, programs_per_processor=max(1, 16 // num_warps))


def _rows(x: Tensor, C: int) -> Tensor:
    """x as (N, C) with a dense last axis, a view where its strides allow."""
    return launch.unit_stride(x.reshape(math.prod(x.shape[:-1]), C))


def _launch_forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    C = x.shape[-1]
    _check(x, weight, bias)
    rows = _rows(x, C)
    N = rows.shape[0]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean = torch.empty(N, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if N > 0:
        tile = config(C, backward=False)
        with launch.on_device(x):
            _forward[(triton.cdiv(N, tile.BLOCK_N),)](
                rows, weight.contiguous(), bias if bias is None else bias.contiguous(), y, mean, rstd,
                rows.stride(0), N, eps,
                C=C, BLOCK_N=tile.BLOCK_N, BLOCK_C=tile.BLOCK_C, num_warps=tile.num_warps, **launch.OPTIONS,
            )  # fmt: skip
    return y, mean, rstd


def _launch_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    C = x.shape[-1]
    rows, dy_rows = _rows(x, C), _rows(dy, C)
    N = rows.shape[0]
    dx, dweight, dbias = _allocate_gradients(x, weight, bias)
    if N == 0:
        return dx, dweight.zero_(), dbias.zero_()
    tile = config(C, backward=True)
    P = min(triton.cdiv(N, tile.BLOCK_N), launch.processors() * tile.programs_per_processor)
    partial = torch.empty(2, P, C, dtype=torch.float32, device=x.device)
    with launch.on_device(x):
        _backward[(P,)](
            dy_rows, rows, weight.contiguous(), mean, rstd, dx, partial, dy_rows.stride(0), rows.stride(0), N,
            C=C, HAS_BIAS=bias is not None, BLOCK_N=tile.BLOCK_N, BLOCK_C=tile.BLOCK_C, num_warps=tile.num_warps,
            **launch.OPTIONS,
        )  # fmt: skip
        _add_partials[(triton.cdiv(C, 32), 1 if bias is None else 2)](
            partial, dweight, dbias, P, C=C, BLOCK_P=64, BLOCK_C=32, num_warps=4, **launch.OPTIONS
        )
    return dx, dweight, dbias


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    launch.require_dtype("layer_norm", x=x, weight=weight, bias=bias)
    C = x.shape[-1]
    if not 1 <= C <= MAX_C:
        raise ValueError(f"layer_norm in Triton takes rows of 1 to {MAX_C} elements, x has {C}; choose reference")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != (C,):
            raise ValueError(
                f"layer_norm: {name} must have shape ({C},) like x's last axis, it has {tuple(vector.shape)}"
            )


def _allocate_gradients(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dbias = weight.new_empty(0) if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format)
    return dx, dweight, dbias


# ------------------------------------------------------------------------------------------------------------- autograd


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)
    return x.new_empty(x.shape), rows, torch.empty_like(rows)


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate_gradients(x, weight, bias)


_layer_norm = differentiable(
    "layer_norm_triton",
    forward=_launch_forward,
    backward=_launch_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=lambda args, results: (args[0], args[1], args[2], results[1], results[2]),
    gradients=(0, 1, 2),
)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """x (..., C), weight (C,), bias (C,) or None → (..., C) in x's dtype; statistics and the affine map in fp32."""
    return _layer_norm(x, weight, bias, eps)


def unsupported(site: Site) -> str | None:
    C = site.shape.get("C", 1)
    if C > MAX_C:
        return f"a row is one tile of at most {MAX_C} columns, C is {C}; choose reference"
    return launch.unsupported(site)
