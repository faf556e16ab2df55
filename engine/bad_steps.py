"""The host's side of bad steps: results that were not read yet, dumps for ``tritium replay``, rollbacks.

A dump is a folder in a checkpoint's format (atomic, checksummed): RUN/bad_steps/step_00000012 holds the micro-batches
and the random state that every process gave to step 12, what the guard knew before it, and weights and moments before
it. A skipped step leaves these as they were, so they can be written afterwards, if every step since was skipped too.
Where one was not, the dump holds the last checkpoint before the bad step instead, and a replay trains the steps between
again. run.json says which (``state``: here, checkpoint, start for new weights, or none), with the loss and the norm
that were seen, the configuration and the kernel table.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tritium.engine import checkpoint
from tritium.engine.guard import WORDS, Guard
from tritium.engine.parallel import World
from tritium.engine.step import MicroBatch

KEPT_BYTES = 64 * 2**20  # of batches that wait for their step's loss; those of older steps are read again if needed
ROLLBACKS = 3  # without a new checkpoint between them, before a run gives up


@dataclass(frozen=True)
class Done:
    """A step that was started. position: its first row in the data order. result: (2 + 8,) fp32 on the device, mean
    loss, gradient norm and the guard's state after it; before: the guard's state before it. batches: as the device got
    them, None where they are not kept. random: of this process, before the step.
    """

    step: int
    position: int
    lr: float
    result: Tensor
    before: Tensor
    batches: list[MicroBatch] | None
    random: dict[str, Tensor]


@dataclass(frozen=True)
class Seen:
    """A step whose result was read."""

    done: Done
    loss: float
    norm: float
    verdict: int
    streak: int
    skipped: int

    def __str__(self) -> str:
        return f"loss {self.loss:.4g}, gradient norm {self.norm:.4g}: {WORDS[self.verdict]}"


class Recent:
    """The steps that were started and not read, oldest first."""

    def __init__(self) -> None:
        self.waiting: deque[Done] = deque()
        self.bytes = 0

    def add(self, done: Done) -> None:
        self.waiting.append(done)
        self.bytes += _bytes(done)
        if self.bytes > KEPT_BYTES:
            i, oldest = next((i, old) for i, old in enumerate(self.waiting) if old.batches is not None)
            self.bytes -= _bytes(oldest)
            self.waiting[i] = dataclasses.replace(oldest, batches=None)

    def read(self, step: int) -> list[Seen]:
        """Read the results of the steps up to ``step``, all at once; the host waits until the device has done them."""
        found: list[Done] = []
        while self.waiting and self.waiting[0].step <= step:
            found.append(self.waiting.popleft())
            self.bytes -= _bytes(found[-1])
        if not found:
            return []
        rows = torch.stack([done.result for done in found])[:, :5].tolist()
        return [
            Seen(done, loss, norm, int(verdict), int(streak), int(skipped))
            for done, (loss, norm, verdict, streak, skipped) in zip(found, rows, strict=True)
        ]

    def clear(self) -> None:
        self.waiting.clear()
        self.bytes = 0


def _bytes(done: Done) -> int:
    return sum(t.nbytes for batch in done.batches or [] for t in _tensors(batch).values())


def _tensors(batch: MicroBatch) -> dict[str, Tensor]:
    found = {"ids": batch.ids, "targets": batch.targets, "seq_start": batch.seq_start}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def folders(out: pathlib.Path) -> list[pathlib.Path]:
    """The dumps of a run, oldest step first."""
    return sorted(path for path in (out / "bad_steps").glob("step_*") if path.is_dir())


@dataclass
class Dumps:
    """Writes the bad steps of one run. limit: how many are kept, the first ones. began: at which step this process
    began to train; fresh: from new weights.
    """

    out: pathlib.Path
    limit: int
    world: World
    began: int
    fresh: bool
    warn: Callable[[str], None]
    told: bool = False  # that there are as many as are kept

    def write(
        self, seen: Seen, intact: bool, state: dict[str, Tensor], batches: list[MicroBatch], meta: dict[str, Any]
    ) -> pathlib.Path | None:
        """Dump one bad step; None where that is not wanted or the disk refuses, which is said. Every process calls it.

        intact: ``state`` (Engine.state()) is the one before the step but for what the guard knew. meta: JSON values
        about the run: "config", "kernels", "task", …
        """
        done = seen.done
        place: Any = self.world.share(self._place(done) if self.world.first else None)
        if place is None:
            return None
        path, base = place
        rank = self.world.rank
        kept = dict(done.random)
        for name in ("ids", "targets", "seq_start"):
            parts = [_tensors(batch)[name] for batch in batches if name in _tensors(batch)]
            if parts:
                kept[f"batch.{name}.{rank}"] = torch.cat(parts)
        before = Guard(0.0, torch.device("cpu"))
        before.state.copy_(done.before)
        guarded = {f"optimizer.{name}": tensor for name, tensor in before.state_dict().items()}
        kept |= (state if intact else {}) | guarded
        source = "here" if intact else "checkpoint" if base is not None else "start" if self.fresh else "none"
        about = {
            **meta, "step": done.step, "position": done.position, "lr": done.lr, "verdict": seen.verdict,
            "loss": seen.loss, "norm": seen.norm, "state": source, "threads": torch.get_num_threads(),
        }  # fmt: skip
        try:
            checkpoint.write(
                path, kept, about, self.world, f"the bad step {done.step}", beside=None if intact else base
            )
        except checkpoint.CheckpointError as error:
            self.warn(f"{error}. Training goes on without this dump")
            return None
        return path

    def _place(self, done: Done) -> tuple[pathlib.Path, pathlib.Path | None] | None:
        """Where to, and the checkpoint to begin from; None where no more are wanted, or this very one is there."""
        there = folders(self.out)
        name = checkpoint.folder_of(self.out, done.step).name
        mine = [path for path in there if path.name.partition(".")[0] == name]
        if any(_position(path) == done.position for path in mine):  # a run that was killed and resumed before it
            return None
        if len(there) >= self.limit:
            if not self.told and self.limit:
                self.warn(
                    f"{self.out / 'bad_steps'} holds {len(there)} bad steps, and run.bad_steps={self.limit}: no more "
                    "are kept. Delete some, or raise --run.bad_steps"
                )
            self.told = True
            return None
        usable = (p for p in checkpoint.candidates(self.out) if self.began <= _step(p) < done.step)
        path = self.out / "bad_steps" / (f"{name}.{len(mine) + 1}" if mine else name)
        return path, next(usable, None)


def _step(path: pathlib.Path) -> int:
    return int(path.name.removeprefix("step_"))


def _position(path: pathlib.Path) -> int | None:
    try:
        return int(checkpoint.verify(path).meta["position"])
    except checkpoint.CheckpointError:
        return None


def streaks(seen: list[Seen]) -> Iterator[Seen]:
    """The first bad step of each streak."""
    return (one for one in seen if one.streak == 1)


class BadSteps(RuntimeError):
    """Training cannot go on: bad steps in a row that no rollback has helped against."""


@dataclass(frozen=True)
class Rollback:
    """From the bad step ``from_step`` back to the checkpoint of ``to_step``; the rows first_row … end_row − 1 of the
    data order were read in between and are not read again. tries: how many since the last checkpoint was written.
    """

    FILE: ClassVar[str] = "rollbacks.json"  # in a run's folder: a list of them, the last one last

    from_step: int
    to_step: int
    first_row: int
    end_row: int
    tries: int

    def append_to(self, out: pathlib.Path) -> None:
        """Written whole: a run that is stopped now goes on from the checkpoint with the rows after these."""
        found = [dataclasses.asdict(one) for one in [*Rollback.read(out), self]]
        checkpoint.write_whole(out / Rollback.FILE, json.dumps(found, indent=2))

    @staticmethod
    def read(out: pathlib.Path) -> list[Rollback]:
        file = out / Rollback.FILE
        return [Rollback(**one) for one in json.loads(file.read_text())] if file.exists() else []
