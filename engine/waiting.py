"""How a CPU's threads wait for each other: they spin for a moment where the machine is theirs, and sleep where not.

A step on a CPU is some hundreds of parallel regions, and a thread that has gone to sleep at the end of one wakes up
some 40 µs late for the next: spinning, which is libgomp's own default, makes a step of GPT-2 124M 1.04 and one of tiny
1.15 times as fast. But as soon as anything else runs on those cores, the one that spins takes the time of the one it
waits for: a step becomes several times as long, where with sleeping threads it loses what the other takes (docs/log.md,
2026-11-29).

So the threads spin, for at most SPINS turns, and a :class:`Watch` looks at how long this process's threads have been
ready to run without a core (/proc/*/schedstat). Where that is more than SHARED of the time, it opens a second team of
threads, which sleeps: libgomp does not spin while it has more threads than the machine has cores. When the cores have
been free for a while, the team is closed; so it is at the start too. It imports the standard library alone.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping

SPINS = 20_000  # of libgomp, some 0.3 ms: longer than what lies between two regions, and short against a time slice
PERIOD_S = 0.5
SHARED, FREE = 0.1, 0.05  # of a core: beside one busy process 0.6 and more, alone 0.01
PATIENCE = 4  # periods in which the cores must be free before threads spin again
_OURS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": str(SPINS)}  # the first holds where there are too many threads
_THREADS, _MAPS = pathlib.Path("/proc/self/task"), pathlib.Path("/proc/self/maps")


def begin() -> None:
    """Before torch loads libgomp: choose how threads wait, and watch over it once in a process. What the user has set
    stays; where nothing could watch, waiting threads sleep."""
    global _watch
    if choose(os.environ) and _watch is None:
        _watch = Watch()
        _watch.start()


def choose(environment: MutableMapping[str, str]) -> bool:
    """Set what libgomp reads, unless the user has; whether that is ours, or was a parent's, and wants a watch."""
    if not any(name in environment for name in _OURS):
        environment["OMP_WAIT_POLICY"] = _OURS["OMP_WAIT_POLICY"]
        if waited() is not None:
            environment.update(_OURS)
    environment.setdefault("OMP_WAIT_POLICY", _OURS["OMP_WAIT_POLICY"])
    return is_ours(environment)


def is_ours(environment: Mapping[str, str]) -> bool:
    return all(environment.get(name) == value for name, value in _OURS.items())


def as_given(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what ``choose`` has set: for who is to run as its own users run it."""
    return {k: v for k, v in environment.items() if not (is_ours(environment) and k in _OURS)}


def waited() -> dict[str, int] | None:
    """Nanoseconds that each thread of this process was ready to run and had no core, by its number; None where the
    system does not say (other than Linux, or a kernel without schedstat)."""
    found: dict[str, int] = {}
    try:
        for thread in os.listdir(_THREADS):
            try:
                found[thread] = int((_THREADS / thread / "schedstat").read_text().split()[1])
            except (FileNotFoundError, ProcessLookupError):  # it has ended
                continue
    except (OSError, ValueError, IndexError):
        return None
    return found or None


class Judge:
    """Whether the cores are shared, from how long threads waited for one; slow to believe that they are free. A process
    begins as if they were: while it starts, its own threads import, draw weights and compile beside each other."""

    def __init__(self) -> None:
        self.shared = True
        self.free_for = 0

    def __call__(self, cores: float) -> bool:
        """cores: seconds that threads waited in the last period, summed up, per second of it."""
        if cores > SHARED:
            self.shared, self.free_for = True, 0
        elif self.shared:
            self.free_for = self.free_for + 1 if cores < FREE else 0
            self.shared = self.free_for < PATIENCE
        return self.shared


class Team:
    """Threads of libgomp beside its others, asleep for as long as this lives. start: what opens a team of that many
    threads for the thread that calls it."""

    def __init__(self, start: Callable[[int], object], threads: int):
        self._end = threading.Event()
        ready = threading.Event()

        def keep() -> None:
            start(threads)
            ready.set()
            self._end.wait()  # libgomp closes the team when the thread that opened it ends

        self._keeper = threading.Thread(target=keep, name="tritium-sleeping-team", daemon=True)
        self._keeper.start()
        ready.wait(5.0)

    def close(self) -> None:
        self._end.set()
        self._keeper.join()


def _opener() -> Callable[[int], object] | None:
    """What opens a team in each libgomp that this process has loaded, torch's and any other; None before torch is there
    or where it computes with another OpenMP, which does not read our settings. It asks libgomp itself and not our
    native library, which may be missing or of another version while torch's threads spin all the same.
    """
    if "torch._C" not in sys.modules:
        return None
    mapped = {line.split(maxsplit=5)[-1] for line in _MAPS.read_text().splitlines() if "libgomp" in line}
    runtimes = [ctypes.CDLL(path) for path in sorted(mapped) if os.path.exists(path)]
    nothing = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p)  # what each thread of a team calls, and no Python

    def start(threads: int) -> None:
        for runtime in runtimes:
            runtime.GOMP_parallel(nothing, None, threads, 0)

    return start if runtimes else None


class Watch(threading.Thread):
    """Looks every PERIOD_S seconds and lets threads spin or sleep; ends with the process."""

    def __init__(self, opener: Callable[[], Callable[[int], object] | None] = _opener) -> None:
        super().__init__(name="tritium-watch", daemon=True)
        self._opener, self.judge = opener, Judge()
        self.team: Team | None = None

    def run(self) -> None:
        before = waited()
        while before is not None:
            time.sleep(PERIOD_S)
            now = waited()
            if now is not None:
                nanoseconds = sum(after - before.get(thread, after) for thread, after in now.items())
                self.look(nanoseconds / 1e9 / PERIOD_S)
            before = now

    def look(self, cores: float) -> None:
        shared = self.judge(cores)
        if shared and self.team is None:
            opener = self._opener()
            if opener is not None:
                self.team = Team(opener, len(os.sched_getaffinity(0)) + 1)
        elif not shared and self.team is not None:
            self.team.close()
            self.team = None


_watch: Watch | None = None
