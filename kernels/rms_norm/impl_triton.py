"""rms_norm in Triton: one pass forward, one pass backward and a small reduction (kernels/lib/triton_norms.py).

Mathematics, per row of C elements; without a weight it is 1 and has no gradient:
    r = 1/√(mean(x²) + eps)        x̂ = x·r        y = x̂·weight
    g = dy·weight                  dx = r·(g - x̂·mean(g·x̂))        dweight = Σ_rows dy·x̂

Shapes: N rows (the product of the leading axes), C width. Saved: x, and r in fp32, 4 bytes a row.
Bytes, for elements of b bytes: forward 2·N·C·b, backward 3·N·C·b. About 4 and 10 FLOPs an element: the bound is memory
bandwidth.
"""

from __future__ import annotations

from torch import Tensor

from tritium.kernels.autograd import differentiable
from tritium.kernels.lib import triton_launch as launch
from tritium.kernels.lib import triton_norms as norms
from tritium.kernels.site import Site

DETERMINISTIC = True


def _launch_forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    y, _, _, rstd = norms.forward("rms_norm", x, None, weight, None, eps, centre=False)
    return y, rstd


def _launch_backward(dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dx, dweight, _ = norms.backward(dy, None, x, weight, None, None, rstd)
    return dx, dweight


def _fake_forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    y, _, _, rstd = norms.allocate_forward(x, add=False, centre=False)
    return y, rstd


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return norms.allocate_backward(x, weight, None)[:2]


_rms_norm = differentiable(
    "rms_norm_triton",
    forward=_launch_forward,
    backward=_launch_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=lambda args, results: (args[0], args[1], results[1]),
    gradients=(0, 1),
)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """x (..., C), weight (C,) or None (no scaling) → (..., C) in x's dtype; computed in fp32."""
    return _rms_norm(x, weight, eps)


def unsupported(site: Site) -> str | None:
    return launch.unsupported(site)
