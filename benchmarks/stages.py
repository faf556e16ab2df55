"""A run of independent stages, each in a process of its own with a time limit, so that none can cost the others their
results.

A stage appends lines to ``OUT/STAGE.jsonl`` as it goes (:class:`Lines`); the runner (:func:`run`) adds a last one
with how it ended. One that hangs, crashes, says nothing or writes without end is ended and named; the next begins.
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
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LEAST_S = 20.0  # a stage is not begun with less time than this
MOST_BYTES = 64 << 20  # of the files that a stage appends to; more is a loop
LOOK_S = 0.5  # between looks at them
GRACE_S = 3.0  # for a stage that is ended, to end by itself
OUT_OF_TIME = 75  # exit status of a stage that has found nothing wrong, but had no time left to show what it is for
STOPPED = "stopped by Ctrl-C or a signal"
SECONDS = "TRITIUM_STAGE_SECONDS"  # environment variable of a stage: after so many it is killed


@dataclass(frozen=True)
class Stage:
    """A name for files, a limit for hangs, and the command to run. expects_s: with less time left it is not begun.
    recorded: why it need not run ("recorded already: FILE"); "" to run it. facts: goes into its last line.
    environment: beside the parent's.
    """

    name: str
    limit_s: float
    command: tuple[str, ...]
    expects_s: float = LEAST_S
    recorded: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a stage ended. status: "ok", "failed" (its exit status was not 0, it wrote nothing, or too much), "time
    limit" (killed, or it ran out of time by itself), "recorded" (need not run) or "not run" (no time left, or the run
    was stopped).
    """

    stage: str
    status: str
    seconds: float
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.stage}: {self.status} in {self.seconds:.0f} s" + (f" ({self.detail})" if self.detail else "")


def run(
    stages: Sequence[Stage],
    out: pathlib.Path,
    end: float,
    say: Callable[[str], object] = print,
    after: Callable[[Outcome], object] = lambda outcome: None,
) -> list[Outcome]:
    """Run the stages in order until ``end`` (time.monotonic()); returns how each ended. A stage's stderr goes to
    STAGE.stderr.txt. after: called when one has ended. Ctrl-C, and a signal that stop_on_signals() turned into it, ends
    the stage that runs; the others are not run.
    """
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    stopped = False
    for stage in stages:
        left = end - time.monotonic()
        if stage.recorded:
            outcome = Outcome(stage.name, "recorded", 0.0, stage.recorded)
        elif stopped:
            outcome = Outcome(stage.name, "not run", 0.0, STOPPED)
        elif left < stage.expects_s:
            outcome = Outcome(stage.name, "not run", 0.0, f"wants {stage.expects_s:.0f} s, {max(left, 0.0):.0f} left")
        else:
            begun = time.monotonic()
            try:
                outcome = _run(stage, out, min(left, stage.limit_s))
            except KeyboardInterrupt:
                stopped = True
                outcome = Outcome(stage.name, "failed", time.monotonic() - begun, STOPPED)
            except OSError as error:  # it could not be started, or its stderr not be written
                outcome = Outcome(stage.name, "failed", 0.0, f"{type(error).__name__}: {error}")
        try:
            _close_lines(out / f"{stage.name}.jsonl", outcome, stage.facts)
        except OSError as error:  # a full disk: how it ended is still said and shown in the table
            say(f"{stage.name}: its last line could not be written: {error}")
        say(f"== {outcome}")
        outcomes.append(outcome)
        after(outcome)
    return outcomes


def stop_on_signals() -> None:
    """Let SIGTERM (of a job's end) and SIGHUP (of a connection's) stop a run as Ctrl-C does: without, what it has
    started would live on, and no table or archive be made. One that is ignored stays so: ``nohup`` asks for that."""
    for number in _heeded():
        signal.signal(number, _stop)


SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def _heeded() -> list[signal.Signals]:
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """The same for the duration, of a function as well: what it has in the folder for temporary files is removed, and
    its children are ended. Nothing in a thread other than the main one, which cannot do it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _stop) for number in _heeded()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(stage: Stage, out: pathlib.Path, limit_s: float) -> Outcome:
    start = time.monotonic()
    lines, errors = out / f"{stage.name}.jsonl", out / f"{stage.name}.stderr.txt"
    lines.unlink(missing_ok=True)  # what an earlier run left there is not this stage's
    why = ""
    with errors.open("w") as stderr:
        # a session of its own: a kill reaches everything the stage has started
        process = subprocess.Popen(
            stage.command, stdin=subprocess.DEVNULL, stderr=stderr, start_new_session=True,
            env={**os.environ, **stage.environment, SECONDS: str(limit_s)},
        )  # fmt: skip
        try:
            while not why:
                left = start + limit_s - time.monotonic()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=max(min(left, LOOK_S), 0.0))
                    break
                if left <= 0.0:
                    why = "time limit"
                elif _bytes(lines) + _bytes(errors) > MOST_BYTES:
                    why = "failed"
        finally:  # also on Ctrl-C
            _end(process)
    seconds = time.monotonic() - start
    if why == "time limit":
        return Outcome(stage.name, why, seconds, f"killed after {limit_s:.0f} s")
    if why:
        return Outcome(stage.name, why, seconds, f"killed: it wrote more than {MOST_BYTES >> 20} MiB")
    if process.returncode == OUT_OF_TIME:
        return Outcome(stage.name, "time limit", seconds, _last_line(errors))
    if process.returncode != 0:
        return Outcome(stage.name, "failed", seconds, f"exit status {process.returncode}: {_last_line(errors)}")
    if not _bytes(lines):
        return Outcome(stage.name, "failed", seconds, "it ended with status 0 and wrote nothing")
    return Outcome(stage.name, "ok", seconds)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a stage to end, so that it removes its temporary files, and kill what is left of it and its children."""
    try:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE_S)
    finally:  # also where a second Ctrl-C does not wait: its session is its own, and nobody else would end it
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _bytes(path: pathlib.Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _last_line(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        file.seek(max(_bytes(path) - 4096, 0))
        said = file.read().decode(errors="replace").strip().splitlines()
    return said[-1][:500] if said else "it said nothing"


def _close_lines(path: pathlib.Path, outcome: Outcome, facts: Mapping[str, str]) -> None:
    """Append how the stage ended; a line that a kill cut short is ended first, so that the others stay readable."""
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        line: dict[str, Any] = {"stage": outcome.stage, "name": "end", "value": outcome.status, "unit": "status"}
        line |= {"seconds": round(outcome.seconds, 1), "detail": outcome.detail, **facts}
        file.write((json.dumps(line) + "\n").encode())


KEPT = (".jsonl", ".json", ".txt", ".md", ".png")  # what stages write


def archive(out: pathlib.Path, name: str, begun: float = 0.0) -> pathlib.Path:
    """One compressed tar of everything the stages wrote since ``begun`` (time.time()); returns its path in ``out``.
    OSError, and no archive, where it cannot be written."""
    path, temporary = out / f"{name}.tar.gz", out / f"{name}.tar.tmp"
    try:
        with tarfile.open(temporary, "w:gz") as tar:
            for file in sorted(out.iterdir()):
                if file.suffix in KEPT and file.stat().st_mtime >= begun - 1.0:
                    tar.add(file, arcname=f"{name}/{file.name}")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of one stage; [] where there is no file. A line that a kill cut short, or garbage, is left out."""
    found = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
            if isinstance(line, dict) and {"name", "value", "unit"} <= line.keys():
                found.append(line)
    return found


def copy_lines(source: pathlib.Path, target: pathlib.Path) -> None:
    """An earlier run's lines of a stage but for how it ended, each with ``recorded``: the file they are from."""
    kept = [line for line in read_lines(source) if line["name"] != "end"]
    target.write_text("".join(json.dumps({"recorded": str(source)} | line) + "\n" for line in kept))


class Lines:
    """What a stage writes: one JSON object a line, {"stage", "name", "value", "unit", ...}, flushed at once and shown
    on stdout.
    """

    def __init__(self, out: pathlib.Path, stage: str, begin: bool = True):
        self.out, self.stage = out, stage
        self.path = out / f"{stage}.jsonl"
        if begin:
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
