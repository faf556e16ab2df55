"""The native library: finding it, saying why it is missing, and calling it.

One plain C library, ``_native.so`` beside the ops (``CMakeLists.txt``). Each kernel is in it once per instruction set
(``base``, and on x86-64 ``v3`` = AVX2 + FMA, ``v4`` = AVX-512 and ``v4_bf16`` = AVX-512 with dot products of bf16); a
:class:`Function` calls the best one this CPU has. Calls release the GIL.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import pathlib
from array import array
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch  # before the library is loaded: it brings the OpenMP runtime both then share
from torch import Tensor

from tritium.kernels.site import Site

ABI = 9  # TRITIUM_ABI of csrc/tritium.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # the codes of csrc/tritium.h
LIBRARY = pathlib.Path(__file__).parents[1] / "_native.so"
REASON = LIBRARY.with_name("_native_missing.txt")  # written by setup.py where the library could not be built
_REBUILD = "rebuild it (make train, or pip install -e .)"


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if not LIBRARY.exists():
        if REASON.exists():
            return f"native library missing: {REASON.read_text().strip()}"
        return f"native library missing: {LIBRARY.name} has not been built; {_REBUILD}"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        abi = library.tritium_abi()
    except (OSError, AttributeError) as error:
        return f"native library unusable: {error}; {_REBUILD}"
    if abi != ABI:
        return f"native library unusable: it was built with interface {abi} and these sources need {ABI}; {_REBUILD}"
    library.tritium_isas.restype = ctypes.c_char_p
    return library


def library() -> ctypes.CDLL | None:
    """The library, where there is one that can be used."""
    found = _load()
    return None if isinstance(found, str) else found


def missing() -> str | None:
    """Why the native library cannot be used, with a remedy; None when it can."""
    found = _load()
    return found if isinstance(found, str) else None


def unsupported(site: Site, dtypes: Sequence[torch.dtype] = tuple(DTYPES)) -> str | None:
    """What every native backend requires of a site: a CPU, a dtype it computes, and the library."""
    if site.device != "cpu":
        return f"the native kernels run on the CPU and this site is on {site.device}; choose reference or triton"
    if site.dtype not in dtypes:
        names = " and ".join(str(d).removeprefix("torch.") for d in dtypes)
        return f"computes {names}, this site is {str(site.dtype).removeprefix('torch.')}; choose reference"
    return missing()


def isas() -> tuple[str, ...]:
    """Instruction sets compiled in which this CPU has, best first."""
    found = _load()
    return () if isinstance(found, str) else tuple(found.tritium_isas().decode().split(","))


_forced: list[str] = []


@contextlib.contextmanager
def use_isa(isa: str) -> Iterator[None]:
    """Call the kernels' ``isa`` copies inside the block, in every thread: for tests and comparisons."""
    if isa not in isas():
        raise ValueError(
            f"instruction set {isa!r} is not one of this library on this CPU: {', '.join(isas()) or missing()}"
        )
    _forced.append(isa)
    try:
        yield
    finally:
        _forced.pop()


class Function:
    """An exported function ``NAME_ISA``, looked up at its first call.

    kinds: one letter an argument: p address, l int64, i int32, f float, d double. result: the same letters, or None for
    void.
    """

    _TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int32, "f": ctypes.c_float, "d": ctypes.c_double}

    def __init__(self, name: str, kinds: str, result: str | None = None):
        self.name, self.kinds, self.result = name, kinds.replace(" ", ""), result
        self._found: dict[str | None, Any] = {}

    def __call__(self, *args: object) -> Any:
        isa = _forced[-1] if _forced else None
        function = self._found.get(isa) or self._find(isa)
        return function(*args)

    def _find(self, isa: str | None) -> Any:
        found = _load()
        if isinstance(found, str):
            raise RuntimeError(found)
        function = found[f"{self.name}_{isa or isas()[0]}"]
        types: dict[str, Any] = self._TYPES
        function.argtypes = [types[k] for k in self.kinds]
        function.restype = types[self.result] if self.result else None
        self._found[isa] = function
        return function


def dense(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each as it is where contiguous, else a copy."""
    return [t if t.is_contiguous() else t.contiguous() for t in tensors]


def copy_back(written: Sequence[Sequence[Tensor]], dense: Sequence[Sequence[Tensor]]) -> None:
    """What was written to copies of tensors that were not contiguous, into these; dense: from :func:`dense`."""
    for theirs, ours in zip(written, dense, strict=True):
        for target, source in zip(theirs, ours, strict=True):
            if target is not source:
                target.copy_(source)


# tables for functions that take lists of tensors; pass ``table.buffer_info()[0]`` and keep the table alive


def sizes(tensors: Sequence[Tensor]) -> array[int]:
    return array("q", [t.numel() for t in tensors])


def addresses(tensors: Sequence[Tensor]) -> array[int]:
    return array("q", [t.data_ptr() for t in tensors])


def codes(tensors: Sequence[Tensor]) -> array[int]:
    return array("i", [DTYPES[t.dtype] for t in tensors])


def rows(x: Tensor) -> Tensor:
    """x (..., C) as (N, C) whose rows have unit stride: a view where possible, else a copy."""
    x = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
