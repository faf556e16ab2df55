"""layer_norm in Triton: one pass forward, one pass backward and a small reduction (kernels/lib/triton_norms.py).

Mathematics, per row, with mean and variance over its C elements:
    r = 1/√(var + eps)        x̂ = (x - mean)·r        y = x̂·weight + bias
    g = dy·weight             dx = r·(g - mean(g) - x̂·mean(g·x̂))
    dweight = Σ_rows dy·x̂     dbias = Σ_rows dy

Shapes: N rows (the product of the leading axes), C width. Saved: x, and mean and r in fp32, 8 bytes a row.
Bytes, for elements of b bytes: forward 2·N·C·b, backward 3·N·C·b. About 8 and 14 FLOPs an element: the bound is memory
bandwidth.
"""

from __future__ import annotations

from torch import Tensor

from tritium.kernels.autograd import differentiable
from tritium.kernels.lib import triton_launch as launch
from tritium.kernels.lib import triton_norms as norms
from tritium.kernels.site import Site

DETERMINISTIC = True


def _launch_forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = norms.forward("layer_norm", x, None, weight, bias, eps, centre=True)
    return y, mean, rstd


def _launch_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = norms.backward(dy, None, x, weight, bias, mean, rstd)
    return dx, dweight, dbias


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = norms.allocate_forward(x, add=False, centre=True)
    return y, mean, rstd


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return norms.allocate_backward(x, weight, bias)


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
    return launch.unsupported(site)
