"""The four sizes of GPT-2 on one GPU, rung by rung: eager, compiled, with fused kernels, with CUDA graphs, in fp8.

    tritium bench ladder [--presets gpt2_124m,gpt2_1558m] [--columns eager,compile] [--T 1024] [--B 8] [--rounds 10]

A cell is one size in one column, trained in a process of its own (:mod:`arm`). The losses of its first steps must be
those of the size's first column that runs, or it gets no figure. Cells of one size that the memory holds at one time
are timed interleaved (:mod:`timing`), and so are paired; the others follow alone. What does not fit the memory, breaks,
or needs what this device or the engine does not have says so in its cell. The intervals cover the rounds of one process
a cell, not what another process of it would differ by.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
import re
import shlex
import sys
import tempfile
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tritium.benchmarks import record, stages, throughput, timing
from tritium.benchmarks.ablate import free_bytes
from tritium.benchmarks.arm import OURS, ArmError, ArmProcess
from tritium.engine import presets
from tritium.engine.config import Config, TrainConfig
from tritium.engine.metrics import flops_per_token
from tritium.kernels.op import nearest
from tritium.kernels.ops import OPS

SIZES = ("gpt2_124m", "gpt2_350m", "gpt2_774m", "gpt2_1558m")
DEFAULT = {"cuda": SIZES, "cpu": ("tiny", "gpt2_124m")}
ROWS = {"gpt2_124m": 32, "gpt2_350m": 16, "gpt2_774m": 16, "gpt2_1558m": 8}  # of a step on a GPU
PATIENCE_S = 1200.0  # for a cell to build, compile and take its first steps
CONVENTIONS: tuple[Literal["full", "causal"], ...] = ("full", "causal")
ROOM = 1.3  # of a neighbour's peak must be free for a cell to be started beside it

INTERVAL: record.Schema = {"median": record.NUMBER, "low": record.NUMBER, "high": record.NUMBER, "level": record.NUMBER}
CELL: record.Schema = {
    "preset": str, "column": str,
    # "ok", "not built yet", "needs a GPU", "needs another GPU", "out of memory", "unequal losses", "failed", "not run"
    "status": str,
    "reason": str,  # of a status that is not ok
    "variant": str,
    "tokens_per_s": (dict, type(None)),  # INTERVAL, over rounds; null, as the next eight, unless ok
    "mfu_full": (*record.NUMBER, type(None)), "mfu_causal": (*record.NUMBER, type(None)),  # of ``peak``
    "over_first": (dict, type(None)),  # tokens/s over the first column's, in the same rounds; null where not paired
    "stable": (bool, type(None)),  # whether its warm-up ended before its limit
    "times": (dict, type(None)), "noise": (*record.NUMBER, type(None)),
    "startup_s": (*record.NUMBER, type(None)), "peak_bytes": (int, type(None)),
    "losses": [record.NUMBER],
}  # fmt: skip
SCHEMA: record.Schema = {
    "settings": {"presets": {str: {"T": int, "B": int}}, "columns": [str], "rounds": int, "seed": int,
                 "precision": str, "kernels": str},
    "peak": {"flop_per_s": record.NUMBER, "of": str},  # what MFU is a fraction of
    "method": str,
    "cells": [CELL],
}  # fmt: skip
METHOD = (
    "one process a cell; equal losses first; warm-up until the medians of two windows of 3 steps agree to 5 %; cells "
    "of a size that fit into memory together are interleaved, a round being every one once in an order and once in its "
    "reverse; interval = 95 % bootstrap over rounds, stretched for few (timing.bootstrap_median)"
)


@dataclasses.dataclass(frozen=True)
class Column:
    """Settings of one rung, on top of those before it. needs: a field of TrainConfig and the value that it must be able
    to have; without, the rung is not built yet.
    """

    name: str
    train: Mapping[str, str]
    kernels: str = ""
    needs: tuple[str, str] | None = None
    gpu: str = ""  # what a CPU lacks for the rung, where it means nothing there
    capability: int = 0  # 10 × major + minor compute capability that the rung needs of a GPU

    def why_not_on(self, device: str) -> str | None:
        """What the device lacks for this rung, or None."""
        if not self.gpu:
            return None
        if device == "cpu":
            return f"a CPU has no {self.gpu}"
        import torch

        major, minor = torch.cuda.get_device_capability()
        if 10 * major + minor >= self.capability:
            return None
        wanted = f"{self.capability // 10}.{self.capability % 10}"
        return f"this GPU's compute capability is {major}.{minor}, and {wanted} is needed"

    def why_not(self) -> str | None:
        """What the engine lacks for this rung, or None."""
        if self.needs is None:
            return None
        field, value = self.needs
        hints = typing.get_type_hints(TrainConfig)
        if field not in hints:
            return f"the engine has no train.{field} yet"
        allowed = typing.get_args(hints[field])
        return None if not allowed or value in allowed else f"the engine has no train.{field}={value} yet"


REFERENCE, FUSED = "reference", "FUSED"  # FUSED: what --kernels says
NO_GRAPHS = {"cuda_graphs": "false"}  # whatever auto comes to mean
EAGER = Column("eager", {"compile": "false", **NO_GRAPHS}, REFERENCE)
COMPILE = Column("compile", {"compile": "true", **NO_GRAPHS}, REFERENCE)
KERNELS = Column("+ fused kernels", {"compile": "true", **NO_GRAPHS}, FUSED)
GRAPHS = Column(
    "+ CUDA graphs", {"compile": "true", "cuda_graphs": "true"}, FUSED, ("cuda_graphs", "true"), "CUDA graphs"
)
FP8 = Column(
    "+ fp8", {"compile": "true", "cuda_graphs": "true", "precision": "fp8"}, FUSED, ("precision", "fp8"),
    "products of fp8 matrices: it emulates them, which shows what is learned and no speed", 89,
)  # fmt: skip
COLUMNS = {"eager": EAGER, "compile": COMPILE, "kernels": KERNELS, "graphs": GRAPHS, "fp8": FP8}


def cell_config(base: Config, column: Column, kernels: str, precision: str) -> Config:
    """The configuration of a cell."""
    chosen = kernels if column.kernels == FUSED else column.kernels
    return base.replace(train={"precision": precision, **column.train}, kernels={"default": chosen})


def status_of(problem: str) -> str:
    """What an arm's end means for its cell: "out of memory" or "failed"."""
    words = ("OutOfMemoryError", "out of memory", "DefaultCPUAllocator: can't allocate", "ended with status -9")
    return "out of memory" if any(word in problem for word in words) else "failed"


def empty_cell(preset: str, column: Column) -> dict[str, Any]:
    nothing = (
        "tokens_per_s",
        "mfu_full",
        "mfu_causal",
        "over_first",
        "stable",
        "times",
        "noise",
        "startup_s",
        "peak_bytes",
    )
    about = {"preset": preset, "column": column.name, "status": "failed", "reason": "", "variant": "", "losses": []}
    return about | dict.fromkeys(nothing)


@dataclasses.dataclass(frozen=True)
class Size:
    """One size's cells, and what they share. kernels: of the fused columns. peak: FLOP/s that MFU is a fraction of."""

    config: Config
    T: int
    B: int
    device: str
    rounds: int
    seed: int
    kernels: str
    precision: str
    peak: float
    cells: dict[str, dict[str, Any]]  # by column
    tables: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # of all cells

    @property
    def first(self) -> dict[str, Any] | None:
        """The cell whose losses the others must have, and whose speed they are held to."""
        return next((cell for cell in self.cells.values() if cell["losses"]), None)

    def fill(self, columns: Sequence[Column]) -> None:
        """Build every cell, and time them as many at a time as the memory holds."""
        alive: dict[str, ArmProcess] = {}
        with tempfile.TemporaryDirectory(prefix="tritium-ladder-") as folder, contextlib.ExitStack() as stack:
            for column in columns:
                cell = self.cells[column.name]
                if (why := column.why_not()) is not None:
                    self._end(column.name, "not built yet", why)
                    continue
                if (why := column.why_not_on(self.device)) is not None:
                    self._end(column.name, "needs a GPU" if self.device == "cpu" else "needs another GPU", why)
                    continue
                if alive and free_bytes(self.device) < ROOM * max(self.cells[name]["peak_bytes"] for name in alive):
                    self._time(alive)
                    stack.pop_all().close()
                    alive = {}
                place = pathlib.Path(folder) / str(columns.index(column))
                place.mkdir()
                # with a compiler's cache of its own, so that starting is from nothing
                arm = stack.enter_context(ArmProcess(OURS, None, place / "cache", place / "stderr.txt"))
                try:
                    self._begin(arm, column)
                except ArmError as error:
                    self._end(column.name, status_of(str(error)), str(error))
                    arm.process.kill()  # the next one may need what it holds
                    continue
                if (why := self._unequal(cell)) is not None:
                    self._end(column.name, "unequal losses", why)
                    arm.process.kill()
                    continue
                alive[column.name] = arm
                _say(f"{cell['preset']}, {column.name}: {cell['variant']}, first step after {cell['startup_s']:.1f} s")
            self._time(alive)

    def _begin(self, arm: ArmProcess, column: Column) -> None:
        started = arm.ask(
            "start", timeout_s=PATIENCE_S, name=arm.name, variant=None, spawned=arm.spawned,
            config=cell_config(self.config, column, self.kernels, self.precision).to_json(),
            B=self.B, T=self.T, device=self.device, seed=self.seed,
        )  # fmt: skip
        losses = arm.losses(throughput.LOSS_STEPS)
        self.tables.extend(row for row in started["kernels"] if row not in self.tables)
        kept = {key: started[key] for key in ("variant", "startup_s", "peak_bytes")}
        self.cells[column.name] |= {"losses": losses, **kept}

    def _unequal(self, cell: dict[str, Any]) -> str | None:
        first = self.first
        assert first is not None
        pair = {c["column"]: (c["losses"], c["variant"]) for c in (first, cell)}
        return "; ".join(throughput.equal_losses(pair)["problems"]) or None

    def _end(self, name: str, status: str, reason: str) -> None:
        self.cells[name] |= {"status": status, "reason": reason[:500]}
        _say(f"{self.cells[name]['preset']}, {name}: {status}: {reason[:500]}")

    def _time(self, alive: Mapping[str, ArmProcess]) -> None:
        """Time the cells that live, interleaved. When one breaks, the others are timed again without it."""
        left = dict(alive)
        samples: dict[str, timing.Samples] = {}
        stable: dict[str, bool] = {}
        while left and not samples:
            running = ""

            def watched(name: str, arm: ArmProcess) -> timing.Arm:
                def run() -> float:
                    nonlocal running
                    running = name
                    return arm.step_ms()

                return run

            arms = {name: watched(name, arm) for name, arm in left.items()}
            try:
                stable = {name: timing.warm_up(step).stable for name, step in arms.items()}
                samples = timing.interleave(arms, self.rounds)
            except ArmError as error:
                self._end(running, status_of(str(error)), str(error))
                del left[running]
        first = self.first
        for name, taken in samples.items():
            speeds = timing.bootstrap_median_of_positive([2e3 * self.B * self.T / sum(pair) for pair in taken.rounds])
            full, causal = (flops_per_token(self.config.model, self.T, kind) for kind in CONVENTIONS)
            over = None
            if first is not None and first["column"] in samples and first["column"] != name:
                over = timing.speedup(taken, samples[first["column"]]).to_json()
            self.cells[name] |= {
                "status": "ok", "tokens_per_s": speeds.to_json(), "over_first": over, "times": taken.to_json(),
                "stable": stable[name],
                "mfu_full": speeds.median * full / self.peak, "mfu_causal": speeds.median * causal / self.peak,
                "noise": timing.noise(taken),
            }  # fmt: skip


def climb(
    sizes: Mapping[str, tuple[int, int]],
    columns: Sequence[Column],
    *,
    rounds: int = 10,
    device: str = "cpu",
    seed: int = 0,
    kernels: str = "auto",
    precision: str = "fp32",
    command: str = "",
) -> dict[str, Any]:
    """The record of all cells. sizes: preset → (T, B). After Ctrl-C, of the cells that were timed by then, with a red
    check (throughput.WHOLE); KeyboardInterrupt where none was."""
    result = record.begin("ladder", command, device)
    peak, of = peak_of(result["machine"], precision)
    cells: list[dict[str, Any]] = []
    tables: list[dict[str, Any]] = []
    stopped = ""
    for preset, (T, B) in sizes.items():
        config = throughput.shaped(preset, T)
        size = Size(
            config, T, B, device, rounds, seed, kernels, precision, peak,
            {column.name: empty_cell(preset, column) for column in columns},
        )  # fmt: skip
        try:
            if not stopped:
                size.fill(columns)
        except KeyboardInterrupt as interrupt:
            stopped = str(interrupt) or throughput.CTRL_C
            if not result["figures"] and not any(cell["status"] == "ok" for cell in size.cells.values()):
                raise
        for cell in size.cells.values():
            if stopped and cell["status"] == "failed" and not cell["reason"]:
                cell |= {"status": "not run", "reason": stopped}
        record.after(result)
        cells += size.cells.values()
        tables += [row for row in size.tables if row not in tables]
        figures = [
            record.figure(
                f"{preset} {cell['column']} tokens/s", "tokens/s", "higher",
                [1e3 * B * T / ms for pair in cell["times"]["rounds_ms"] for ms in pair],
            )
            for cell in size.cells.values() if cell["status"] == "ok"
        ]  # fmt: skip
        result["figures"] += figures
        unequal = [cell["column"] for cell in size.cells.values() if cell["status"] == "unequal losses"]
        first = size.first
        result["checks"] += [
            record.check(f"{preset}: equal losses", not unequal, ", ".join(unequal)),
            record.check(
                f"{preset}: a cell was measured", bool(figures or stopped), f"losses of: {first and first['column']}"
            ),
            *(record.check(f"{preset} {cell['column']}", False, cell["reason"])
              for cell in size.cells.values() if cell["status"] == "failed"),
        ]  # fmt: skip
    if stopped:
        result["checks"].append(record.check(throughput.WHOLE, False, stopped))
    return result | {
        "kernels": tables,
        "sources": record.sources((row["op"], row["backend"]) for row in tables),
        "settings": {
            "presets": {preset: {"T": T, "B": B} for preset, (T, B) in sizes.items()},
            "columns": [column.name for column in columns], "rounds": rounds, "seed": seed, "precision": precision,
            "kernels": kernels,
        },
        "peak": {"flop_per_s": peak, "of": of},
        "method": METHOD,
        "cells": cells,
    }  # fmt: skip


def peak_of(machine: Mapping[str, Any], precision: str) -> tuple[float, str]:
    """(FLOP/s, what they are): the GPU's datasheet, else the best of a few large products measured here."""
    import torch

    from tritium.benchmarks import training
    from tritium.engine import metrics

    datasheet = training.datasheet(dict(machine))
    if datasheet is not None and precision != "fp32":
        return datasheet, "datasheet, dense bf16"
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    side = 8192 if machine["device"] == "cuda" else 1024
    rate = metrics.matmul_rate(torch.device(machine["device"]), dtype, side, side, side)
    return rate, f"measured, {side}³ in {precision}"


# -------------------------------------------------------------------------------------------------------------- tables


def table(result: Mapping[str, Any]) -> str:
    """The record as Markdown: tokens/s with its interval and both MFUs, a size a row, a rung a column."""
    settings, machine, version = result["settings"], result["machine"], result["versions"]
    of = f"{result['peak']['flop_per_s'] / 1e12:.3g} TFLOP/s, {result['peak']['of']}"
    dirty = " (modified)" if result["dirty"] else ""
    lines = [
        f"**GPT-2, tokens/s [95 % interval] and MFU (full, causal; of {of})** on {machine['name']}, "
        f"{settings['precision']}; torch {version['torch']}, triton {version['triton']}, fused kernels: "
        f"{settings['kernels']}, {settings['rounds']} rounds, commit {result['commit'][:10]}{dirty}: "
        f"`{result['command']}`",
        "",
        "| size | " + " | ".join(settings["columns"]) + " |",
        "|---|" + "---:|" * len(settings["columns"]),
    ]
    cells = {(cell["preset"], cell["column"]): cell for cell in result["cells"]}
    for preset, shape in settings["presets"].items():
        shown = [shown_cell(cells[preset, column]) for column in settings["columns"]]
        lines.append(f"| {preset}, T={shape['T']}, B={shape['B']} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def shown_cell(cell: Mapping[str, Any]) -> str:
    if cell["status"] != "ok":
        return f"*{cell['status']}*"
    speed, over = cell["tokens_per_s"], cell["over_first"]
    parts = [
        f"{speed['median']:,.0f} [{speed['low']:,.0f}, {speed['high']:,.0f}]",
        f"{100 * cell['mfu_full']:.1f} %, {100 * cell['mfu_causal']:.1f} %",
    ]
    if over is not None:
        parts.append(f"{over['median']:.2f} × [{over['low']:.2f}, {over['high']:.2f}]")
    return "<br>".join(parts)


# ------------------------------------------------------------------------------------------------------------- command


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="tritium bench ladder", allow_abbrev=False,
        description="GPT-2's sizes, rung by rung: eager, compiled, with fused kernels, CUDA graphs, fp8.",
    )  # fmt: skip
    add = made.add_argument
    add("--presets", default="", help=f"which (default: {','.join(SIZES)}; on a CPU {','.join(DEFAULT['cpu'])})")
    add("--columns", default=",".join(COLUMNS), help="which (default: %(default)s)")
    add("--T", type=int, help="tokens in a row (default: the preset's, on a CPU 256)")
    add("--B", type=int, help="rows in a step (default: by preset; on a CPU 1)")
    add("--rounds", type=int, default=10, help="of two steps of every cell (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--kernels", default="", help="backend of the fused columns (default: triton; on a CPU auto)")
    add("--precision", choices=("fp32", "bf16"), help="of all columns but fp8's (default: bf16; on a CPU fp32)")
    add("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    add("--out", type=pathlib.Path, help="folder of the record (default: benchmarks/results/MACHINE)")
    return made


def _names(made: argparse.ArgumentParser, given: str, known: Sequence[str], noun: str) -> list[str]:
    names = [name for name in given.split(",") if name]
    for name in names:
        if name not in known:
            made.error(f"there is no {noun} {name!r}; the nearest are {nearest(name, known)}. All: {', '.join(known)}")
    return list(dict.fromkeys(names))


def _check(made: argparse.ArgumentParser, a: argparse.Namespace) -> tuple[list[str], list[Column]]:
    """(presets, columns); exit status 2 where the command line cannot be meant, before anything is built."""
    names = _names(made, a.presets, presets.names(), "preset")
    columns = _names(made, a.columns, list(COLUMNS), "column")
    if not columns:
        made.error(f"--columns names no column; columns: {', '.join(COLUMNS)}")
    backends = sorted({"auto", *(name for op in OPS.values() for name in op.backends())})
    if a.kernels and "." not in a.kernels:  # or a module of the user's
        _names(made, a.kernels, backends, "backend")
    for field, least, why in (("rounds", 2, ", or there is no interval"), ("T", 1, ""), ("B", 1, "")):
        value = getattr(a, field)
        if value is not None and value < least:
            made.error(f"--{field} must be at least {least}{why}; it is {value}")
    if not 0 <= a.seed < 2**63:
        made.error(f"--seed must be from 0 to {2**63 - 1}; it is {a.seed}")
    return names, [COLUMNS[name] for name in columns]


def stem(a: argparse.Namespace, names: Sequence[str], defaults: Sequence[str]) -> str:
    """The name of a record's file by what was asked for: a part of the ladder does not replace the whole one."""
    columns = [name for name in a.columns.split(",") if name]
    parts = [
        "+".join(names) if list(names) != list(defaults) else "", "+".join(columns) if columns != list(COLUMNS) else "",
        f"T{a.T}" if a.T else "", f"B{a.B}" if a.B else "", a.precision or "", a.kernels,
    ]  # fmt: skip
    return re.sub(r"[^\w+-]+", "_", "_".join(["ladder", *filter(None, parts)]))


@stages.ended_by_signals()
def main(argv: Sequence[str] | None = None) -> int:
    """``tritium bench ladder``; exit status 0, 1 when a cell fails or losses differ, 2 for a wrong command line, 130
    after Ctrl-C: then the cells that were done are in a record of their own, NAME_stopped.json."""
    argv = list(sys.argv[1:] if argv is None else argv)
    made = parser()
    a, unknown = made.parse_known_args(argv)
    if unknown:
        flags = [flag for action in made._actions for flag in action.option_strings]
        made.error(f"there is no flag {unknown[0]!r}; the nearest are {nearest(unknown[0], flags)}")
    names, columns = _check(made, a)
    import torch

    if a.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: torch finds no GPU here, so there is nothing to time; use --device cpu")
    device = a.device if a.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    names = names or list(DEFAULT[device])
    path = (
        a.out or throughput.results_folder({"machine": record.machine(device)})
    ) / f"{stem(a, names, DEFAULT[device])}.json"
    if why := record.unwritable(path):
        made.error(f"--out: {why}")
    sizes = {}
    for name in names:
        T = a.T or (min(presets.load(name).model.block_size, 1024) if device == "cuda" else 256)
        sizes[name] = (T, a.B or (ROWS.get(name, 8) if device == "cuda" else 1))
    result = climb(
        sizes, columns, rounds=a.rounds, device=device, seed=a.seed,
        kernels=a.kernels or ("triton" if device == "cuda" else "auto"),
        precision=a.precision or ("bf16" if device == "cuda" else "fp32"),
        command=shlex.join(["tritium", "bench", "ladder", *argv]),
    )  # fmt: skip
    stopped = any(check["name"] == throughput.WHOLE for check in result["checks"])
    if stopped:
        path = path.with_name(f"{path.stem}_stopped.json")
    replaced = record.write(result, SCHEMA, path)
    path.with_suffix(".md").write_text(table(result) + "\n")
    print(f"\n{table(result)}\nwritten: {path}{replaced}", flush=True)
    return 130 if stopped else int(not all(check["ok"] for check in result["checks"]))


if __name__ == "__main__":
    sys.exit(main())
