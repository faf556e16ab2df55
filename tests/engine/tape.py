"""What stands for a GPU in tests of captured steps: graphs that record operators on the CPU, and streams that keep
order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Records the operators that run inside, and runs them again on the very tensors: as with a CUDA graph, results
    land where they landed, and whatever the host decided or computed while it recorded stays as it was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[Callable, tuple, dict, object]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.entries.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, recorded in self.entries:
                results = function(*args, **kwargs)
                for old, new in zip(tree_leaves(recorded), tree_leaves(results), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Tapes:
    """engine/capture.py's Graphs for the CPU. log: what was asked for, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.tapes: list[Tape] = []

    @contextlib.contextmanager
    def warming(self) -> Iterator[None]:
        self.log.append("warm")
        yield

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        index = len(self.tapes)
        tape = Tape()
        self.log.append(f"capture {index}")
        with tape:  # it runs here, unlike on a GPU: what it did to the weights is undone by the caller
            function()
        self.tapes.append(tape)

        def replay() -> None:
            self.log.append(f"replay {index}")
            tape.replay()

        return replay


class Streams:
    """torch.cuda's streams as far as engine/host.py uses them. log: (what, on which stream)."""

    class Event:
        def __init__(self, name: str) -> None:
            self.name = name

    class One:
        def __init__(self, owner: Streams, name: str) -> None:
            self.owner, self.name = owner, name

        def wait_event(self, event: Streams.Event) -> None:
            self.owner.log.append(f"{self.name} waits for {event.name}")

        def record_event(self) -> Streams.Event:
            self.owner.events += 1
            self.owner.log.append(f"{self.name} records {self.owner.events}")
            return Streams.Event(str(self.owner.events))

    def __init__(self) -> None:
        self.log: list[str] = []
        self.events = 0
        self.current = self.main = Streams.One(self, "main")

    def Stream(self) -> Streams.One:
        return Streams.One(self, "copies")

    def current_stream(self) -> Streams.One:
        return self.current

    @contextlib.contextmanager
    def stream(self, stream: Streams.One) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before
