"""What every Triton launcher needs to know about its device, and the reasons every Triton backend may refuse for.

The facts come from Triton's active driver and never from torch.cuda, so that the ahead-of-time checks, which put the
driver of another architecture in its place, compile exactly what a launcher would choose there. The interpreter has no
driver: launchers then act as on an H100 with few processors.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping
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
_devices: dict[tuple[type, int], tuple[int, int, str]] = {}


def _device() -> tuple[int, int, str]:
    """(compute capability, processors, name) of the current device; asked of a driver once, which takes it
    microseconds."""
    if _INTERPRETED:
        return INTERPRETED_ARCH, INTERPRETED_PROCESSORS, ""
    active = driver.active
    device = active.get_current_device()
    found = _devices.get((type(active), device))
    if found is None:
        properties = active.utils.get_device_properties(device)
        name = properties.get("name")  # only the ahead-of-time driver says it, which there is no GPU behind
        if name is None:
            name = torch.cuda.get_device_name(device) if active.get_active_torch_device().type == "cuda" else ""
        count = properties["multiprocessor_count"]
        found = _devices[type(active), device] = (int(active.get_current_target().arch), int(count), name)
    return found


def arch() -> int:
    """The compute capability Triton compiles for: 90 for sm_90."""
    return _device()[0]


def processors() -> int:
    """The number of streaming multiprocessors of the current device."""
    return _device()[1]


def device_name() -> str:
    """The current device's, as torch.cuda has it; "" for the interpreter, and where there is no GPU."""
    try:
        return _device()[2]
    except RuntimeError:  # Triton finds no driver: a config is asked by itself
        return ""


# ------------------------------------------------------------------------------------------------------ measured tiles

TILES = pathlib.Path(__file__).parent.parent / "tuning" / "tiles"


def tiles_path(device: str) -> pathlib.Path:
    """The file of the tiles that were measured on devices of this name (benchmarks/tiles.py writes it)."""
    return TILES / f"{re.sub(r'[^a-z0-9]+', '_', device.lower()).strip('_')}.json"


def read_tiles(path: pathlib.Path) -> list[dict[str, Any]]:
    """The entries of such a file; [] where there is none; ValueError, naming it and what is wrong, for a damaged one.

    Each says in which ``module`` a call of ``function`` with ``arguments`` gives ``tile`` in the place of ``own``.
    """
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path}: it is to be a list of entries, not {type(entries).__name__}")
    for i, entry in enumerate(entries):
        kinds = {"module": str, "function": str, "arguments": dict, "tile": dict, "own": dict}
        if not isinstance(entry, dict) or any(not isinstance(entry.get(name), kind) for name, kind in kinds.items()):
            raise ValueError(f"{path}: entry {i} is to have {', '.join(kinds)}: {str(entry)[:100]}")
        for name, value in entry["tile"].items():
            if (
                type(value) is not int
                or value < 0
                or (name.startswith(("BLOCK", "num_warps")) and value.bit_count() != 1)
            ):
                raise ValueError(f"{path}: entry {i}: {name}={value!r} is no part of a tile")
    return entries


def arguments_of(signature: inspect.Signature, args: Any, kwargs: Mapping[str, Any]) -> dict[str, bool | int | str]:
    """The arguments of one call of a ``config``, as entries have them."""
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return {n: value if isinstance(value, (bool, int)) else str(value) for n, value in bound.arguments.items()}


@functools.cache
def _measured(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Entries by their call. A damaged file costs a warning and the tiles in it, never a launch."""
    try:
        entries = read_tiles(path)
    except ValueError as error:
        warnings.warn(f"{error}; no measured tile is used on this device; delete the file or write it anew "
                      "(STAGE=kernels OPS=... make gpu)", stacklevel=2)  # fmt: skip
        return {}
    return {_call(e["module"], e["function"], e["arguments"]): e for e in entries}


def _call(module: str, function: str, arguments: Mapping[str, Any]) -> str:
    return f"{module}.{function} {json.dumps(arguments, sort_keys=True)}"


def tuned(own: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a ``config``: the tile that was measured to be the fastest for such a call on this device, else its
    own. An entry counts as long as ``own`` gives what it gave when that was measured."""
    signature = inspect.signature(own)
    known: dict[Any, Any] = {}

    @functools.wraps(own)
    def config(*args: Any, **kwargs: Any) -> Any:
        device = device_name()
        key = (device, args, *kwargs.items())
        tile = known.get(key)
        if tile is None:
            tile = own(*args, **kwargs)
            if device and (measured := _measured(tiles_path(device))):
                entry = measured.get(_call(own.__module__, own.__name__, arguments_of(signature, args, kwargs)))
                if entry is not None and entry["own"] == tile._asdict() and entry["tile"].keys() == entry["own"].keys():
                    tile = tile._replace(**entry["tile"])
            known[key] = tile
        return tile

    def cache_clear() -> None:
        known.clear()
        _measured.cache_clear()
        _devices.clear()

    config.cache_clear = cache_clear  # type: ignore[attr-defined]
    return config


# ------------------------------------------------------------------------------------------------------------- launches


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
