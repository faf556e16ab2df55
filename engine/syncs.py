"""``forbidden()``: within, whatever makes the host wait for the device raises, with the op and the line of ours.

A GPU runs behind the host. Where the host reads a tensor (``.item()``, ``if tensor:``, ``.tolist()``, a boolean index,
a copy to the CPU) it waits until the device has caught up, and the device then waits for the host's next launch. The
rules hold for tensors on any device, so that a training step on CPU tensors, or on fake ones, shows what would happen
on a GPU.

A dispatch mode sees the ops (in backward too), a function mode what reads a CPU tensor's memory without one. Our ops
run as they do in eager training, so that what their launchers call is seen as well, and both modes go into the Python
of other custom ops; inside compiled code, and inside any op on fake tensors, nothing is seen. On a GPU torch's own sync
debug mode, which is deeper, is switched on beside them.
torch.compile does not compile under a dispatch mode: of a compiled step, ``reason`` judges the nodes of the graph.
"""

from __future__ import annotations

import contextlib
import linecache
import pathlib
import sys
import sysconfig
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tritium.kernels import autograd

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_INSTALLED = ("<", *{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
_MASKS = (torch.bool, torch.uint8)
# data-dependent and not tagged so by torch
_READS = {"equal", "allclose", "is_nonzero", "unique_dim_consecutive"}
_METHODS = {
    Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__, Tensor.__repr__, Tensor.__format__, Tensor.__dlpack__,
}  # fmt: skip


class HostSync(RuntimeError):
    """The host would have waited for the device."""


def reason(
    function: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = {}, device: str | None = None
) -> str | None:
    """Why the host waits for the device to run ``function`` (an OpOverload) on these arguments, or None.

    Tensors may be real or fake. device: the kind of device that the host must not wait for ("cuda"); what concerns no
    tensor of it is the host's own business. None: tensors on any device stand for those of a GPU.
    """
    if device is not None and device not in _devices(args, kwargs):
        return None
    name = getattr(function, "_opname", "")
    if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"):
        masks = [i for i in args[1] if isinstance(i, Tensor) and i.dtype in _MASKS]
        if not masks or name in ("_unsafe_index", "_unsafe_index_put"):
            return None
        accumulate = bool(args[3] if len(args) > 3 else kwargs.get("accumulate", False))
        if "put" in name and args[2].numel() == 1 and not accumulate:
            return None  # torch fills instead, which needs no count
        return "counts the elements of a boolean index"
    if name == "one_hot":
        classes = args[1] if len(args) > 1 else kwargs.get("num_classes", -1)
        return "reads the number of classes from the data" if classes < 0 else None
    if name == "repeat_interleave":
        sized = (args[3] if len(args) > 3 else kwargs.get("output_size")) is not None
        return None if sized else "reads the length of its result"
    tags = getattr(function, "tags", ())
    if torch.Tag.data_dependent_output in tags or name in _READS:
        return "reads the data on the host"
    if torch.Tag.dynamic_output_shape in tags:
        return "reads the shape of its result from the data"
    if name in ("_to_copy", "copy_", "copy"):
        return _copy(name, args, kwargs)
    return None


def _devices(args: Any, kwargs: Any) -> set[str]:
    leaves = tree_leaves((args, kwargs))
    return {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)} | {
        leaf.type for leaf in leaves if isinstance(leaf, torch.device)
    }


def _copy(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """A copy between host and device, unless it does not wait."""
    if name == "_to_copy":
        source, target = args[0].device, torch.device(kwargs.get("device") or args[0].device)
        waits = not kwargs.get("non_blocking", False)
    else:
        source, target = args[1].device, args[0].device
        waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    if not waits or (source.type == "cpu") == (target.type == "cpu"):
        return None
    return f"copies from {source.type} to {target.type} and waits (non_blocking=True does not)"


class _Dispatch(TorchDispatchMode):
    supports_higher_order_operators = True  # such as flex_attention: what it computes with is seen

    def __init__(self, judge: Callable[[str, str], None], device: str | None, functions: _Functions):
        super().__init__()
        self.judge, self.device, self.functions = judge, device, functions

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = reason(function, args, kwargs or {}, self.device)
        if found is not None:
            self.judge(str(function), found)
        inside = _python_of(function, args, kwargs or {})
        if inside is not None:
            with self.functions, self:
                return inside(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _python_of(function: Any, args: Any, kwargs: Any) -> Callable[..., Any] | None:
    """The Python that the library would run for a torch.library.custom_op on these tensors, or None."""
    op = OPDEFS.get(getattr(getattr(function, "_schema", None), "name", ""))
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if op is None or not leaves or any(isinstance(leaf, FakeTensor) or leaf.is_meta for leaf in leaves):
        return None
    kernels = op._backend_fns
    return kernels.get(leaves[0].device.type, kernels.get(None))


class _Functions(TorchFunctionMode):
    def __init__(self, judge: Callable[[str, str], None], device: str | None):
        super().__init__()
        self.judge, self.device = judge, device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _METHODS and self.device in (None, args[0].device.type):
            self.judge(f"Tensor.{function.__name__}", "reads the data on the host")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def forbidden(allow: Collection[Callable[..., Any]] = (), device: str | None = None) -> Iterator[list[str]]:
    """HostSync for every host synchronisation within; yields the list of those that were allowed, as "OP at FILE:LINE".

    allow: functions in whose calls the host may wait, e.g. the one that logs a step that is long done. device: as for
    ``reason``.
    """
    codes = {getattr(f, "__wrapped__", f).__code__ for f in allow}
    seen: list[str] = []

    def judge(op: str, why: str) -> None:
        frames = list(_frames())
        place = _place(frames)
        if any(frame.f_code in codes for frame in frames):
            seen.append(f"{op} at {place}")
            return
        line = linecache.getline(str(_ROOT / place.rpartition(":")[0]), int(place.rpartition(":")[2])).strip()
        raise HostSync(
            f"{op} at {place} ({line}) {why}: the host would wait for the device here, in every step; compute it on "
            "the device (torch.where, a tensor as argument), or read it later, where steps are logged"
        )

    def synchronize(device: Any = None) -> None:
        judge("torch.cuda.synchronize", "waits for everything")

    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    before = torch.cuda.get_sync_debug_mode() if on_gpu else 0
    original, torch.cuda.synchronize = torch.cuda.synchronize, synchronize
    autograd.watching += 1
    try:
        if on_gpu and not codes:  # that one knows no exceptions
            torch.cuda.set_sync_debug_mode("error")
        functions = _Functions(judge, device)
        with functions, _Dispatch(judge, device, functions):
            yield seen
    finally:
        autograd.watching -= 1
        torch.cuda.synchronize = original
        if on_gpu:
            torch.cuda.set_sync_debug_mode(before)


def _frames() -> Iterator[types.FrameType]:
    """The callers, innermost first, without this file's."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename != __file__:
            yield frame
        frame = frame.f_back


def _place(frames: Sequence[types.FrameType]) -> str:
    """FILE:LINE of the innermost frame of this package, relative to it, or of a user's own file; failing that, of
    whoever called torch."""

    def written_here(frame: types.FrameType) -> bool:
        ours = frame.f_globals.get("__name__", "").startswith("tritium.")
        return ours or not frame.f_code.co_filename.startswith(_INSTALLED)

    others = [f for f in frames if "/torch/" not in f.f_code.co_filename]
    frame = ([f for f in frames if written_here(f)] or others or list(frames))[0]
    path = pathlib.Path(frame.f_code.co_filename)
    return f"{path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path}:{frame.f_lineno}"
