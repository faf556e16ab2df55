"""What blocks keep for backward, in the host's memory: copied there while the next block computes forward, and back one
block ahead of its backward.

    forward    block l computes │ its results → host, on their own stream │ the device's are freed before block l + 2
    backward   block l begins   │ those of block l - 1 come back meanwhile │ each is freed after its last use

The last blocks stay: backward begins with them, and what two of them keep would be under way when it does. What goes
are the storages that autograd saves, whole and once, of at least LEAST bytes; weights and tables do not. The host's
memory is pinned and used again: its order is that of the one stream which writes and reads it. Nothing waits on the
host: the stream that computes waits for copies, by events, where the link is slower than it.

Copies change no bit. torch.compile of single blocks works, as the hooks are around them; of a whole model not, as they
would have to be inside of its graph (torch's own offloading there is marked as being for tests).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tritium.engine.recompute import ByLayer

LEAST = 1 << 16  # bytes of a storage: smaller ones cost more by their number than they free
STAY = 2  # last blocks that always stay


@dataclasses.dataclass(eq=False)
class Entry:
    """One storage that a block keeps. flat: on the device, whole; host: its place there, as bytes. uses: times that
    backward will ask for it."""

    flat: Tensor | None
    like: torch.dtype
    host: Tensor | None = None
    uses: int = 0


@dataclasses.dataclass(eq=False)
class Saved:
    """What one block keeps. copied, fetched: events of the copies there and back."""

    layer: int
    goes: bool
    entries: dict[int, Entry] = dataclasses.field(default_factory=dict)
    copied: Any = None
    fetched: Any = None
    begun: bool = False  # its backward


class Offloaded(ByLayer):
    """Runs blocks, each in its layer's way, and moves what they keep.

    stay: how many of the last blocks keep theirs on the device. streams: ``torch.cuda``, what stands for it in a test,
    or None: copies in order, as on a CPU. place: (bytes) → a tensor of so many bytes on the host.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        ways: Sequence[Callable[..., Tensor]],
        stay: int = STAY,
        streams: Any = None,
        place: Callable[[int], Tensor] | None = None,
    ):
        super().__init__(ways)
        self.model, self.stay, self.streams = model, stay, streams
        self.place = place or functools.partial(torch.empty, dtype=torch.uint8, pin_memory=streams is not None)
        self.stream: Any = streams.Stream() if streams else None
        self.saved: dict[int, Saved] = {}
        self.free: dict[int, list[Tensor]] = {}  # the host's places that are not in use, by bytes
        self.host_bytes = 0  # of all places
        self.moved_bytes = 0  # to the host, in the last forward
        self.kept_here: set[int] = set()  # storages of weights and tables
        self.device = torch.device("cpu")

    def with_ways(self, ways: Sequence[Callable[..., Tensor]]) -> Offloaded:
        return Offloaded(self.model, ways, self.stay, self.streams, self.place)

    def __call__(self, block: Any, *args: Any) -> Tensor:
        if not (self.model.training and torch.is_grad_enabled()):
            return super().__call__(block, *args)
        layer = block.attention.layer
        if layer == 0:
            self._begin()
        self._let_go(layer - STAY)
        saved = self.saved[layer] = Saved(layer, layer < len(self.ways) - self.stay)
        with saved_tensors_hooks(functools.partial(self._pack, saved), functools.partial(self._unpack, saved)):
            y = super().__call__(block, *args)
        if saved.goes:
            self._send(saved)
        return y

    def _begin(self) -> None:
        """A new forward: of the last one nothing is needed any more."""
        for saved in self.saved.values():
            self._give_back(saved)
        self.saved.clear()
        self.moved_bytes = 0
        tensors = [*self.model.parameters(), *self.model.buffers()]
        self.kept_here = {t.untyped_storage()._cdata for t in tensors}
        self.device = tensors[0].device

    # ------------------------------------------------------------------------------------------------ there

    def _pack(self, saved: Saved, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if (
            not saved.goes
            or key in self.kept_here
            or tensor.device != self.device
            or storage.nbytes() < LEAST
            or storage.nbytes() % tensor.itemsize
        ):
            return tensor.detach()  # a node that kept its own result with its history would keep itself
        entry = saved.entries.get(key)  # a key is one storage's while the entry keeps it
        if entry is None:
            flat = tensor.detach().as_strided((storage.nbytes() // tensor.itemsize,), (1,), 0)
            entry = saved.entries[key] = Entry(flat, tensor.dtype)
        entry.uses += 1
        return entry, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()

    def _send(self, saved: Saved) -> None:
        """Copy to the host what the block, whose work has been handed to the device, keeps."""
        with torch.no_grad(), self._beside():
            for entry in saved.entries.values():
                assert entry.flat is not None
                size = entry.flat.nbytes
                entry.host = self.free[size].pop() if self.free.get(size) else self._new(size)
                entry.host.copy_(entry.flat.view(torch.uint8), non_blocking=True)
                self.moved_bytes += size
            if self.stream is not None:
                saved.copied = self.stream.record_event()

    def _new(self, size: int) -> Tensor:
        self.host_bytes += size
        return self.place(size)

    def _let_go(self, layer: int) -> None:
        """Free on the device what lies on the host. The memory is the computing stream's: it may be given out again to
        what that stream does after it has waited for the copy, which is everything from here on."""
        saved = self.saved.get(layer)
        if saved is None or not saved.goes:
            return
        if saved.copied is not None:
            self.streams.current_stream().wait_event(saved.copied)
        for entry in saved.entries.values():
            entry.flat = None

    # ------------------------------------------------------------------------------------------------- back

    def _unpack(self, saved: Saved, packed: Any) -> Tensor:
        if not saved.begun:
            saved.begun = True
            self._fetch(saved.layer)
            if saved.fetched is not None:
                self.streams.current_stream().wait_event(saved.fetched)
            self._fetch(saved.layer - 1)
        if isinstance(packed, Tensor):
            return packed
        entry, dtype, shape, stride, offset = packed
        flat = entry.flat
        if flat is None:
            raise RuntimeError(
                "a backward over blocks whose results were offloaded runs once for each forward, and this is a second "
                "one; use train.recompute=none"
            )
        entry.uses -= 1
        if entry.uses == 0:
            entry.flat = None
        return flat.view(dtype).as_strided(shape, stride, offset)

    def _fetch(self, layer: int) -> None:
        """Begin to copy back what a block keeps, unless it is still here."""
        saved = self.saved.get(layer)
        if saved is None or not saved.goes or all(entry.host is None for entry in saved.entries.values()):
            return
        with torch.no_grad():
            away = [entry for entry in saved.entries.values() if entry.flat is None]
            for entry in away:  # of the computing stream's memory: it is freed in that stream's order
                assert entry.host is not None
                entry.flat = torch.empty(entry.host.nbytes // entry.like.itemsize, dtype=entry.like, device=self.device)
            with self._beside():
                for entry in away:
                    assert entry.flat is not None and entry.host is not None
                    entry.flat.view(torch.uint8).copy_(entry.host, non_blocking=True)
                if self.stream is not None:
                    saved.fetched = self.stream.record_event()
        self._give_back(saved)

    def _give_back(self, saved: Saved) -> None:
        for entry in saved.entries.values():
            if entry.host is not None:
                self.free.setdefault(entry.host.nbytes, []).append(entry.host)
                entry.host = None

    def _beside(self) -> Any:
        """On the copies' stream, after everything that the computing one has been given by now."""
        if self.stream is None:
            return contextlib.nullcontext()
        self.stream.wait_event(self.streams.current_stream().record_event())
        return self.streams.stream(self.stream)
