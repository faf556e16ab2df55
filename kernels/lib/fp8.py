"""Matrix products in fp8 with scales that follow the data, and the linear layer made of three of them.

A number in fp8 has few digits and a short range: e4m3 four significant bits up to 448, e5m2 three up to 57344. So a
matrix is multiplied by a scale that brings its largest number near the top, rounded, and what comes out of the product
(sums in fp32) is divided by the scales of both factors. Scales are powers of two: scaling rounds nothing, an eager and
a compiled model get the same bits, and bf16 holds every scaled number exactly. That is torchao's
``round_scales_to_power_of_2``, and the recipes are torchao's as well (torchao.float8):

    tensorwise   one scale a matrix                                gradients that arrive in e5m2, all else in e4m3
    rowwise      one a row of the left and a column of the right   all in e4m3

    y = x Wᵀ + b       dx = dy W       dW = dyᵀ x       db = Σ_rows dy, not in fp8

Shapes: N rows · C input width · F output width; N counts along the sum of dW. Saved: x and W as they came; a compiler
may keep what is rounded instead. FLOPs as in the reference. Bytes beside the product's: every factor is read twice, for
its scale and to be rounded, and written in one byte; a compiler fuses that with what made the factor. Run eagerly it
is many small kernels: fp8 gains its speed in a compiled model only.

On a GPU the product is torch._scaled_mm: cuBLAS, both factors dense along the sum, so W is turned for dx and both
factors for dW, one byte a number. Elsewhere the factors go back to the compute dtype, where they are exact, and are
multiplied there: the same numbers up to the order of the sums, at no gain in speed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritium.kernels.site import Site

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TOP = {E4M3: 8, E5M2: 15}  # the largest number is 1.75 · 2^TOP, 448 or 57344
PRECISION = "fp8"
SMALLEST = 2.0**-100  # of a largest number: a matrix of zeros has a scale too


def scales(largest: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest power of two that takes ``largest`` ≥ 0 to at most fp8's largest number, and its inverse; fp32.

    NaN for what is not finite, so that whatever has this scale shows it. Bits alone: no compiler divides otherwise.
    """
    bits = largest.to(torch.float32).clamp(min=SMALLEST).view(torch.int32)
    # the exponent of the least 1.75 · 2^e that is not below: beyond a mantissa of 1.75 the sum carries into it
    exponent = (bits + 0x1FFFFF) >> 23
    scale = ((254 + TOP[dtype] - exponent) << 23).view(torch.float32)
    inverse = ((exponent - TOP[dtype]) << 23).view(torch.float32)
    return torch.where(largest.isfinite(), scale, torch.nan), inverse


def rounded(x: Tensor, dim: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x times its scales in fp8, the scales' inverses in fp32). dim: along which numbers share a scale; None: all."""
    largest = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale, inverse = scales(largest, dtype)
    return (x * scale.to(x.dtype)).to(dtype), inverse


def product(
    a: Tensor,
    b: Tensor,
    a_dtype: torch.dtype,
    b_dtype: torch.dtype,
    rowwise: bool,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    fast: bool = False,
) -> Tensor:
    """a (M, K) b (K, N) + bias → (M, N) in out_dtype, a and b rounded to fp8; K and N are multiples of 16.

    fast: the tensor cores may keep fewer than 32 bits of their sums (``use_fast_accum``), as is usual forward.
    """
    a8, a_inverse = rounded(a, 1 if rowwise else None, a_dtype)
    b8, b_inverse = rounded(b, 0 if rowwise else None, b_dtype)
    multiply = _on_tensor_cores if a.is_cuda else _emulated
    return multiply(a8, a_inverse, b8, b_inverse, bias, out_dtype, fast)


def _emulated(
    a8: Tensor, a_inverse: Tensor, b8: Tensor, b_inverse: Tensor, bias: Tensor | None, out_dtype: torch.dtype,
    fast: bool,
) -> Tensor:  # fmt: skip
    a, b = a8.to(out_dtype) * a_inverse.to(out_dtype), b8.to(out_dtype) * b_inverse.to(out_dtype)
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def _on_tensor_cores(
    a8: Tensor, a_inverse: Tensor, b8: Tensor, b_inverse: Tensor, bias: Tensor | None, out_dtype: torch.dtype,
    fast: bool,
) -> Tensor:  # fmt: skip
    a8, b8 = a8.contiguous(), b8.t().contiguous().t()
    if fast or a_inverse.dim() == 0:
        return torch._scaled_mm(a8, b8, a_inverse, b_inverse, bias, out_dtype=out_dtype, use_fast_accum=fast)
    # the kernel that takes scales by row is slow with whole sums (torchao): take the other, and scale what it gives,
    # which is exact
    one = torch.ones((), device=a8.device)
    y = torch._scaled_mm(a8, b8, one, one, out_dtype=out_dtype)
    y = y * a_inverse.to(out_dtype) * b_inverse.to(out_dtype)
    return y if bias is None else y + bias


class _Linear(torch.autograd.Function):
    """x (N, C), weight (F, C), bias (F,) or None → (N, F) in x's dtype. Autograd widens the weight's gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rowwise: bool, gradients: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rowwise, ctx.gradients = rowwise, gradients
        return product(x, weight.t(), E4M3, E4M3, rowwise, bias, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = product(dy, weight, ctx.gradients, E4M3, ctx.rowwise, out_dtype=x.dtype)
        if ctx.needs_input_grad[1]:
            missing = -x.shape[0] % 16  # rows of zeros add nothing to the sum
            rows, dy_rows = (F.pad(t, (0, 0, 0, missing)) if missing else t for t in (x, dy))
            dweight = product(dy_rows.t(), rows, ctx.gradients, E4M3, ctx.rowwise, out_dtype=x.dtype)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0)
        return dx, dweight, dbias, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, rowwise: bool, gradients: torch.dtype) -> Tensor:
    """x (..., C), weight (F, C) of x's dtype or wider, bias (F,) or None → (..., F) in x's dtype; the weight's gradient
    is in the weight's dtype. gradients: what dy is rounded to. C and F are multiples of 16."""
    if x.numel() == 0:  # has no largest number
        return F.linear(x, weight.to(x.dtype), bias)
    y = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, rowwise, gradients)
    return y.view(*x.shape[:-1], weight.shape[0])


def unsupported(site: Site, sizes: tuple[str, str]) -> str | None:
    """Why fp8 cannot serve the site, or None. sizes: the letters of its weight's shape."""
    if site.dtype != torch.bfloat16:
        return (
            f"fp8 products take bfloat16 and give it, this site computes in {str(site.dtype).removeprefix('torch.')}; "
            "compute in bfloat16 (train.precision=bf16 or fp8), or choose reference"
        )
    if site.device == "cuda" and site.machine.capability < 89:
        return (
            f"fp8 products need a GPU of compute capability 8.9 or later, this is {site.machine.arch}; choose reference"
        )
    odd = [f"{letter}={site.shape[letter]}" for letter in sizes if site.shape.get(letter, 0) % 16]
    if odd:
        return (
            f"fp8 products need widths that are multiples of 16, this site has {' and '.join(odd)}; change the width "
            "(a vocabulary's is padded by model.vocab_multiple), or choose reference"
        )
    return None
