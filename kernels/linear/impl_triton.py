"""linear in Triton: tiled matrix products on the tensor cores, the bias in the epilogue. The base for other epilogues.

Mathematics:
    y = x Wᵀ + b        dx = dy W        dW = dyᵀ x        db = Σ_rows dy

Shapes: N rows (the product of the leading axes) · C input width · F output width. x, dy and W are read where they are,
by their two strides, as long as one axis is dense (or repeated); others are copied.

y and dx are one kernel: a program makes a tile of the output, over all of C (or F), with fp32 sums; programs that share
rows run near each other in groups, so that both operands come from the cache. dW has few tiles and a long sum (N), so
the sum is cut into S parts wherever that fills the processors better, parts go to memory in fp32, and a second kernel
adds them in order. db is a sum over row blocks and the same addition. No atomics: it repeats bit for bit on one GPU
model. fp32 multiplies in full precision, or in tf32 when torch.set_float32_matmul_precision() allows that.

Saved: x and W. FLOPs: 2·N·C·F forward, 4·N·C·F backward; the tensor cores are the bound, for large N.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels.autograd import differentiable
from tritium.kernels.lib import triton_launch as launch
from tritium.kernels.site import Site

DETERMINISTIC = True


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Rows and columns of this program's tile: GROUP tiles of rows, column by column, before the next GROUP."""
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    tile_m = first + program % (GROUP * tiles_n) % height
    tile_n = program % (GROUP * tiles_n) // height
    return tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def _product(
    A, B, rows, columns, M, N, first, last, stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_k A[row, k] B[k, column] over first ≤ k < last, in fp32. EVEN: a whole number of blocks."""
    steps = tl.arange(0, BLOCK_K)
    k = first.to(tl.int64) + steps
    a = A + rows.to(tl.int64)[:, None] * stride_am + k[None, :] * stride_ak
    b = B + k[:, None] * stride_bk + columns.to(tl.int64)[None, :] * stride_bn
    mask_a, mask_b = (rows < M)[:, None], (columns < N)[None, :]
    step = tl.full((), BLOCK_K, tl.int64)  # a stride may be long
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_K):
        if EVEN:
            left, right = tl.load(a, mask_a, other=0.0), tl.load(b, mask_b, other=0.0)
        else:
            real = steps < last - start
            left = tl.load(a, mask_a & real[None, :], other=0.0)
            right = tl.load(b, mask_b & real[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        a += step * stride_ak
        b += step * stride_bk
    return total


@triton.jit(do_not_specialize=["M"])
def _rows(
    A, B, BIAS, OUT, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT (M, N) = A (M, K) B (K, N) + BIAS (N)."""
    rows, columns = _tile(M, N, BLOCK_M, BLOCK_N, GROUP)
    total = _product(
        A, B, rows, columns, M, N, tl.full((), 0, tl.int32), K, stride_am, stride_ak, stride_bk, stride_bn,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN, PRECISION,
    )  # fmt: skip
    if BIAS is not None:
        total += tl.load(BIAS + columns, columns < N, other=0.0).to(tl.float32)[None, :]
    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(OUT + at, total.to(OUT.dtype.element_ty), (rows < M)[:, None] & (columns < N)[None, :])


@triton.jit(do_not_specialize=["K", "part"])
def _weights(
    A, B, OUT, M, N, K, part, stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT (S, M, N): the products over ``part`` rows k each, or with S = 1 over all."""
    rows, columns = _tile(M, N, BLOCK_M, BLOCK_N, GROUP)
    first = tl.program_id(1) * part
    total = _product(
        A, B, rows, columns, M, N, first, tl.minimum(first + part, K), stride_am, stride_ak, stride_bk, stride_bn,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN, PRECISION,
    )  # fmt: skip
    OUT += tl.program_id(1).to(tl.int64) * M * N
    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(OUT + at, total.to(OUT.dtype.element_ty), (rows < M)[:, None] & (columns < N)[None, :])


@triton.jit(do_not_specialize=["N"])
def _column_sums(DY, PARTS, N, F, stride_n, stride_f, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr):
    """PARTS (P, F): the sums over every P-th block of rows."""
    columns = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    total = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for block in range(tl.program_id(1), tl.cdiv(N, BLOCK_N), tl.num_programs(1)):
        rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
        at = rows.to(tl.int64)[:, None] * stride_n + columns.to(tl.int64)[None, :] * stride_f
        total += tl.load(DY + at, (rows < N)[:, None] & (columns < F)[None, :], other=0.0).to(tl.float32)
    tl.store(PARTS + tl.program_id(1).to(tl.int64) * F + columns, tl.sum(total, 0), columns < F)


@triton.jit(do_not_specialize=["P"])
def _add_parts(PARTS, OUT, P, size, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    """OUT (size) = Σ of PARTS (P, size) over its first axis."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK_P, BLOCK), tl.float32)
    for first in range(0, P, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        mask = (p < P)[:, None] & (at < size)[None, :]
        total += tl.load(PARTS + p.to(tl.int64)[:, None] * size + at[None, :], mask, other=0.0)
    tl.store(OUT + at, tl.sum(total, 0).to(OUT.dtype.element_ty), at < size)


# ----------------------------------------------------------------------------------------------------------- launchers

_rows_kernel, _weights_kernel = launch.Kernel(_rows), launch.Kernel(_weights)
_column_sums_kernel, _add_parts_kernel = launch.Kernel(_column_sums), launch.Kernel(_add_parts)


class Config(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class SumsConfig(NamedTuple):
    BLOCK_N: int
    BLOCK_F: int
    num_warps: int


class AddConfig(NamedTuple):
    BLOCK_P: int
    BLOCK: int
    num_warps: int


@launch.tuned
def config(arch: int, itemsize: int, precision: str, M: int, N: int, aligned: bool = True) -> Config:
    """The tile of an (M, N) output. M and N count by their size class only: up to 16, up to 64, more.

    aligned: both operands are read in pieces of 16 bytes. Others are read element by element, each with an address and
    a mask of its own, and leave registers for half the tile.
    """
    if precision == "ieee":  # no tensor cores
        return (
            Config(16, 64, 32, 4, 3) if M <= 16 else Config(64, 64, 32, 8, 3) if M <= 64 else Config(128, 64, 16, 8, 3)
        )
    if M <= 16:
        return Config(16, 64, 32, 4, 4)
    if M <= 64 or N <= 64:
        return Config(64, 64, 64 if itemsize == 2 and aligned else 32, 4, 4)
    if itemsize == 4:
        return Config(128, 128 if aligned else 64, 32, 8, 3)
    if not aligned:
        return Config(128, 128, 32, 8, 4)
    # what warp-group mma and tcgen05 read, they read from shared memory; mma, sm_120's too, from registers
    return Config(128, 256, 64, 8, 3) if 90 <= arch < 120 else Config(128, 128, 32, 4, 4)


def sums_config() -> SumsConfig:
    """16 elements a thread."""
    return SumsConfig(16, 128, 4)


def add_config() -> AddConfig:
    return AddConfig(8, 256, 4)


@cache
def _constants(tile: Config, even: bool, precision: str) -> launch.Constants:
    return launch.constants(**tile._asdict(), GROUP=8, EVEN=even, PRECISION=precision)


@cache
def _plain_constants(tile: SumsConfig | AddConfig) -> launch.Constants:
    return launch.constants(**tile._asdict())


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"


@cache
def parts(tiles: int, K: int, BLOCK_K: int, processors: int) -> int:
    """How many parts to cut a sum over K into: the fewest waves of programs, against the traffic of the parts, which
    costs as much as some 800 of K (the FLOPs that pass while 8 bytes an element cross an H100's memory)."""

    def cost(S: int) -> float:
        waves = launch.cdiv(tiles * S, processors) / S
        return waves if S == 1 else waves + S * 800 / K * tiles / processors

    return min(range(1, max(1, min(16, K // (4 * BLOCK_K))) + 1), key=cost) if K > 0 else 1


def _aligned(*matrices: Tensor) -> bool:
    """Whether Triton knows every row or column to begin at a multiple of 16 bytes: it looks for a factor of 16 in
    strides and addresses."""
    return not any(stride % 16 for m in matrices for stride in (*m.stride(), m.data_ptr()) if stride != 1)


def _in_place(matrix: Tensor) -> Tensor:
    """The matrix itself if an axis of it is dense or repeated, else a contiguous copy."""
    return matrix if min(matrix.stride()) <= 1 else matrix.contiguous()


def _as_rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _multiply(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out (M, N) = a (M, K) b (K, N) + bias, for many rows M."""
    (M, K), N = a.shape, b.shape[1]
    if M == 0 or N == 0:
        return
    precision = _precision(a.dtype)
    tile = config(launch.arch(), a.element_size(), precision, M, N, _aligned(a, b))
    _rows_kernel(
        (launch.cdiv(M, tile.BLOCK_M) * launch.cdiv(N, tile.BLOCK_N),),
        _constants(tile, K % tile.BLOCK_K == 0, precision),
        a, b, bias, out, M, N, K, a.stride(0), a.stride(1), b.stride(0), b.stride(1),
    )  # fmt: skip


def _multiply_long(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out (M, N) = a (M, K) b (K, N), for a long sum over K."""
    (M, K), N = a.shape, b.shape[1]
    if M == 0 or N == 0:
        return
    precision = _precision(a.dtype)
    tile = config(launch.arch(), a.element_size(), precision, M, N, _aligned(a, b))
    tiles = launch.cdiv(M, tile.BLOCK_M) * launch.cdiv(N, tile.BLOCK_N)
    S = parts(tiles, K, tile.BLOCK_K, launch.processors())
    part = launch.cdiv(launch.cdiv(K, tile.BLOCK_K), S) * tile.BLOCK_K
    target = out if S == 1 else torch.empty((S, M, N), dtype=torch.float32, device=out.device)
    _weights_kernel(
        (tiles, S), _constants(tile, False, precision),
        a, b, target, M, N, K, part, a.stride(0), a.stride(1), b.stride(0), b.stride(1),
    )  # fmt: skip
    if S > 1:
        _add(target, out)


def _add(partial: Tensor, out: Tensor) -> None:
    tile = add_config()
    size = out.numel()
    _add_parts_kernel(
        (launch.cdiv(size, tile.BLOCK),), _plain_constants(tile), partial, out, partial.shape[0], size
    )  # fmt: skip


def _sum_rows(dy: Tensor, out: Tensor) -> None:
    """out (F) = the sum of dy (N, F) over its rows."""
    N, F = dy.shape
    tile = sums_config()
    columns = launch.cdiv(F, tile.BLOCK_F)
    P = max(1, min(launch.cdiv(N, tile.BLOCK_N), 8 * launch.processors() // columns))
    partial = torch.empty((P, F), dtype=torch.float32, device=dy.device)
    _column_sums_kernel((columns, P), _plain_constants(tile), dy, partial, N, F, dy.stride(0), dy.stride(1))
    _add(partial, out)


def _launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, need_dx: bool, need_dweight: bool, need_dbias: bool
) -> tuple[Tensor]:
    _check(x, weight, bias)
    y = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)
    rows, weight = _in_place(_as_rows(x)), _in_place(weight)
    with launch.on_device(x):
        _multiply(rows, weight.t(), bias if bias is None else bias.contiguous(), y)
    return (y,)


def _launch_backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool, need_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = _fake_backward(dy, x, weight, need_dx, need_dweight, need_dbias)
    rows, dy, weight = _in_place(_as_rows(x)), _in_place(_as_rows(dy)), _in_place(weight)
    with launch.on_device(x):
        if need_dx:
            _multiply(dy, weight, None, dx)
        if need_dweight:
            _multiply_long(dy.t(), rows, dweight)
        if need_dbias and dbias.numel() > 0:
            _sum_rows(dy, dbias)
    return dx, dweight, dbias


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    launch.require_dtype("linear", x=x, weight=weight, bias=bias)
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise TypeError(
            f"linear takes x, weight and bias of one dtype; they are {x.dtype}, {weight.dtype} and "
            f"{None if bias is None else bias.dtype}; cast the weights"
        )
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear takes x (..., C) and weight (F, C) of one width; they are {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: bias must have shape ({weight.shape[0]},), it has {tuple(bias.shape)}")


# ------------------------------------------------------------------------------------------------------------- autograd


def _fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, need_dx: bool, need_dweight: bool, need_dbias: bool
) -> tuple[Tensor]:
    return (x.new_empty((*x.shape[:-1], weight.shape[0])),)


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool, need_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_dx else 0),
        x.new_empty(weight.shape if need_dweight else 0),
        x.new_empty(weight.shape[0] if need_dbias else 0),
    )


def _flops(x: Sequence[int], weight: Sequence[int], *args: object, **kwargs: object) -> int:
    return 2 * math.prod(x) * weight[0]


def _flops_backward(
    dy: Sequence[int], x: Sequence[int], weight: Sequence[int], need_dx: bool, need_dweight: bool, *args: object,
    **kwargs: object,
) -> int:  # fmt: skip
    return 2 * math.prod(x) * weight[0] * (need_dx + need_dweight)


_linear = differentiable(
    "linear_triton",
    forward=_launch_forward,
    backward=_launch_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=lambda args, results: (args[0], args[1], *args[3:]),
    gradients=(0, 1, 2),
    flops=_flops,
    flops_backward=_flops_backward,
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., C), weight (F, C), bias (F,) or None, all of one dtype → (..., F). Only the gradients that are needed are
    computed."""
    grad = torch.is_grad_enabled()
    return _linear(
        x, weight, bias, grad and x.requires_grad, grad and weight.requires_grad,
        bias is not None and grad and bias.requires_grad,
    )  # fmt: skip


def unsupported(site: Site) -> str | None:
    return launch.unsupported(site)
