"""The test suite as several pytest processes, two at a time: python tests/lanes.py [--full] [pytest's arguments]

Triton decides when it is imported whether it interprets, so its interpreter's tests have a process of their own, as
have those that put a fake GPU into torch. The rest is divided so that two cores are busy to the end: the longest begin
first, and what a process says is shown when it is done. Exit status 0 where all passed.

--full: with the full product of options. --oldest FOLDER: the Triton kernels once more, interpreted and compiled ahead
of time, with the Triton in FOLDER.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field

ROOT = pathlib.Path(__file__).resolve().parents[1]
NO_TESTS = 5  # pytest's exit status
# Planted faults show what the tests see, not what a Triton does: they are left out for the oldest.
PLANTED = "mutant or two_per_cent"


@dataclass(frozen=True)
class Lane:
    """One pytest process. seconds: about how long it takes, by which they are sorted."""

    name: str
    seconds: float
    paths: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


INTERPRETED = "tests/kernels_interpreted"
NAMED = (
    Lane("interpreted", 300, (INTERPRETED,), {"TRITON_INTERPRET": "1"}),
    Lane("engine", 250, ("tests/engine",)),
    Lane("benchmarks", 150, ("tests/benchmarks",)),
    Lane("fake GPU", 60, ("tests/fake_cuda",)),
)
LANES = (*NAMED, Lane("the rest", 150, ("tests",), ignored=tuple(path for lane in NAMED for path in lane.paths)))


def with_oldest(folder: str) -> tuple[Lane, ...]:
    """On two cores: attention, which takes the interpreter longest, beside all else."""
    before = {"PYTHONPATH": str(ROOT / folder)}
    interpreted = before | {"TRITON_INTERPRET": "1"}
    ahead = tuple(sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/kernels/test_aot*.py")))
    name = f"with {folder}"
    return (
        Lane(f"{name}: interpreted", 150, (INTERPRETED,), interpreted, (), ("-k", f"not (attention or {PLANTED})")),
        Lane(f"{name}: attention", 90, (INTERPRETED,), interpreted, (), ("-k", f"attention and not ({PLANTED})")),
        Lane(f"{name}: ahead of time", 20, (*ahead, "tests/kernels/test_triton_launch.py"), before),
    )


def start(lane: Lane, given: list[str], log: object) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | lane.environment
    command = [sys.executable, "-P", "-m", "pytest", *lane.paths]
    command += [*(f"--ignore={path}" for path in lane.ignored), *lane.options, *given]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def run(lanes: tuple[Lane, ...], given: list[str], at_once: int) -> dict[str, int]:
    """Name → exit status of each."""
    waiting = sorted(lanes, key=lambda lane: -lane.seconds)
    running: list[tuple[Lane, subprocess.Popen, object, float]] = []
    found: dict[str, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                lane = waiting.pop(0)
                log = tempfile.TemporaryFile()  # noqa: SIM115
                running.append((lane, start(lane, given, log), log, time.monotonic()))
                print(f"{lane.name}: started", flush=True)
            time.sleep(0.2)
            for one in [one for one in running if one[1].poll() is not None]:
                running.remove(one)
                lane, process, log, began = one
                log.seek(0)
                sys.stdout.buffer.write(log.read())
                log.close()
                found[lane.name] = process.returncode
                print(
                    f"{lane.name}: exit status {process.returncode} after {time.monotonic() - began:.0f} s", flush=True
                )
    finally:
        for _, process, _, _ in running:
            process.terminate()
        for _, process, _, _ in running:
            process.wait()
    return found


def passed(found: dict[str, int], given: list[str]) -> bool:
    """Where the caller has chosen tests (-k), a part may have none to run, though not all parts."""
    fine = (0, NO_TESTS) if given else (0,)
    return all(status in fine for status in found.values()) and any(status == 0 for status in found.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--oldest", metavar="FOLDER")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--at-once", type=int, default=2)
    options, given = parser.parse_known_args()
    lanes = LANES + (with_oldest(options.oldest) if options.oldest else ())
    try:
        found = run(lanes, [*(("-m", "not gpu") if options.full else ()), *given], options.at_once)
    except KeyboardInterrupt:
        return 130
    for name, status in found.items():
        print(f"{name}: {'passed' if status == 0 else f'exit status {status}'}")
    return 0 if passed(found, given) else 1


if __name__ == "__main__":
    sys.exit(main())
