"""What every Triton launcher needs to know about its device, and the reasons every Triton backend may refuse for.

The facts come from Triton's active driver and never from torch.cuda, so that the ahead-of-time checks, which put the
driver of another architecture in its place, compile exactly what a launcher would choose there. The interpreter has no
driver: launchers then act as on an H100 with few processors.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from triton.runtime.driver import driver

from tritium.kernels.site import Site, interpreting, triton_unavailable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# for every launch: a·b + c in one instruction, which Triton 3.10 will not make unless asked, as 3.9 warns
OPTIONS = {"enable_fp_fusion": True}
INTERPRETED_ARCH, INTERPRETED_PROCESSORS = 90, 3
INTERPRETED_BF16 = False  # the interpreter calculates on the bits of a bf16 tensor as if they were an integer's


def arch() -> int:
    """The compute capability Triton compiles for: 90 for sm_90."""
    return INTERPRETED_ARCH if interpreting() else int(driver.active.get_current_target().arch)


_processors: dict[tuple[int, int], int] = {}


def processors() -> int:
    """The number of streaming multiprocessors of the current device."""
    if interpreting():
        return INTERPRETED_PROCESSORS
    key = (arch(), int(driver.active.get_current_device()))
    if key not in _processors:
        _processors[key] = int(driver.active.utils.get_device_properties(key[1])["multiprocessor_count"])
    return _processors[key]


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device; this makes it the tensor's."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself if its last axis is dense, which is all the kernels ask for; otherwise a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n ≥ 1. (Triton's own is a function of its language, 3 µs a call.)"""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉, in plain Python for the same reason."""
    return -(-a // b)


def unsupported(site: Site) -> str | None:
    """Why no Triton kernel of this package can serve a site, whatever the op, or None."""
    reason = triton_unavailable(site)
    if reason is None and site.dtype not in DTYPES:
        reason = f"computes in float32, bfloat16 or float16, the site is {site.dtype}; choose reference"
    if reason is None and site.machine.interpreted and site.dtype == torch.bfloat16 and not INTERPRETED_BF16:
        reason = "Triton's interpreter computes bfloat16 wrongly; use float32 (--train.precision fp32)"
    return reason


def require_dtype(op: str, **tensors: Tensor | None) -> None:
    """Raise TypeError unless every tensor has a dtype the kernels compute in."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            raise TypeError(
                f"{op} in Triton takes float32, bfloat16 or float16; {name} is {tensor.dtype}; "
                "cast it, or choose reference"
            )
