"""add_layer_norm in Triton: the sum is formed in the pass that norms it (kernels/lib/triton_norms.py).

Mathematics, per row of C elements:
    s = x + residual, rounded to x's dtype      y = layer_norm(s)
    dx = dresidual = ds + the gradient of s in layer_norm       dweight, dbias: those of layer_norm
Both summands have the one gradient: it is written once, and both are given the same tensor.

Shapes: N rows (the product of the leading axes), C width. Saved: s, which is an output, and mean and r in fp32, 8 bytes
a row. Bytes, for elements of b bytes: forward 4·N·C·b, backward 4·N·C·b. About 9 and 15 FLOPs an element: the bound is
memory bandwidth.
"""

from __future__ import annotations

from torch import Tensor

from tritium.kernels.autograd import differentiable
from tritium.kernels.lib import triton_launch as launch
from tritium.kernels.lib import triton_norms as norms
from tritium.kernels.site import Site

DETERMINISTIC = True


def _launch_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, s, mean, rstd = norms.forward("add_layer_norm", x, residual, weight, bias, eps, centre=True)
    return y, s, mean, rstd


def _launch_backward(
    dy: Tensor, ds: Tensor, s: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = norms.backward(dy, ds, s, weight, bias, mean, rstd)
    return dx, dweight, dbias


def _fake_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, s, mean, rstd = norms.allocate_forward(x, add=True, centre=True)
    return y, s, mean, rstd


def _fake_backward(
    dy: Tensor, ds: Tensor, s: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return norms.allocate_backward(s, weight, bias)


_add_layer_norm = differentiable(
    "add_layer_norm_triton",
    forward=_launch_forward,
    backward=_launch_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=lambda args, results: (results[1], args[2], args[3], results[2], results[3]),
    gradients=((0, 1), 2, 3),
    outputs=2,
)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """x and residual (..., C), weight (C,), bias (C,) or None → (y, s), both (..., C) in x's dtype; statistics and the
    affine map in fp32."""
    return _add_layer_norm(x, residual, weight, bias, eps)


def unsupported(site: Site) -> str | None:
    return launch.unsupported(site)
