"""add_rms_norm in Triton: the sum is formed in the pass that norms it (kernels/lib/triton_norms.py).

Mathematics, per row of C elements:
    s = x + residual, rounded to x's dtype      y = rms_norm(s)
    dx = dresidual = ds + the gradient of s in rms_norm         dweight: that of rms_norm
Both summands have the one gradient: it is written once, and both are given the same tensor.

Shapes: N rows (the product of the leading axes), C width. Saved: s, which is an output, and r in fp32, 4 bytes a row.
Bytes, for elements of b bytes: forward 4·N·C·b, backward 4·N·C·b. About 5 and 11 FLOPs an element: the bound is memory
bandwidth.
"""

from __future__ import annotations

from torch import Tensor

from tritium.kernels.autograd import differentiable
from tritium.kernels.lib import triton_launch as launch
from tritium.kernels.lib import triton_norms as norms
from tritium.kernels.site import Site

DETERMINISTIC = True


def _launch_forward(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, s, _, rstd = norms.forward("add_rms_norm", x, residual, weight, None, eps, centre=False)
    return y, s, rstd


def _launch_backward(dy: Tensor, ds: Tensor, s: Tensor, weight: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dx, dweight, _ = norms.backward(dy, ds, s, weight, None, None, rstd)
    return dx, dweight


def _fake_forward(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, s, _, rstd = norms.allocate_forward(x, add=True, centre=False)
    return y, s, rstd


def _fake_backward(dy: Tensor, ds: Tensor, s: Tensor, weight: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return norms.allocate_backward(s, weight, None)[:2]


_add_rms_norm = differentiable(
    "add_rms_norm_triton",
    forward=_launch_forward,
    backward=_launch_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=lambda args, results: (results[1], args[2], results[2]),
    gradients=((0, 1), 2),
    outputs=2,
)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """x and residual (..., C), weight (C,) or None (no scaling) → (y, s), both (..., C) in x's dtype; computed in
    fp32."""
    return _add_rms_norm(x, residual, weight, eps)


def unsupported(site: Site) -> str | None:
    return launch.unsupported(site)
