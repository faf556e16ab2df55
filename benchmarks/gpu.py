"""Everything worth knowing about one GPU in one command: ``make gpu``, or ``python -P benchmarks/gpu.py``.

Needs Python ≥ 3.11, torch, triton and numpy and nothing else: no installation of tritium, no network. Stages run in
order of value, each in a process of its own with a time limit, while the time lasts; each leaves OUT/STAGE.jsonl,
written as it goes, and all of them one archive with a table of figures, goals and verdicts. What an earlier run has
shown of the same source on the same GPU (benchmarks/results/GPU/) is taken over and not measured again. Exit status 1
when a stage failed or was killed. ``--cpu`` rehearses every stage at tiny shapes; its figures mean nothing.

``STAGE=kernels OPS=attention make gpu`` tunes: it tries the tiles of tiles.py, and writes the best to kernels/tuning/.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import math
import os
import pathlib
import sys
import time
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tritium.benchmarks.gpu_baseline import Bench

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

from tritium.benchmarks import gpu_records, record, stages  # noqa: E402

RESERVE_S = 15.0  # of the minutes, for the table and the archive
EAGER = {"TORCHDYNAMO_DISABLE": "1"}  # a rehearsal of what compiles by itself
INTERPRETED = {"TRITON_INTERPRET": "1"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A stage. limit_s: against hangs; expects_s: what it takes, on a GPU. known: what an earlier run must share so
    that it need not run: "device" (the GPU and torch's version: nothing of tritium is in it), "source" (all of engine/
    and kernels/ too), or "" (it always runs, and takes over item by item). rehearsal: environment of a rehearsal.
    """

    module: str
    function: str
    limit_s: float
    expects_s: float
    known: str = ""
    rehearsal: dict[str, str] = dataclasses.field(default_factory=dict)


# in order of value
STAGES = {
    "device": Plan("gpu_baseline", "device", 60, 0),
    "ceilings": Plan("gpu_baseline", "ceilings", 90, 15, "device"),
    "gpt2_124m": Plan("gpu_baseline", "textbook", 240, 60, "device"),
    "contract": Plan("gpu_tritium", "contract_on_device", 240, 30, "", INTERPRETED),
    "kernels": Plan("gpu_tritium", "speed", 180, 30),
    "tiles": Plan("tiles", "tune", 150, 40, "", INTERPRETED),
    "training": Plan("gpu_tritium", "training_by_kernels", 300, 90, "source"),
    "ablation": Plan("gpu_tritium", "ablation", 420, 180, "source", INTERPRETED),
    "anatomy": Plan("gpu_tritium", "anatomy", 180, 60, "source"),
    "peers": Plan("gpu_tritium", "against_peers", 420, 150, "source", EAGER),
    "training_1558m": Plan("gpu_tritium", "training_of_size", 240, 100, "source"),
    "anatomy_1558m": Plan("gpu_tritium", "anatomy", 240, 90, "source"),
    "training_350m": Plan("gpu_tritium", "training_of_size", 200, 70, "source"),
    "training_774m": Plan("gpu_tritium", "training_of_size", 200, 80, "source"),
    "overhead": Plan("overhead", "on_device", 90, 20, "source"),
    "ladder": Plan("gpu_tritium", "ladder", 900, 300, "source", EAGER),
    "contract_compiled": Plan("gpu_tritium", "contract_on_device", 300, 60),
    "contract_fp32": Plan("gpu_tritium", "contract_on_device", 300, 60),
    "attention": Plan("gpu_baseline", "attention", 150, 60, "device"),
    "gemm": Plan("gpu_baseline", "gemm", 120, 40, "device"),
    "memory_bound": Plan("gpu_baseline", "memory_bound", 150, 40, "device", EAGER),
    "gpt2_1558m": Plan("gpu_baseline", "textbook", 200, 80, "device"),
    "flex": Plan("gpu_baseline", "flex", 150, 40, "device", EAGER),
    "gpt2_350m": Plan("gpu_baseline", "textbook", 200, 60, "device"),
    "gpt2_774m": Plan("gpu_baseline", "textbook", 200, 70, "device"),
    "huggingface": Plan("gpu_baseline", "huggingface", 200, 60, "device"),
}
TABLE = "table"  # the last one, of which nobody can ask


def ops() -> list[str]:
    """The ops' names, from the folders: torch is not loaded for them."""
    return sorted(path.parent.name for path in (ROOT / "kernels").glob("*/reference.py"))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="gpu", description="Measure one GPU: its ceilings, libraries and tritium.", allow_abbrev=False
    )
    made.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("runs/gpu"),
        help="folder of the results (default: %(default)s)",
    )
    made.add_argument(
        "--minutes", default=os.environ.get("GPU_MINUTES") or "9", help="for all of it (default: GPU_MINUTES, or 9)"
    )
    made.add_argument(
        "--stages", default=os.environ.get("STAGE") or ",".join(STAGES),
        help="which, in which order (default: STAGE, or %(default)s)",
    )  # fmt: skip
    made.add_argument(
        "--ops",
        default=os.environ.get("OPS") or "",
        help="only these (default: OPS, or all); kernels is then tiles too",
    )
    made.add_argument("--again", action="store_true", help="also what an earlier run has shown already")
    made.add_argument(
        "--records", type=pathlib.Path,
        help="folder of earlier runs, to which this is added (default: benchmarks/results/GPU; a rehearsal's: none)",
    )  # fmt: skip
    made.add_argument("--cpu", action="store_true", help="rehearse at tiny shapes on the CPU")
    # what the processes of a stage are called with
    made.add_argument("--one", help=argparse.SUPPRESS)
    made.add_argument("--serve", help=argparse.SUPPRESS)
    return made


def _named(made: argparse.ArgumentParser, given: str, known: Sequence[str], noun: str) -> list[str]:
    """The names in a list with commas; exit status 2, with the nearest, for one that is not known."""
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, 3, cutoff=0.0))
            made.error(f"there is no {noun} {name!r}; the nearest are {near}. All: {', '.join(known)}")
    return list(dict.fromkeys(names))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; 0 when all that ran ended well, 1 otherwise, 2 for a wrong command line, 130 after Ctrl-C."""
    made = parser()
    a, unknown = made.parse_known_args(argv)
    if unknown:
        flags = [flag for action in made._actions for flag in action.option_strings]
        near = ", ".join(difflib.get_close_matches(unknown[0], flags, 3, cutoff=0.0))
        made.error(f"there is no flag {unknown[0]!r}; the nearest are {near}")
    names, chosen_ops = _named(made, a.stages, list(STAGES), "stage"), _named(made, a.ops, ops(), "op")
    try:
        minutes = float(a.minutes)
    except ValueError:
        minutes = math.nan
    if not 0.0 < minutes < math.inf:
        made.error(f"--minutes (GPU_MINUTES) is a number above 0, and {a.minutes!r} is none")
    if not names:
        made.error(f"--stages (STAGE) names no stage: {a.stages!r}. All: {', '.join(STAGES)}")
    if a.serve:
        return serve_stage(a.serve, a.out, a.cpu)
    if a.one:
        return run_stage(a.one, a, chosen_ops)
    if chosen_ops and "kernels" in names and "tiles" not in names:
        names.insert(names.index("kernels") + 1, "tiles")
    if absent := [name for name in ("torch", "numpy") if importlib.util.find_spec(name) is None]:
        made.error(
            f"{sys.executable} has no {', '.join(absent)}, and make gpu installs nothing: name a Python that has "
            "torch, triton and numpy, make gpu PYTHON=/path/to/python3"
        )
    if why := record.unwritable(a.out / "gpu.json"):
        made.error(why)
    return run_all([name for name in names if name != "device"], minutes, a, chosen_ops)


def run_all(names: Sequence[str], minutes: float, a: argparse.Namespace, chosen_ops: Sequence[str]) -> int:
    """The stage ``device``, which says whose records count, then the others, the table and the archive."""
    end = time.monotonic() + 60.0 * minutes - RESERVE_S
    stages.stop_on_signals()
    say = lambda text: print(text, flush=True)  # noqa: E731
    a.out.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    for name in (*STAGES, TABLE):  # an earlier run's into the same folder would be in this one's table
        (a.out / f"{name}.jsonl").unlink(missing_ok=True)
    common = [sys.executable, "-P", str(pathlib.Path(__file__).resolve()), "--out", str(a.out)]
    common += ["--cpu"] * a.cpu + ["--again"] * a.again + ["--ops", ",".join(chosen_ops)]
    outcomes = stages.run([_stage("device", common, a)], a.out, max(end, time.monotonic() + 1.0), say)
    facts = gpu_records.facts_of(a.out)
    if outcomes[0].status == "ok" and facts:
        folder = a.records or (None if a.cpu else gpu_records.folder_of(facts["device"]))
        kept = None if folder is None else gpu_records.new_folder(folder)
        earlier = gpu_records.Earlier(folder)
        if folder is not None:
            common += ["--records", str(folder)]
        digest = gpu_records.tree_digest()
        ran = ["device"]

        def keep(outcome: stages.Outcome) -> None:
            if outcome.status not in ("not run", "recorded"):
                ran.append(outcome.stage)
            if kept is not None:
                try:
                    gpu_records.keep(a.out, ran, kept, begun)
                except OSError as error:  # a full disk, or a tree that cannot be written to: OUT has it all
                    say(f"not kept in {kept}: {error}")

        chosen = [_stage(name, common, a, facts, digest, earlier) for name in names]
        outcomes += stages.run(chosen, a.out, end, say, keep)
    else:
        stopped = outcomes[0].detail == stages.STOPPED
        why = stages.STOPPED if stopped else "there is no device to measure"
        outcomes += [stages.Outcome(name, "not run", 0.0, why) for name in names]
        for outcome in outcomes[1:]:
            say(f"== {outcome}")
    table = stages.run([_stage(TABLE, common, a)], a.out, time.monotonic() + 600.0, lambda text: None)[0]
    if table.status != "ok":
        say("\n".join(["", f"the table could not be made: {table.detail}", *map(str, outcomes)]))
    else:
        say("\n" + (a.out / "table.txt").read_text())
    try:
        say(f"written: {stages.archive(a.out, 'rehearsal' if a.cpu else 'gpu', begun)}")
    except OSError as error:
        say(f"the archive could not be written: {error}; what there is lies in {a.out}")
        return 1
    if any(outcome.detail == stages.STOPPED for outcome in outcomes):
        return 130
    return int(any(outcome.status in ("failed", "time limit") for outcome in [*outcomes, table]))


def _stage(
    name: str,
    common: Sequence[str],
    a: argparse.Namespace,
    facts: dict[str, str] | None = None,
    digest: str = "",
    earlier: gpu_records.Earlier | None = None,
) -> stages.Stage:
    """The process of a stage; with ``earlier``, what it need not do again."""
    plan = Plan("gpu_table", "table", 120, 0) if name == TABLE else STAGES[name]
    patience = 3 if a.cpu else 1  # a rehearsal may share a few cores with others
    environment = plan.rehearsal if a.cpu else {}
    command = (*common, "--one", name)
    shared = dict(facts or {})
    if plan.known == "source":
        shared["digest"] = digest
    elif plan.known == "device":
        shared.pop("triton", None)
        shared.pop("tiles", None)
    recorded = None
    if plan.known and earlier is not None and not a.again:
        recorded = earlier.stage(name, shared)
    if recorded is not None:  # its figures belong into this run's table
        with contextlib.suppress(OSError):  # a full disk: the detail says where they are
            stages.copy_lines(recorded, a.out / f"{name}.jsonl")
    return stages.Stage(
        name, patience * plan.limit_s, command, 1.0 if a.cpu or name == "device" else plan.expects_s,
        f"recorded already: {recorded}; --again repeats it" if recorded is not None else "", shared, environment,
    )  # fmt: skip


def run_stage(name: str, a: argparse.Namespace, chosen_ops: Sequence[str]) -> int:
    """One stage, in this process."""
    import importlib

    stages.stop_on_signals()
    plan = Plan("gpu_table", "table", 120, 0) if name == TABLE else STAGES[name]
    seconds = os.environ.get(stages.SECONDS)
    end = None if seconds is None else time.monotonic() + float(seconds) - 5.0  # to write what there is
    this = [sys.executable, "-P", str(pathlib.Path(__file__).resolve()), "--out", str(a.out)] + ["--cpu"] * a.cpu
    facts = gpu_records.facts_of(a.out) if name != "device" else {}
    run = gpu_records.Run(chosen_ops, a.again, gpu_records.Earlier(a.records), end, facts, [*this, "--serve"])
    function = getattr(importlib.import_module(f"tritium.benchmarks.{plan.module}"), plan.function)
    function(_bench(stages.Lines(a.out, name), a.cpu, run, needs_gpu=name != TABLE))
    return 0


def serve_stage(name: str, out: pathlib.Path, cpu: bool) -> int:
    """Items of one stage, in this process, as stdin hands them out."""
    from tritium.benchmarks import gpu_tritium

    gpu_tritium.serve(name, _bench(stages.Lines(out, name, begin=False), cpu, gpu_records.Run()))
    return 0


def _bench(lines: stages.Lines, cpu: bool, run: gpu_records.Run, needs_gpu: bool = True) -> Bench:
    import torch

    from tritium.benchmarks import gpu_baseline

    if needs_gpu and not cpu and not torch.cuda.is_available():
        raise SystemExit("this measures a GPU and torch sees none; --cpu rehearses the stages without one")
    return gpu_baseline.Bench(lines, "cpu" if cpu else "cuda", tiny=cpu, run=run)


if __name__ == "__main__":
    sys.exit(main())
