"""Processes: who we are, and the collectives of a step. The only importer of torch.distributed besides checkpoint.py.

Data parallel: every process computes its own rows; gradients are *summed* (the loss is a sum and the optimizer
divides by the global number of targets), so the result does not depend on how rows were dealt to processes.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tritium.engine.config import ConfigError

CPU = torch.device("cpu")
BUCKET_BYTES = 25 * 2**20  # gradients are reduced in flat pieces of about this size: large enough to be bandwidth-bound


@dataclass(frozen=True)
class World:
    """This process among all: rank, size, the device it computes on."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over all processes, in place; small ones are packed into flat buckets of one dtype."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                self._all_reduce(bucket[0])
                continue
            flat = torch._utils._flatten_dense_tensors(bucket)
            self._all_reduce(flat)
            for tensor, piece in zip(bucket, torch._utils._unflatten_dense_tensors(flat, bucket), strict=True):
                tensor.copy_(piece)

    def _all_reduce(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def share(self, value: object) -> object:
        """The first process's value, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether any process's flag is set."""
        if self.size == 1:
            return flag
        seen = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return bool(seen.item())


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for group in by_dtype.values():
        bucket: list[Tensor] = []
        size = 0
        for tensor in group:
            bucket.append(tensor)
            size += tensor.numel() * tensor.element_size()
            if size >= BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket


@contextmanager
def world(device: str = "auto", timeout_s: float = 600.0) -> Iterator[World]:
    """Join the processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), or be alone; leaves the group at the
    end.
    """
    kind = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "train.device=cuda needs a GPU that this torch can use, and it sees none; use --train.device cpu or auto"
        )
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    place = torch.device("cuda", local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(place)
    if size == 1:
        yield World(device=place)
        return
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=datetime.timedelta(seconds=timeout_s))
    try:
        yield World(dist.get_rank(), dist.get_world_size(), place)
    finally:
        dist.destroy_process_group()
