"""``tritium train … --profile 10:13``: a Chrome trace and the memory over time of chosen steps, into RUN/profile.

The trace (steps_10_13.trace.json) opens in https://ui.perfetto.dev or chrome://tracing. Memory is, on a GPU, the
allocator's snapshot (.memory.pickle, for https://pytorch.org/memory_viz), and on a CPU a list of every allocation and
release of torch's allocator (.memory.json). What is learned is the same with and without; the steps take longer.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

MOST_EVENTS = 1_000_000  # of the GPU's allocator, kept in its snapshot


class Tracer:
    """Profiles the steps first … last (None: none) of a run. say, warn: where messages go."""

    def __init__(
        self,
        folder: pathlib.Path,
        steps: tuple[int, int] | None,
        device: torch.device,
        say: Callable[[str], None],
        warn: Callable[[str], None],
        suffix: str = "",
    ):
        self.folder, self.device, self.say, self.warn, self.suffix = folder, device, say, warn, suffix
        self.first, self.last = steps or (1, 0)
        self.profile: torch.profiler.profile | None = None
        self.seen: list[int] = []

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around all that step ``number`` does, from taking its batch."""
        if not self.first <= number <= self.last:
            yield
            return
        if self.profile is None:
            self._start()
        with torch.profiler.record_function(f"step {number}"):
            yield
        self.seen.append(number)
        if number == self.last:
            self.finish()

    def _start(self) -> None:
        kinds = torch.profiler.ProfilerActivity
        activities = [kinds.CPU]
        if self.device.type == "cuda":
            activities.append(kinds.CUDA)
            torch.cuda.synchronize()  # or the trace begins with what was queued before
            torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)
        self.profile = torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True)
        self.profile.start()

    def finish(self) -> None:
        """Write what was seen so far, and see no more. An error of the disk is said, and training goes on."""
        if self.profile is None:
            return
        profile, self.profile = self.profile, None
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        profile.stop()
        name = f"steps_{self.seen[0]}_{self.seen[-1]}{self.suffix}" if self.seen else "none"
        self.first, self.last = 1, 0
        trace, memory = self.folder / f"{name}.trace.json", self.folder / f"{name}.memory.json"
        try:
            if not self.seen:
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            with _whole(trace) as temporary:
                profile.export_chrome_trace(str(temporary))
            if self.device.type == "cuda":
                memory = memory.with_suffix(".pickle")
                with _whole(memory) as temporary:
                    torch.cuda.memory._dump_snapshot(str(temporary))
            else:
                with _whole(memory) as temporary:
                    temporary.write_text(json.dumps(timeline(json.loads(trace.read_text()))))
        except OSError as error:
            self.warn(f"the profile of step {self.seen[0]} to {self.seen[-1]} could not be written ({error})")
            return
        finally:
            if self.device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)
        self.say(f"profile of step {self.seen[0]} to {self.seen[-1]}: {trace} (ui.perfetto.dev), {memory}")


def timeline(trace: dict[str, Any]) -> dict[str, Any]:
    """The memory over time that a Chrome trace of torch.profiler holds (profile_memory=True).

    events: [µs since the first, bytes (negative: released), address, bytes held by then above the beginning]; peak:
    the most of the last.
    """
    found = sorted(
        (event["ts"], event["args"]["Bytes"], event["args"]["Addr"])
        for event in trace["traceEvents"]
        if event.get("name") == "[memory]"
    )
    held, events = 0, []
    for at, size, address in found:
        held += size
        events.append([round(at - found[0][0], 3), size, address, held])
    return {"unit": "bytes", "peak": max((e[3] for e in events), default=0), "events": events}


@contextlib.contextmanager
def _whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write to that becomes ``path`` when all went well."""
    temporary = path.with_name(f".{path.name}")  # its ending stays: torch compresses what ends in .gz
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
