"""gelu on the CPU in C++ (gelu.cpp): one vectorised pass forward, one backward, OpenMP over chunks.

Mathematics of "tanh", in fp32, with u = √(2/π)(x + 0.044715 x³) and s = σ(2u), computed as 1/(1 + 2^t):
    y = x s        dx = dy·(s + x s(1 − s)·2u')
"none" is torch's own, whose erf is vector code already.

Shapes: x (...). Saved: x. Bytes: forward 2, backward 3 elements for each of x; 8 and 14 FLOPs and one exponential: the
arithmetic is the bound while the tensors are in the cache, the memory bandwidth beyond.
"""

import torch
from torch import Tensor

from tritium.kernels.autograd import differentiable
from tritium.kernels.lib import native
from tritium.kernels.site import Site

DETERMINISTIC = True  # elements are independent

_forward = native.Function("gelu_forward", "i pp l i")
_backward = native.Function("gelu_backward", "i ppp l i")


def _check(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in native.DTYPES or tensor.device.type != "cpu":
            raise TypeError(
                "gelu native computes float32 and bfloat16 on the CPU; "
                f"{name} is {tensor.dtype} on {tensor.device}; choose reference"
            )


def _launch_forward(x: Tensor, approximate: str) -> tuple[Tensor]:
    _check(x=x)
    if approximate != "tanh":
        return (torch.nn.functional.gelu(x.contiguous(), approximate=approximate),)
    x = x.contiguous()
    y = torch.empty_like(x)
    _forward(native.DTYPES[x.dtype], x.data_ptr(), y.data_ptr(), x.numel(), torch.get_num_threads())
    return (y,)


def _launch_backward(dy: Tensor, x: Tensor, approximate: str) -> tuple[Tensor]:
    if approximate != "tanh":
        return (torch.ops.aten.gelu_backward(dy.contiguous(), x.contiguous(), approximate=approximate),)
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    _backward(native.DTYPES[x.dtype], dy.data_ptr(), x.data_ptr(), dx.data_ptr(), x.numel(), torch.get_num_threads())
    return (dx,)


def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_gelu = differentiable(
    "gelu_native",
    forward=_launch_forward,
    backward=_launch_backward,
    fake_forward=lambda x, approximate: (_fake(x),),
    fake_backward=lambda dy, x, approximate: (_fake(x),),
    save=lambda args, results: args,
    gradients=(0,),
)


def gelu(x: Tensor, approximate: str = "tanh") -> Tensor:
    """x (...) fp32 or bf16 → (...) in x's dtype; approximate: "tanh" or "none"."""
    return _gelu(x, approximate)


def unsupported(site: Site) -> str | None:
    return native.unsupported(site)
