"""The end of ``make gpu``: every figure that has a goal, the goal, and whether it is met; and how each stage ended.

Goals of kernels stand in the ops' cases.py (``GOALS``), for one H100 SXM in bf16; those of training here. A figure that
was not measured is *not run*, never left out.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tritium.benchmarks import record, stages

if TYPE_CHECKING:
    from tritium.benchmarks.gpu_baseline import Bench
    from tritium.kernels.case import Case, Goal
    from tritium.kernels.op import Op
    from tritium.kernels.peaks import Peak

GOAL_GPU = "H100"  # what the goals are for; PCIe and NVL boards of that name are slower
OWN = ("triton", "gluon", "native")  # the backends that are tritium's
OVER = "step over its products and attention"


@dataclasses.dataclass(frozen=True)
class TrainingGoal:
    """Of one GPT-2 on one H100. better: "higher" (at least ``limit``) or "lower" (at most)."""

    preset: str
    limit: float
    unit: str
    better: str
    stage: str


TRAINING_GOALS = (
    TrainingGoal("gpt2_124m", 600e3, "tokens/s", "higher", "training"),
    TrainingGoal("gpt2_350m", 225e3, "tokens/s", "higher", "training_350m"),
    TrainingGoal("gpt2_774m", 108e3, "tokens/s", "higher", "training_774m"),
    TrainingGoal("gpt2_1558m", 57e3, "tokens/s", "higher", "training_1558m"),
    TrainingGoal("gpt2_124m", 1.20, "×", "lower", "anatomy"),
    TrainingGoal("gpt2_1558m", 1.12, "×", "lower", "anatomy_1558m"),
)

ROW: record.Schema = {
    "figure": str, "value": (*record.NUMBER, type(None)),  # null: not run
    "unit": str, "goal": record.NUMBER, "better": str,
    "verdict": str,  # "met", "not met", "not run", or why there is none
    "by": str,  # the backend or kernel choice that the value is of
    "recorded": bool,  # by an earlier run
}  # fmt: skip
SCHEMA: record.Schema = {
    "stages": [{"stage": str, "status": str, "seconds": record.NUMBER, "detail": str}],
    "goals": [ROW],
}


def verdict(value: float | None, goal: float, better: str, no_goal: str = "") -> str:
    """no_goal: why nothing measured here can meet the goal or miss it."""
    if value is None:
        return "not run"
    if no_goal:
        return no_goal
    return "met" if (value >= goal if better == "higher" else value <= goal) else "not met"


def no_goal_for(device: str, rehearsed: bool) -> str:
    """Why the goals do not hold for a device of this name, or ""."""
    if rehearsed:
        return "rehearsed"
    return "" if GOAL_GPU in device and "PCIe" not in device and "NVL" not in device else "no goal for this GPU"


def _row(
    figure: str, value: float | None, unit: str, goal: float, better: str, no_goal: str, by: str = "",
    recorded: bool = False,
) -> dict[str, Any]:  # fmt: skip
    return {
        "figure": figure, "value": value, "unit": unit, "goal": goal, "better": better,
        "verdict": verdict(value, goal, better, no_goal), "by": by, "recorded": recorded,
    }  # fmt: skip


def training_rows(lines: Mapping[str, Sequence[Mapping[str, Any]]], no_goal: str) -> Iterator[dict[str, Any]]:
    """One for each of TRAINING_GOALS: of several kernel choices the best."""
    for goal in TRAINING_GOALS:
        wanted = f"{goal.preset}, tritium" if goal.unit == "tokens/s" else f"{goal.preset}, {OVER}"
        found = [
            line for line in lines.get(goal.stage, ())
            if line["unit"] == goal.unit and line["name"].startswith(wanted)
        ]  # fmt: skip
        pick = max if goal.better == "higher" else min
        best = pick(found, key=lambda line: line["value"], default=None)
        name = f"{goal.preset} {'tokens/s' if goal.unit == 'tokens/s' else OVER}"
        if best is None:
            yield _row(name, None, goal.unit, goal.limit, goal.better, no_goal)
        else:
            by = best["name"].partition("--kernels=")[2]
            yield _row(name, best["value"], goal.unit, goal.limit, goal.better, no_goal, by, "recorded" in best)


def kernel_rows(
    lines: Sequence[Mapping[str, Any]], peak: Peak, no_goal: str, ops: Sequence[Op] | None = None
) -> Iterator[dict[str, Any]]:
    """One for each goal of each op's cases: of tritium's own backends the fastest. A backward is forward+backward less
    forward, of the same backend. peak: for goals that are fractions of what the GPU reached."""
    from tritium.kernels import peaks
    from tritium.kernels.ops import OPS

    for op in OPS.values() if ops is None else ops:
        timed = {
            (line["case"], line["backend"], line["what"]): line
            for line in lines
            if line.get("op") == op.name and line.get("backend") in OWN and line["unit"] == "GB/s"
            and line.get("dtype") == "bf16" and not line.get("compiled")
        }  # fmt: skip
        for case, goal in _goals(op):
            flops, moved, _ = peaks.work(op, case, _bf16(), goal.what)
            best: tuple[float, str, bool] | None = None
            for backend in OWN:
                found = _milliseconds(timed, case.name, backend, goal.what)
                if found is not None and (best is None or found[0] < best[0]):
                    best = (found[0], backend, found[1])
            name = f"{op.name} {case} {goal.what}"
            if best is None:
                yield _row(name, None, goal.unit, goal.rate, "higher", no_goal)
            else:
                rate = goal.rate * peaks.goal_ms(goal, flops, moved, peak) / best[0]
                yield _row(name, rate, goal.unit, goal.rate, "higher", no_goal, best[1], best[2])


def _goals(op: Op) -> Iterator[tuple[Case, Goal]]:
    from tritium.kernels import peaks

    for case in op.cases.CASES:
        for what in ("forward", "backward", "forward+backward", "update") if case.large else ():
            goal = peaks.goal_of(op, case, what)
            if goal is not None:
                yield case, goal


def _bf16() -> Any:
    import torch

    return torch.bfloat16


def _milliseconds(
    timed: Mapping[tuple[str, str, str], Mapping[str, Any]], case: str, backend: str, what: str
) -> tuple[float, bool] | None:
    """(milliseconds, whether an earlier run took them), or None where they were not measured."""
    line = timed.get((case, backend, what))
    if line is not None:
        return line["p50_ms"], "recorded" in line
    both, forward = timed.get((case, backend, "forward+backward")), timed.get((case, backend, "forward"))
    if what == "backward" and both is not None and forward is not None and both["p50_ms"] > forward["p50_ms"]:
        return both["p50_ms"] - forward["p50_ms"], "recorded" in both
    return None


def overhead_rows(lines: Sequence[Mapping[str, Any]], no_goal: str) -> Iterator[dict[str, Any]]:
    """The host's cost of every op's eager call."""
    rows = [line for line in lines if line["unit"] == "us over by hand" and "goal_us" in line]
    for line in rows:
        name = f"{line['name'].partition('.')[0]} eager call over by hand"
        yield _row(name, line["value"], "µs", line["goal_us"], "lower", no_goal, "triton", "recorded" in line)
    if not rows:
        yield _row("an eager call over by hand", None, "µs", 15.0, "lower", no_goal)


def contract_row(lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """How many checks of the contract were red, hung or crashed: holds on every GPU."""
    found = [
        line for name in lines for line in lines[name] if name.startswith("contract") and line["unit"] == "contract"
    ]
    red = sum(line["value"] in ("failed", "hung", "crashed") for line in found)
    shown = sum(line["value"] == "passed" for line in found)
    recorded = bool(found) and all("recorded" in line for line in found)
    return _row("checks of the contract that failed", float(red) if shown or red else None, "checks", 0.0, "lower", "",
                f"{shown} passed" if shown else "", recorded)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- tables


def _number(value: float | None) -> str:
    if value is None:
        return "not run"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


GOAL_HEADS = ("figure", "measured", "goal", "unit", "verdict", "by")
STAGE_HEADS = ("stage", "outcome", "seconds", "detail")


def cells(result: Mapping[str, Any]) -> list[tuple[tuple[str, ...], list[list[str]]]]:
    """Both tables of a record: heads and rows of text."""
    goals = [
        [
            row["figure"], _number(row["value"]), f"{'≥' if row['better'] == 'higher' else '≤'} {_number(row['goal'])}",
            row["unit"], row["verdict"], ", ".join(filter(None, [row["by"], "recorded" if row["recorded"] else ""])),
        ]
        for row in result["goals"]
    ]  # fmt: skip
    ended = [[s["stage"], s["status"], f"{s['seconds']:.0f}", s["detail"]] for s in result["stages"]]
    return [(GOAL_HEADS, goals), (STAGE_HEADS, ended)]


def title(result: Mapping[str, Any]) -> str:
    machine, version = result["machine"], result["versions"]
    met = [row["verdict"] for row in result["goals"]]
    counted = ", ".join(f"{met.count(name)} {name}" for name in dict.fromkeys(met))
    dirty = " (modified)" if result["dirty"] else ""
    return (
        f"{machine['name']}; torch {version['torch']}, triton {version['triton']}, "
        f"commit {result['commit'][:10]}{dirty}, {result['date']}: {counted}"
    )


def text(result: Mapping[str, Any]) -> str:
    """For a terminal."""
    parts = [title(result)]
    for heads, rows in cells(result):
        width = [max(len(line[i]) for line in [list(heads), *rows]) for i in range(len(heads))]
        parts.append("\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, width, strict=True)).rstrip()
            for line in [list(heads), *rows]
        ))  # fmt: skip
    return "\n\n".join(parts) + "\n"


def markdown(result: Mapping[str, Any]) -> str:
    """For a page; figures that were not run are in italics."""
    parts = [f"**{title(result)}**"]
    for heads, rows in cells(result):
        lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for row in rows:
            shown = [f"*{cell}*" if cell == "not run" else cell.replace("|", "\\|") for cell in row]
            lines.append("| " + " | ".join(shown) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------------------------------ the stage


def summary(out: pathlib.Path, names: Sequence[str], environment: Mapping[str, Any], rehearsed: bool) -> dict[str, Any]:
    """The record of a run: see SCHEMA. names: its stages, in order. environment: record.begin's, of the run."""
    from tritium.kernels import peaks

    lines = {name: stages.read_lines(out / f"{name}.jsonl") for name in names}
    no_goal = no_goal_for(environment["machine"]["name"], rehearsed)
    reached = {}
    for line in lines.get("ceilings", ()):  # what this GPU did, rather than another of its name
        if line["name"].startswith("matmul bf16") and line["unit"] == "TFLOP/s":
            reached["measured_matrix"] = 1e12 * line["value"]
        if line["name"].startswith("copy") and line["unit"] == "TB/s":
            reached["measured_copy"] = max(1e12 * line["value"], reached.get("measured_copy", 0.0))
    goals = [
        *training_rows(lines, no_goal),
        contract_row(lines),
        *kernel_rows(lines.get("kernels", ()), dataclasses.replace(peaks.H100, **reached), no_goal),
        *overhead_rows(lines.get("overhead", ()), no_goal),
    ]
    ended = [next((line for line in reversed(found) if line["name"] == "end"), None) for found in lines.values()]
    states: list[dict[str, Any]] = [
        {"stage": name, "status": "not run", "seconds": 0.0, "detail": "not asked for"} if line is None
        else {"stage": name, "status": line["value"], "seconds": line["seconds"], "detail": line["detail"]}
        for name, line in zip(names, ended, strict=True)
    ]  # fmt: skip
    figures = [
        record.figure(g["figure"], g["unit"], g["better"], value=g["value"]) for g in goals if g["value"] is not None
    ]
    checks = [
        record.check(f"stage {state['stage']}", state["status"] not in ("failed", "time limit"), state["detail"])
        for state in states if state["detail"] != "not asked for"
    ]  # fmt: skip
    sources = {
        f"{line['op']}.{line['backend']}": line["digest"]
        for found in lines.values() for line in found if {"op", "backend", "digest"} <= line.keys()
    }  # fmt: skip
    own = {"figures": figures, "checks": checks, "sources": sources, "stages": states, "goals": goals}
    return {**environment, "command": "make gpu", **own}


def table(bench: Bench) -> None:
    """The last stage: table.txt, table.md and gpu.json of this run."""
    from tritium.benchmarks.gpu import STAGES

    out = bench.lines.out
    environment = next(
        (line["environment"] for line in stages.read_lines(out / "device.jsonl") if "environment" in line), None
    )
    if environment is None:
        environment = record.begin("gpu", "make gpu", "cpu")
    result = summary(out, list(STAGES), environment, bench.tiny)
    (out / "table.txt").write_text(text(result))
    (out / "table.md").write_text(markdown(result))
    record.write(result, SCHEMA, out / "gpu.json")
    bench.lines.write("goals", len(result["goals"]), "rows")
