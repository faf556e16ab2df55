"""A step as CUDA graphs: captured once, then replayed without the host's work.

With one micro-batch a step, one graph holds the whole step, and gradients live only inside it. With more, there are
three: the first micro-batch (forward and backward, which make gradients and loss), each further one (which adds its own
to them) and the update (norm, clip, AdamW); so nothing is ever zeroed. What processes sum is summed before the update.
Everything the graphs read or write stays where it is: inputs are copied into place, and what a step returns is copied
out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tritium.engine.optim import AdamW
from tritium.engine.parallel import World
from tritium.engine.step import Loss, MicroBatch, train_step

WARM_UP = 2  # steps that run as they are: they compile, allocate what is made lazily and let libraries set up


class Graphs(Protocol):
    """What captures: ``CudaGraphs``; the tests have one for the CPU."""

    def warming(self) -> contextlib.AbstractContextManager[None]:
        """Where the steps before a capture run."""

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """What replays ``function``, which this may run once or only record."""


class CudaGraphs:
    """torch's CUDA graphs, in one pool of memory, captured on the stream that warmed up."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()
        self.kept: list[torch.cuda.CUDAGraph] = []

    @contextlib.contextmanager
    def warming(self) -> Iterator[None]:
        # on the stream of the capture: autograd sums a leaf's gradient on the stream that it first saw
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            function()
        self.kept.append(graph)
        return graph.replay


class CapturedStep:
    """``train_step`` with the same result, from graphs. micro_batches: how many every step has."""

    def __init__(self, loss: Loss, optimizer: AdamW, world: World, micro_batches: int, graphs: Graphs):
        self.loss, self.optimizer, self.world, self.graphs = loss, optimizer, world, graphs
        self.whole = micro_batches == 1 and world.size == 1
        self.micro_batches, self.done = micro_batches, 0
        self.replay: list[Callable[[], None]] = []  # the whole step; or first micro-batch, further one, update
        self.gradients: list[Tensor] = []  # what the graphs of micro-batches leave to that of the update

    def __call__(self, batches: Sequence[MicroBatch], lr: Tensor, inverse_count: Tensor) -> tuple[Tensor, Tensor]:
        """One step over equally shaped micro-batches; (mean loss, gradient norm), both () fp32."""
        if len(batches) != self.micro_batches:
            raise ValueError(
                f"a captured step has {self.micro_batches} micro-batch(es) and was given {len(batches)}; its graphs "
                "cannot change, build another for that number"
            )
        self.done += 1
        if self.done <= WARM_UP:
            with self.graphs.warming():
                return train_step(self.loss, self.optimizer, batches, lr, inverse_count, self.world)
        if not self.replay:
            self._capture(batches[0], lr, inverse_count)
        self.lr.copy_(lr)
        self.inverse_count.copy_(inverse_count)
        for i, batch in enumerate(batches):
            self._put(batch)
            self.replay[min(i, 1)]()
        if not self.whole:
            if self.world.size > 1:
                self.world.sum_(self.gradients)
                self.world.sum_([self.total])
            self.replay[-1]()
        # the next replay writes over what this one returned, and a loss is read a step late
        return self.mean.clone(), self.norm.clone()

    def _put(self, batch: MicroBatch) -> None:
        for ours, theirs in zip(_tensors(self.batch), _tensors(batch), strict=True):
            if ours.shape != theirs.shape:
                raise ValueError(
                    f"a captured step takes micro-batches of shape {tuple(ours.shape)} and was given "
                    f"{tuple(theirs.shape)}; its graphs cannot change, run that one with train_step"
                )
            ours.copy_(theirs, non_blocking=True)

    def _capture(self, batch: MicroBatch, lr: Tensor, inverse_count: Tensor) -> None:
        self.batch = MicroBatch(
            batch.ids.clone(), batch.targets.clone(), None if batch.seq_start is None else batch.seq_start.clone()
        )
        self.lr, self.inverse_count = lr.clone(), inverse_count.clone()
        zero = torch.zeros_like(inverse_count)
        self.total, self.mean, self.norm = zero, zero.clone(), zero.clone()
        self.optimizer.zero_grad()
        if self.whole:
            self.replay = [self.graphs.capture(self._whole)]
        else:
            self.replay = [self.graphs.capture(self._first)]
            self.gradients = self.optimizer.stored_gradients()
            if self.micro_batches > 1:
                self.replay.append(self.graphs.capture(self._further))
            self.replay.append(self.graphs.capture(self._update))
        self.optimizer.zero_grad()  # a step that is not replayed begins with none

    def _whole(self) -> None:
        loss = self.loss(self.batch)
        loss.backward()
        self.mean.copy_(loss.detach() * self.inverse_count)
        self.norm.copy_(self.optimizer.step(self.lr, self.inverse_count, self.mean))
        self.optimizer.zero_grad()

    def _first(self) -> None:
        loss = self.loss(self.batch)
        loss.backward()
        self.total.copy_(loss.detach())

    def _further(self) -> None:
        loss = self.loss(self.batch)
        loss.backward()
        self.total += loss.detach()

    def _update(self) -> None:
        self.mean.copy_(self.total * self.inverse_count)
        self.norm.copy_(self.optimizer.step(self.lr, self.inverse_count, self.mean))


def _tensors(batch: MicroBatch) -> list[Tensor]:
    return [t for t in (batch.ids, batch.targets, batch.seq_start) if t is not None]
