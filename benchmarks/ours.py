"""tritium's own training step behind the interface of a peer: what ``tritium train`` runs, built by the same
function.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tritium.benchmarks import peers
from tritium.engine import train
from tritium.engine.config import Config, KernelsConfig
from tritium.engine.parallel import World
from tritium.engine.step import MicroBatch
from tritium.kernels.ops import OPS

PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16"}
PARTS = {
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.proj",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}


class Training:
    """An engine in training, one micro-batch a step, in this process or in every one of ``world``."""

    def __init__(self, config: Config, device: str, B: int, world: World | None = None):
        rows = dataclasses.replace(config.train, batch_rows=B, micro_rows=B)
        self.config = dataclasses.replace(config, train=rows)
        self.world = world or World(device=torch.device(device))
        self.deterministic = train.is_deterministic(self.config, self.world.device)
        with self._settings():
            self.engine = train.build(self.config, self.world)
        self.lr = torch.full((), config.optim.lr, device=device)
        self.inverse_count = torch.empty((), device=device)

    def _settings(self) -> contextlib.AbstractContextManager[None]:
        return train.determinism(self.deterministic)  # as train.main does

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take weights in the peers' common naming and start the optimizer anew; every parameter must be given."""
        optimizer = self.engine.optimizer
        peers.assign(optimizer.master_weights(), peers.rename(weights, PARTS))
        optimizer.refresh_copies()
        for state in optimizer.state_dict().values():
            state.zero_()

    def settings(self, ids: Tensor, targets: Tensor) -> dict[str, str]:
        """What was built, as a peer tells it."""
        groups, config = self.engine.optimizer.groups, self.engine.optimizer.config
        return peers.settings(
            precision={PRECISION[self.engine.dtype]}, lr={self.lr.item()}, beta1={config.beta1}, beta2={config.beta2},
            eps={config.eps}, grad_clip={config.grad_clip},
            decay_of_matrices={g.weight_decay for g in groups for p in g.params if p.ndim >= 2},
            decay_of_vectors={g.weight_decay for g in groups for p in g.params if p.ndim < 2},
        )  # fmt: skip

    @contextlib.contextmanager
    def in_fp32(self) -> Iterator[None]:
        """For the duration: the same model and optimizer uncompiled in fp32, by the reference's kernels, of which each
        backend is held to in its own precision."""
        saved = self.engine
        plain = dataclasses.replace(self.config.train, precision="fp32", compile="false")
        config = dataclasses.replace(self.config, train=plain, kernels=KernelsConfig(default="reference"))
        try:
            with self._settings():
                self.engine = train.build(config, self.world)
            yield
        finally:
            self.engine = saved

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean loss without a gradient, () fp32."""
        with torch.no_grad(), self._settings():
            return self.engine.loss(MicroBatch(ids, targets)) / targets.numel()

    def step(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Forward, backward, clip, AdamW, zero; returns the loss before the update, () fp32."""
        self.inverse_count.fill_(1.0 / (targets.numel() * self.world.size))
        with self._settings():
            batch = MicroBatch(ids, targets)
            loss, _ = self.engine.step([batch], self.lr, self.inverse_count)
        return loss


def build(config: Config, device: str = "cpu", B: int = 1, world: World | None = None) -> Training:
    """The preset's own settings with B rows a step of each process. KernelError when a kernel choice cannot be met."""
    return Training(config, device, B, world)


def precision(engine: train.Engine) -> str:
    """Of an engine's products in training: "fp32", "bf16", or "fp8" where any of them is."""
    bound = {OPS[row.op].load(row.backend) for row in engine.table if row.phase == "train"}
    return next((b.precision for b in bound if b.precision is not None), PRECISION[engine.dtype])


def describe(training: Training) -> dict[str, Any]:
    """For records: the settings that ``auto`` resolved to, and the kernel table."""
    engine = training.engine
    mode = "compiled" if engine.compiled else "eager"
    variant = ", ".join([precision(engine), mode, *(["deterministic"] if training.deterministic else [])])
    return {"variant": variant, "kernels": [dataclasses.asdict(row) for row in engine.table if row.phase == "train"]}
