"""How long `tritium train` takes to the end of its first step.

    python -P -m tritium.benchmarks.start [PRESET] [flags of train]

Each start is a process of its own whose temporary folder is empty, as on a machine that has compiled nothing yet: a new
run; a new run that is given the compile_cache.bin of the first; and one that goes on from the first's checkpoint. The
seconds count from before the process is made, when the disk has taken what the last one wrote (a checkpoint of 1.5 GB
would be written during the next start). Give --data.folder, or the first start prepares the data.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

CHILD = """
import contextlib, os, sys, time
began = float(sys.argv.pop(1))
from tritium.engine import cli
def first(self, *args):
    result = step(self, *args)
    print(f"first step after {time.time() - began:.3f} s", flush=True)
    train.Engine.step = step
    if os.environ.get("TRITIUM_STOP_THERE"):
        os._exit(0)
    return result
@contextlib.contextmanager
def garbage_left(original=cli._garbage_left):
    global train, step
    with original():  # torch is loaded within, as it is without us
        from tritium.engine import train
        step, train.Engine.step = train.Engine.step, first
        yield
cli._garbage_left = garbage_left
sys.exit(cli.main(sys.argv[1:]))
"""
SIZE = {
    "model.block_size": 256, "train.batch_rows": 2, "train.micro_rows": 2, "train.log_every": 1,
    "train.eval_tokens": 512, "train.sample_tokens": 1, "run.tensorboard": False,
}  # fmt: skip


def seconds(argv: list[str], out: pathlib.Path, steps: int, stop: bool) -> float:
    """From before the process to the end of its first step. RuntimeError with what it said where it got none."""
    with tempfile.TemporaryDirectory() as empty:
        environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"} | {"TMPDIR": empty}
        if stop:
            environment["TRITIUM_STOP_THERE"] = "1"
        flags = ["train", *argv, "--train.steps", str(steps), "--run.out", str(out)]
        os.sync()
        command = [sys.executable, "-P", "-c", CHILD, str(time.time()), *flags]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = [line.split()[3] for line in done.stdout.splitlines() if line.startswith("first step after")]
    if done.returncode or not found:
        raise RuntimeError(f"the run ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return float(found[0])


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return
    preset, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("gpt2_124m", argv)
    given = [preset, *(word for name, value in SIZE.items() for word in (f"--{name}", str(value))), *flags]
    taken: dict[str, list[float]] = {"from nothing": [], "new, with compile_cache.bin": [], "resumed": []}
    with tempfile.TemporaryDirectory(prefix="tritium-start-") as folder:
        for round in range(3):
            cold, new = (pathlib.Path(folder, f"{name}{round}") for name in ("cold", "new"))
            taken["from nothing"].append(seconds(given, cold, 1, stop=False))
            new.mkdir()
            shutil.copy(cold / "compile_cache.bin", new)
            taken["new, with compile_cache.bin"].append(seconds(given, new, 1, stop=True))
            taken["resumed"].append(seconds(given, cold, 2, stop=True))
            shutil.rmtree(cold)
            first = statistics.median(taken["from nothing"])
            for name, values in taken.items():
                middle = statistics.median(values)
                print(f"{name}: {middle:.2f} s, {middle / first:.0%} ({', '.join(f'{v:.2f}' for v in values)})")
            print(flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
