"""A run of independent stages, each in a process of its own with a time limit, so that none can cost the others their
results.

A stage appends lines to ``OUT/STAGE.jsonl`` as it goes (:class:`Lines`); the runner (:func:`run`) adds a last one
with how it ended.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

LEAST_S = 20.0  # a stage is not begun with less time than this


@dataclass(frozen=True)
class Stage:
    """A name for files, a limit for hangs, and the command to run."""

    name: str
    limit_s: float
    command: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """How a stage ended. status: "ok", "failed" (its exit status was not 0), "time limit" (killed) or "not run" (no
    time left).
    """

    stage: str
    status: str
    seconds: float
    detail: str = ""


def run(
    stages: Sequence[Stage],
    out: pathlib.Path,
    minutes: float,
    say: Callable[[str], object] = print,
    least_s: float = LEAST_S,
) -> list[Outcome]:
    """Run the stages in order within ``minutes`` altogether; returns how each ended. A stage's stderr goes to
    STAGE.stderr.txt.
    """
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60.0 * minutes
    outcomes = []
    for stage in stages:
        left = end - time.monotonic()
        outcome = (
            _run(stage, out, min(left, stage.limit_s))
            if left >= least_s
            else Outcome(stage.name, "not run", 0.0, "no time left")
        )
        _close_lines(out / f"{stage.name}.jsonl", outcome)
        say(
            f"== {stage.name}: {outcome.status} in {outcome.seconds:.0f} s"
            + (f" ({outcome.detail})" if outcome.detail else "")
        )
        outcomes.append(outcome)
    return outcomes


def _run(stage: Stage, out: pathlib.Path, limit_s: float) -> Outcome:
    start = time.monotonic()
    errors = out / f"{stage.name}.stderr.txt"
    with errors.open("w") as stderr:
        # a session of its own: a kill reaches everything the stage has started
        process = subprocess.Popen(stage.command, stdin=subprocess.DEVNULL, stderr=stderr, start_new_session=True)
        try:
            status: int | None = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:  # also on Ctrl-C
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - start
    if status is None:
        return Outcome(stage.name, "time limit", seconds, f"killed after {limit_s:.0f} s")
    if status != 0:
        said = errors.read_text(errors="replace").strip().splitlines()
        return Outcome(
            stage.name, "failed", seconds, f"exit status {status}: {said[-1] if said else 'it said nothing'}"
        )
    return Outcome(stage.name, "ok", seconds)


def _close_lines(path: pathlib.Path, outcome: Outcome) -> None:
    """Append how the stage ended; a line that a kill cut short is ended first, so that the others stay readable."""
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        line = {"stage": outcome.stage, "name": "end", "value": outcome.status, "unit": "status"}
        file.write(
            (json.dumps({**line, "seconds": round(outcome.seconds, 1), "detail": outcome.detail}) + "\n").encode()
        )


def archive(out: pathlib.Path, name: str) -> pathlib.Path:
    """One compressed tar of everything the stages wrote; returns its path in ``out``."""
    path = out / f"{name}.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for file in sorted(out.iterdir()):
            if file.suffix in (".jsonl", ".txt"):
                tar.add(file, arcname=f"{name}/{file.name}")
    return path


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of one stage; a line cut short by a kill is left out."""
    found = []
    for text in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(text))
    return found


class Lines:
    """What a stage writes: one JSON object a line, {"stage", "name", "value", "unit", ...}, flushed at once and shown
    on stdout.
    """

    def __init__(self, out: pathlib.Path, stage: str):
        self.out, self.stage = out, stage
        self.path = out / f"{stage}.jsonl"
        self.path.write_text("")  # a stage that is run again replaces what it wrote

    def write(self, name: str, value: float | str, unit: str, **more: Any) -> None:
        """A number is kept to five digits; one that is not finite is an error, since JSON has no name for it."""
        if not isinstance(value, str):
            if not math.isfinite(value):
                raise ValueError(f"{name}: {value} {unit} is not a measurement")
            value = float(f"{value:.5g}")
        line = {"stage": self.stage, "name": name, "value": value, "unit": unit, **more}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        shown = " ".join(f"{key}={item}" for key, item in more.items() if not isinstance(item, (dict, list)))
        print(f"{self.stage:13} {name:62} {value:>12} {unit} {shown}", flush=True)

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Whatever fails inside is recorded under ``name`` and does not end the stage: one missing backend among
        several.
        """
        try:
            yield
        except Exception as error:
            first = (str(error).strip() or "no message").splitlines()[0]
            self.write(name, f"{type(error).__name__}: {first[:300]}", "error")
