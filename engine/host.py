"""What the host does beside the steps: batches copied ahead on their own stream, garbage collected between steps."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch

from tritium.engine.step import MicroBatch


class Ahead:
    """Batches on ``device``, the next one under way while the last one is computed with.

    On a GPU its copy runs on a stream of its own, from pinned memory, and the stream that computes waits for that copy
    alone. streams: ``torch.cuda``, or what stands for it in a test.
    """

    def __init__(self, batches: Iterator[MicroBatch], device: torch.device, streams: Any = None):
        self.batches, self.device = batches, device
        self.streams: Any = streams or (torch.cuda if device.type == "cuda" else None)
        self.stream: Any = self.streams.Stream() if self.streams else None
        self.next: tuple[MicroBatch, Any] | None = None

    def __iter__(self) -> Ahead:
        return self

    def __next__(self) -> MicroBatch:
        if self.stream is None:
            return next(self.batches).to(self.device)
        batch, copied = self.next or self._copy()
        self.next = None
        current = self.streams.current_stream()
        current.wait_event(copied)
        for tensor in (batch.ids, batch.targets, batch.seq_start):
            if tensor is not None:
                tensor.record_stream(current)  # made on the other stream: not to be reused before this one is done
        return batch

    def fetch(self) -> None:
        """Start copying the next batch: to be called when the work on the last one has been handed to the device."""
        if self.stream is not None and self.next is None:
            with contextlib.suppress(StopIteration):
                self.next = self._copy()

    def _copy(self) -> tuple[MicroBatch, Any]:
        batch = next(self.batches)
        with self.streams.stream(self.stream):
            moved = batch.to(self.device)
            return moved, self.stream.record_event()

    def close(self) -> None:
        self.next = None
        close = getattr(self.batches, "close", None)
        if close is not None:
            close()


@contextlib.contextmanager
def garbage_at_rest() -> Iterator[None]:
    """For the duration no garbage is collected but by ``gc.collect``: a collection in the middle of a step makes a
    device wait for the host, and of several processes all for the slowest. What was there before is not looked at, nor
    collected now, which takes 0.3 s once the compiler is loaded.
    """
    enabled = gc.isenabled()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
