"""What every Triton launcher needs to know about its device, and the reasons every Triton backend may refuse for.

The facts come from Triton's active driver and never from torch.cuda, so that the ahead-of-time checks, which put the
driver of another architecture in its place, compile exactly what a launcher would choose there. The interpreter has no
driver: launchers then act as on an H100 with few processors.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tritium.kernels.site import Site, interpreting, triton_unavailable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NOTHING = contextlib.nullcontext()
# for every launch: a·b + c in one instruction, which Triton 3.10 will not make unless asked, as 3.9 warns
OPTIONS = {"enable_fp_fusion": True}
INTERPRETED_ARCH, INTERPRETED_PROCESSORS = 90, 3
INTERPRETED_BF16 = False  # the interpreter calculates on the bits of a bf16 tensor as if they were an integer's


_INTERPRETED = interpreting()  # as Triton decided when it was imported
_devices: dict[tuple[type, int], tuple[int, int]] = {}


def _device() -> tuple[int, int]:
    """(compute capability, processors) of the current device; asked of a driver once, which takes it microseconds."""
    if _INTERPRETED:
        return INTERPRETED_ARCH, INTERPRETED_PROCESSORS
    active = driver.active
    device = active.get_current_device()
    found = _devices.get((type(active), device))
    if found is None:
        count = active.utils.get_device_properties(device)["multiprocessor_count"]
        found = _devices[type(active), device] = (int(active.get_current_target().arch), int(count))
    return found


def arch() -> int:
    """The compute capability Triton compiles for: 90 for sm_90."""
    return _device()[0]


def processors() -> int:
    """The number of streaming multiprocessors of the current device."""
    return _device()[1]


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device; this makes it the tensor's."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _NOTHING
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


class Constants(dict[str, Any]):
    """A kernel's constexpr arguments and compile options. Equal to itself only: make each choice once (functools.cache)
    and hand out the same object, so that a launch need not look inside."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other


def constants(**values: Any) -> Constants:
    """Constants with the options of every launch."""
    return Constants(values, **OPTIONS)


class Kernel:
    """``kernel(grid, constants, *args)`` launches what ``jit[grid](*args, **constants)`` would, in half the time.

    Triton's own launch looks at every argument, formats the options into a key and reads its settings: some 8 µs. Here
    the compiled kernel is remembered by what Triton specialises the arguments on, which Triton itself is asked for.
    args: the parameters that are no constexpr, in order; the jit function must have its constexpr parameters last.
    Whatever wants to see launches (an interpreter, a profiler's hooks, kernels/aot.py) gets Triton's own.
    """

    _run = JITFunction.run

    def __init__(self, jit: Any):
        self.jit = jit
        self.compiles = isinstance(jit, JITFunction)
        self.compiled: dict[Any, tuple[Any, ...]] = {}
        if self.compiles:
            kinds = [p.is_constexpr for p in jit.params]
            if kinds != sorted(kinds):
                raise TypeError(f"{jit.__name__}: constexpr parameters come last, so that a launch can leave them out")
            self.specialised = [
                (not p.do_not_specialize, not p.do_not_specialize_on_alignment)
                for p in jit.params
                if not p.is_constexpr
            ]
            self.names = [p.name for p in jit.params if p.is_constexpr]

    def __call__(self, grid: tuple[int, ...], constants: Constants, *args: Any) -> None:
        runtime = knobs.runtime
        if (
            not self.compiles
            or JITFunction.run is not Kernel._run
            or runtime.launch_enter_hook.calls
            or runtime.launch_exit_hook.calls
            or self.jit.pre_run_hooks
        ):
            self.jit[grid](*args, **constants)
            return
        active = driver.active
        device = active.get_current_device()
        key = (
            device,
            constants,
            *[
                native_specialize_impl(BaseBackend, value, False, by_value, by_alignment)
                for value, (by_value, by_alignment) in zip(args, self.specialised, strict=True)
            ],
        )
        found = self.compiled.get(key)
        if found is None:
            kernel = self.jit[grid](*args, **constants)
            if kernel is None:  # a hook of Triton's took the compilation upon itself
                return
            self.compiled[key] = (
                kernel.run, kernel.function, kernel.packed_metadata, tuple(constants[name] for name in self.names)
            )  # fmt: skip
            return
        run, function, metadata, rest = found
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        run(x, y, z, active.get_current_stream(device), function, metadata, None, None, None, *args, *rest)
