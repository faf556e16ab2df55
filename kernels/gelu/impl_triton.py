"""gelu in Triton: one pass forward, one backward.

Mathematics, with u = √(2/π)(x + 0.044715 x³) and Φ, φ the normal distribution and density:
    "tanh":  y = x σ(2u)    dx = dy·(σ(2u) + x σ'(2u)·2u')
    "none":  y = x Φ(x)     dx = dy·(Φ(x) + x φ(x))
in fp32; the kernels, which other activations share, are in kernels/lib/triton_pointwise.py.

Shapes: x (..., F). Saved: x.

Bytes, for elements of b bytes: forward 2·b an element, backward 3·b; 8 and 14 FLOPs: the bound is memory bandwidth.
"""

from __future__ import annotations

from torch import Tensor

from tritium.kernels.autograd import differentiable
from tritium.kernels.lib import triton_launch as launch
from tritium.kernels.lib import triton_pointwise as pointwise
from tritium.kernels.site import Site

DETERMINISTIC = True


def _launch_forward(x: Tensor, approximate: str) -> tuple[Tensor]:
    launch.require_dtype("gelu", x=x)
    return (pointwise.unary_forward(x, pointwise.gelu_activation("gelu", approximate)),)


def _launch_backward(dy: Tensor, x: Tensor, approximate: str) -> tuple[Tensor]:
    return (pointwise.unary_backward(dy, x, pointwise.GELU[approximate]),)


_gelu = differentiable(
    "gelu_triton",
    forward=_launch_forward,
    backward=_launch_backward,
    fake_forward=lambda x, approximate: (pointwise.fake_like(x),),
    fake_backward=lambda dy, x, approximate: (pointwise.fake_like(x),),
    save=lambda args, results: args,
    gradients=(0,),
)


def gelu(x: Tensor, approximate: str = "tanh") -> Tensor:
    """x (...) → (...) in x's dtype; approximate: "tanh" or "none"."""
    return _gelu(x, approximate)


def unsupported(site: Site) -> str | None:
    return launch.unsupported(site)
