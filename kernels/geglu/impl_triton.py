"""geglu in Triton: one pass forward, one backward.

Mathematics, with a = gelu, by tanh or by erf as its argument says (see gelu):
    y = a(gate)·up        dgate = dy·up·a'(gate)        dup = dy·a(gate)
in fp32; the kernels, which other activations share, are in kernels/lib/triton_pointwise.py.

Shapes: gate and up (..., F), each with rows any stride apart: the halves of one projection are read where they are.
Saved: gate and up.

Bytes, for elements of b bytes: forward 3·b an element, backward 5·b; 9 and 18 FLOPs: the bound is memory bandwidth.
Of dgate and dup as two tensors, see swiglu.
"""

from __future__ import annotations

from torch import Tensor

from tritium.kernels.autograd import differentiable
from tritium.kernels.lib import triton_launch as launch
from tritium.kernels.lib import triton_pointwise as pointwise
from tritium.kernels.site import Site

DETERMINISTIC = True


def _launch_forward(gate: Tensor, up: Tensor, approximate: str) -> tuple[Tensor]:
    launch.require_dtype("geglu", gate=gate, up=up)
    return (pointwise.gated_forward("geglu", gate, up, pointwise.gelu_activation("geglu", approximate)),)


def _launch_backward(dy: Tensor, gate: Tensor, up: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    return pointwise.gated_backward(dy, gate, up, pointwise.GELU[approximate])


_geglu = differentiable(
    "geglu_triton",
    forward=_launch_forward,
    backward=_launch_backward,
    fake_forward=lambda gate, up, approximate: (pointwise.fake_like(gate),),
    fake_backward=lambda dy, gate, up, approximate: (pointwise.fake_like(gate), pointwise.fake_like(up)),
    save=lambda args, results: args,
    gradients=(0, 1),
)


def geglu(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    """gate and up (..., F) → (..., F) in their dtype; approximate: "tanh" or "none", as gelu's."""
    return _geglu(gate, up, approximate)


def unsupported(site: Site) -> str | None:
    return launch.unsupported(site)
