"""Everything worth knowing about one GPU in one command: ``make gpu``, or ``python -P benchmarks/gpu.py``.

Needs Python ≥ 3.11, torch, triton and numpy and nothing else: no installation of tritium, no network. Stages run in
order of value, each in a process of its own with a time limit; each leaves OUT/STAGE.jsonl, written as it goes, and
all of them one archive. Exit status 1 when a stage failed or was killed. ``--cpu`` rehearses every stage at tiny
shapes; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import types
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    # run as a file from a source tree that nobody installed: this tree is the namespace package. The script's own
    # folder must leave sys.path, or other libraries would find benchmarks/kernels.py under the name they probe for
    sys.path[:] = [
        entry for entry in sys.path if pathlib.Path(entry or ".").resolve() not in (ROOT, ROOT / "benchmarks")
    ]
    namespace = types.ModuleType("tritium")
    namespace.__path__ = [str(ROOT)]
    sys.modules["tritium"] = namespace

from tritium.benchmarks import stages  # noqa: E402

# name → (module, function, limit in seconds), in order of value
STAGES = {
    "device": ("gpu_baseline", "device", 60),
    "ceilings": ("gpu_baseline", "ceilings", 90),
    "gpt2_124m": ("gpu_baseline", "textbook", 240),
    "contract": ("gpu_tritium", "contract_on_device", 240),
    "training": ("gpu_tritium", "training_by_kernels", 300),
    "attention": ("gpu_baseline", "attention", 150),
    "kernels": ("kernels", "on_device", 180),
    "overhead": ("overhead", "on_device", 90),
    "gemm": ("gpu_baseline", "gemm", 120),
    "memory_bound": ("gpu_baseline", "memory_bound", 150),
    "gpt2_1558m": ("gpu_baseline", "textbook", 200),
    "flex": ("gpu_baseline", "flex", 150),
    "gpt2_350m": ("gpu_baseline", "textbook", 200),
    "gpt2_774m": ("gpu_baseline", "textbook", 200),
    "huggingface": ("gpu_baseline", "huggingface", 200),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; 0 when all that ran ended well, 1 otherwise, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(prog="gpu", description="Measure one GPU: its ceilings, libraries and tritium.")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("runs/gpu"),
        help="folder of the results (default: %(default)s)",
    )
    minutes = float(os.environ.get("GPU_MINUTES") or 9)
    parser.add_argument(
        "--minutes", type=float, default=minutes, help="time for all stages (default: GPU_MINUTES, or 9)"
    )
    parser.add_argument("--stages", default=",".join(STAGES), help="which, in which order (default: %(default)s)")
    parser.add_argument("--cpu", action="store_true", help="rehearse at tiny shapes on the CPU")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a stage's process is called with
    a = parser.parse_args(argv)
    if a.one:
        return run_stage(a.one, a.out, a.cpu)
    names = a.stages.split(",")
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        parser.error(f"there is no stage {', '.join(unknown)}; stages: {', '.join(STAGES)}")
    this = (sys.executable, "-P", str(pathlib.Path(__file__).resolve()), "--out", str(a.out)) + ("--cpu",) * a.cpu
    patience = 3 if a.cpu else 1  # a rehearsal may share a few cores with others
    chosen = [stages.Stage(name, patience * STAGES[name][2], (*this, "--one", name)) for name in names]
    outcomes = stages.run(chosen, a.out, a.minutes, say=lambda text: print(text, flush=True))
    print(f"written: {stages.archive(a.out, 'rehearsal' if a.cpu else 'gpu')}", flush=True)
    return int(any(outcome.status in ("failed", "time limit") for outcome in outcomes))


def run_stage(name: str, out: pathlib.Path, cpu: bool) -> int:
    """One stage, in this process."""
    import importlib

    import torch

    from tritium.benchmarks.gpu_baseline import Bench

    if not cpu and not torch.cuda.is_available():
        raise SystemExit("this measures a GPU and torch sees none; --cpu rehearses the stages without one")
    module, function, _ = STAGES[name]
    lines = stages.Lines(out, name)
    getattr(importlib.import_module(f"tritium.benchmarks.{module}"), function)(
        Bench(lines, "cpu" if cpu else "cuda", tiny=cpu)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
