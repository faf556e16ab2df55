"""swiglu in Triton: one pass forward, one backward.

Mathematics, with s = σ(gate):
    y = gate·s·up        dgate = dy·up·(s + gate·s(1 - s))        dup = dy·gate·s
in fp32; the kernels, which other activations share, are in kernels/lib/triton_pointwise.py.

Shapes: gate and up (..., F), each with rows any stride apart: the halves of one projection are read where they are.
Saved: gate and up.

Bytes, for elements of b bytes: forward 3·b an element, backward 5·b; 5 and 10 FLOPs: the bound is memory bandwidth.
dgate and dup are two tensors, and when gate and up are halves of one, autograd joins their gradients by a copy that
costs 4·b more: results of a custom op may not share a storage, and autograd would join them even so.
"""

from __future__ import annotations

from torch import Tensor

from tritium.kernels.autograd import differentiable
from tritium.kernels.lib import triton_launch as launch
from tritium.kernels.lib import triton_pointwise as pointwise
from tritium.kernels.site import Site

DETERMINISTIC = True


def _launch_forward(gate: Tensor, up: Tensor) -> tuple[Tensor]:
    launch.require_dtype("swiglu", gate=gate, up=up)
    return (pointwise.gated_forward("swiglu", gate, up, "silu"),)


def _launch_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return pointwise.gated_backward(dy, gate, up, "silu")


_swiglu = differentiable(
    "swiglu_triton",
    forward=_launch_forward,
    backward=_launch_backward,
    fake_forward=lambda gate, up: (pointwise.fake_like(gate),),
    fake_backward=lambda dy, gate, up: (pointwise.fake_like(gate), pointwise.fake_like(up)),
    save=lambda args, results: args,
    gradients=(0, 1),
)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up (..., F) → (..., F) in their dtype."""
    return _swiglu(gate, up)


def unsupported(site: Site) -> str | None:
    return launch.unsupported(site)
