"""relu2 in Triton: y = max(x, 0)², dx = 2 max(x, 0) dy, in fp32; one pass forward, one backward.

The kernels, which other activations share, are in kernels/lib/triton_pointwise.py.

Shapes: x (..., F). Saved: x.

Bytes, for elements of b bytes: forward 2·b an element, backward 3·b; 2 and 3 FLOPs: the bound is memory bandwidth.
"""

from __future__ import annotations

from torch import Tensor

from tritium.kernels.autograd import differentiable
from tritium.kernels.lib import triton_launch as launch
from tritium.kernels.lib import triton_pointwise as pointwise
from tritium.kernels.site import Site

DETERMINISTIC = True


def _launch_forward(x: Tensor) -> tuple[Tensor]:
    launch.require_dtype("relu2", x=x)
    return (pointwise.unary_forward(x, "relu2"),)


def _launch_backward(dy: Tensor, x: Tensor) -> tuple[Tensor]:
    return (pointwise.unary_backward(dy, x, "relu2"),)


_relu2 = differentiable(
    "relu2_triton",
    forward=_launch_forward,
    backward=_launch_backward,
    fake_forward=lambda x: (pointwise.fake_like(x),),
    fake_backward=lambda dy, x: (pointwise.fake_like(x),),
    save=lambda args, results: args,
    gradients=(0,),
)


def relu2(x: Tensor) -> Tensor:
    """x (...) → (...) in x's dtype."""
    return _relu2(x)


def unsupported(site: Site) -> str | None:
    return launch.unsupported(site)
