"""Many small pieces of work in a few child processes: one that hangs, crashes or spoils its device costs itself only.

The parent (:func:`work`) hands a free child the next :class:`Item`; the child (:func:`serve`) does one at a time and
answers in JSON lines. A child that is silent for too long is killed, one that ends is replaced, and the item that it
had is recorded as "hung" or "crashed"; the next child goes on after it. While something slow is known to happen (a
kernel is compiled), the child says so and is given longer.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import selectors
import subprocess
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

QUIET_S = 20.0  # a child that has said nothing for so long hangs
CRASHES = 2  # of one group, then the rest of it is not tried
MOST_BYTES = 1 << 20  # of one answer; more is garbage
NO_TIME = "no time left"  # what the detail of an item that was not run for this begins with

Beat = Callable[[float], None]  # "I am alive; wait for so many seconds more than QUIET_S now"


@dataclass(frozen=True)
class Item:
    """name: unique. group: what is given up together after a hang (a backend). task: what the child is told, JSON.
    allow_s: how much longer than QUIET_S it may be silent at its beginning.
    """

    name: str
    group: str
    task: Mapping[str, Any]
    allow_s: float = 0.0


@dataclass(frozen=True)
class Done:
    """status: "done" (``answer`` is what the task returned), "error" (it raised), "hung", "crashed" or "not run";
    detail says why it is not "done".
    """

    item: Item
    status: str
    answer: dict[str, Any] = field(default_factory=dict)
    detail: str = ""


class _Child:
    """A child process. item: what it is working on; None while it starts and when it is free."""

    def __init__(self, command: Sequence[str], stderr: pathlib.Path, environment: Mapping[str, str], start_s: float):
        self.stderr = stderr
        self.ready = False
        self.item: Item | None = None
        self.deadline = time.monotonic() + start_s
        self.data = b""
        with stderr.open("w") as errors:
            # no group of its own: whoever ends the parent's group ends its children
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env={**os.environ, **environment}
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.answers = self.process.stdin, self.process.stdout

    def give(self, item: Item, quiet_s: float) -> None:
        self.item = item
        self.deadline = time.monotonic() + quiet_s + item.allow_s
        with contextlib.suppress(BrokenPipeError):  # it has ended; reading will tell
            self.requests.write(json.dumps(item.task).encode() + b"\n")
            self.requests.flush()

    def lines(self) -> tuple[list[dict[str, Any]], str]:
        """(what it has said, "") or (what it said before that, why no more can come)."""
        found: list[dict[str, Any]] = []
        piece = os.read(self.answers.fileno(), 1 << 16)
        if not piece:
            status = self.process.wait()
            return found, f"ended with status {status}: {self.last_words()}"
        *whole, self.data = (self.data + piece).split(b"\n")
        for line in whole:
            try:
                message = json.loads(line)
            except ValueError:  # also for bytes that are no text
                message = None
            if not isinstance(message, dict) or len(message) != 1:
                return found, f"answered with garbage: {line[:80]!r}"
            found.append(message)
        return found, "answered with garbage without end" if len(self.data) > MOST_BYTES else ""

    def last_words(self) -> str:
        said = self.stderr.read_text(errors="replace").strip().splitlines() if self.stderr.exists() else []
        return said[-1][:300] if said else "it said nothing"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.requests.close()
        self.answers.close()


def work(
    items: Sequence[Item],
    command: Sequence[str],
    stderr: pathlib.Path,
    *,
    count: int = 1,
    quiet_s: float = QUIET_S,
    start_s: float = 120.0,
    end: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Done]:
    """Yield every item as it ends, in any order where ``count`` > 1.

    command: of a child, which must call :func:`serve`. stderr: what the names of the children's stderr files begin
    with. start_s: what a child may take to start. end: time.monotonic() after which nothing is begun or waited for.
    After a hang, or CRASHES crashes, the rest of the item's group is "not run"; after two children in a row that did
    not start, everything is.
    """
    waiting = deque(items)
    hangs: Counter[str] = Counter()
    crashes: Counter[str] = Counter()
    children: list[_Child] = []
    spawned = unstarted = 0
    why_not = ""
    selector = selectors.DefaultSelector()

    def given_up(group: str) -> str:
        if hangs[group]:
            return f"{group} hung before"
        return f"{group} crashed {crashes[group]} times before" if crashes[group] >= CRASHES else ""

    def remove(child: _Child) -> None:
        selector.unregister(child.answers)
        children.remove(child)
        child.close()

    try:
        while True:
            late = end is not None and time.monotonic() >= end
            while waiting and (reason := why_not or (NO_TIME if late else given_up(waiting[0].group))):
                yield Done(waiting.popleft(), "not run", detail=reason)
            for child in list(children):
                if waiting and child.ready and child.item is None:
                    child.give(waiting.popleft(), quiet_s)
                    break  # the next may belong to a group that is given up
            else:
                busy = [child for child in children if child.item is not None]
                if not waiting and not busy:
                    return
                starting = sum(not child.ready for child in children)
                if len(children) < count and len(waiting) > starting:
                    path = stderr.with_name(f"{stderr.name}.{spawned}.stderr.txt")
                    child = _Child(command, path, environment or {}, start_s)
                    spawned += 1
                    children.append(child)
                    selector.register(child.answers, selectors.EVENT_READ, child)
                    continue
                times = [child.deadline for child in children if child.item is not None or not child.ready]
                times += [] if end is None else [end]
                ready = selector.select(max(min(times) - time.monotonic(), 0.0) if times else None)
                for key, _ in ready:
                    child = key.data
                    messages, broken = child.lines()
                    for message in messages:
                        ((kind, value),) = message.items()
                        if kind == "ready":
                            child.ready, unstarted = True, 0
                        elif kind == "beat" and isinstance(value, (int, float)):
                            child.deadline = time.monotonic() + quiet_s + value
                        elif kind in ("done", "error", "dead") and child.item is not None:
                            item, child.item = child.item, None
                            if kind == "dead":
                                crashes[item.group] += 1
                                broken = broken or "ended itself"
                                yield Done(item, "crashed", detail=f"the device could not be used afterwards: {value}")
                            elif kind == "error":
                                yield Done(item, "error", detail=str(value))
                            else:
                                yield Done(item, "done", value)
                        else:
                            broken = broken or f"answered with garbage: {message!r}"[:200]
                    if broken:
                        remove(child)
                        if not child.ready:
                            unstarted += 1
                            why_not = f"two children in a row did not start: {broken}" if unstarted > 1 else ""
                        elif child.item is not None:
                            crashes[child.item.group] += 1
                            yield Done(child.item, "crashed", detail=broken)
                now = time.monotonic()
                for child in list(children):
                    over = end is not None and now >= end
                    if child.item is not None and (over or now >= child.deadline):
                        remove(child)
                        if over:
                            yield Done(child.item, "not run", detail=f"{NO_TIME} to finish it")
                        else:
                            hangs[child.item.group] += 1
                            yield Done(child.item, "hung", detail=f"said nothing for {quiet_s:.0f} s, killed")
                    elif not child.ready and now >= child.deadline:
                        remove(child)
                        unstarted += 1
                        why_not = f"two children in a row did not start within {start_s:.0f} s" if unstarted > 1 else ""
    finally:
        for child in list(children):
            remove(child)
        selector.close()


# -------------------------------------------------------------------------------------------------------- in the child


def serve(
    task: Callable[[dict[str, Any], Beat], Mapping[str, Any]], alive: Callable[[], object] = lambda: None
) -> None:
    """Do what stdin says, line by line, until it closes. What libraries print goes to stderr.

    alive: called after every item; when it raises, the device is of no use any more and the process ends.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(kind: str, value: object) -> None:
        answers.write(json.dumps({kind: value}) + "\n")
        answers.flush()

    say("ready", True)
    for line in sys.stdin:
        try:
            kind, value = "done", dict(task(json.loads(line), lambda seconds: say("beat", seconds)))
        except Exception as error:  # told to the parent, which decides; the trace is in stderr
            traceback.print_exc()
            kind, value = "error", f"{type(error).__name__}: {str(error).strip()[:500]}"  # type: ignore[assignment]
        try:
            alive()
        except Exception as error:
            cause = f"{value}; " if kind == "error" else ""
            say("dead", f"{cause}{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")
            os._exit(1)  # not through the exit handlers of a broken device
        say(kind, value)
