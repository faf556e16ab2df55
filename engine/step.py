"""One optimizer step: micro-batches, backward, reduce, clip, update. What training, tests and benchmarks all call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tritium.engine.optim import AdamW
from tritium.engine.parallel import World


@dataclass(frozen=True)
class MicroBatch:
    """Rows for one forward and backward: ids and targets (B, T) int64, seq_start (B, T) int32 or None."""

    ids: Tensor
    targets: Tensor
    seq_start: Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        start = None if self.seq_start is None else self.seq_start.to(device, non_blocking=True)
        return MicroBatch(self.ids.to(device, non_blocking=True), self.targets.to(device, non_blocking=True), start)


Loss = Callable[[MicroBatch], Tensor]  # the sum of the losses over the micro-batch's targets, () fp32


def train_step(
    loss: Loss,
    optimizer: AdamW,
    batches: Sequence[MicroBatch],
    lr: Tensor,
    inverse_count: Tensor,
    world: World = World(),
) -> tuple[Tensor, Tensor]:
    """Forward and backward over this process's ``batches``, then one update; returns (mean loss, gradient norm), both
    () fp32.

    inverse_count: 1 / number of targets over all micro-batches of all processes. Nothing is read back by the host.
    """
    total = None
    for batch in batches:
        part = loss(batch)
        part.backward()
        total = part.detach() if total is None else total + part.detach()
    assert total is not None, "train_step needs at least one micro-batch"
    if world.size > 1:
        world.sum_(optimizer.stored_gradients())
        world.sum_([total])
    mean = total * inverse_count
    norm = optimizer.step(lr, inverse_count, mean)
    optimizer.zero_grad()
    return mean, norm
