"""Everything that was measured, on one page.

    tritium bench report [DIR] [--out FILE] [--markdown docs/performance.md]

DIR is searched for records (of every kind, version 1 too) and for the lines that the stages of ``make gpu`` leave. The
page is one HTML file that needs nothing else; ``--markdown`` puts its tables between the markers of a page. A record
with a red check is shown with it, and its speeds are withheld; what has not been measured is called unrun; files that
are no records, or damaged, are named with the reason and cost the page nothing else.

Exit status: 0; 1 when there is nothing to report or a page cannot be written; 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from tritium.benchmarks import compare, gpu, record, stages, timing
from tritium.benchmarks.gpu_table import OVER, TRAINING_GOALS
from tritium.benchmarks.report_page import (
    NOTHING,
    UNRUN,
    Bar,
    Bars,
    Block,
    Cell,
    Points,
    Section,
    Stack,
    Table,
    Text,
    html_page,
    markdown,
)
from tritium.engine import presets

RESULTS = record.ROOT / "benchmarks" / "results" if record.IN_SOURCE_TREE else pathlib.Path("benchmark-results")
MARKERS = ("<!-- measured:begin -->", "<!-- measured:end -->")
OURS = "tritium"  # among the arms of a throughput record (arm.OURS, which would load torch)
LIMIT_BYTES = 64 << 20  # larger files are no records
LIMIT = 1e100  # larger numbers were not measured, and sums of their products overflow
ANY_GPU = "a GPU"
# what a record of someone else's, or of another version, can do to code that reads its own fields
MISFITS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, StopIteration)


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass
class Entry:
    """A record. key: its id in the page. problem: why its kind's own fields could not be shown, or "". rehearsed: by a
    run of make gpu without a GPU, so that its figures mean nothing."""

    path: str
    key: str
    data: dict[str, Any]
    problem: str = ""
    rehearsed: bool = False

    @property
    def red(self) -> list[str]:
        return compare.red(self.data)

    @property
    def machine(self) -> str:
        return machine_name(self.data["machine"])

    def figure(self, name: str) -> dict[str, Any] | None:
        return next((f for f in self.data["figures"] if f["name"] == name), None)


@dataclass
class Run:
    """The stages of one ``make gpu``: stage → its lines. environment: the record that it began with, if any."""

    path: str
    key: str
    lines: dict[str, list[dict[str, Any]]]

    @property
    def environment(self) -> dict[str, Any] | None:
        found = [line.get("environment") for lines in self.lines.values() for line in lines]
        said = [e for e in found if isinstance(e, dict) and isinstance(e.get("kind"), str)]
        current = [record.up_to_date(e) if "schema" in e else e for e in said]
        return next((e for e in current if not record.problems(e, record.COMMON)), None)

    @property
    def rehearsal(self) -> bool:
        """A run without a GPU, whose figures mean nothing."""
        return self.environment is not None and self.environment["machine"]["device"] != "cuda"

    @property
    def machine(self) -> str:
        return "unknown machine" if self.environment is None else machine_name(self.environment["machine"])

    @property
    def red(self) -> list[str]:
        return [f"{stage}: {text}" for stage, lines in self.lines.items() for text in map(wrong, lines) if text]


@dataclass
class Found:
    """What lies in a folder. refused: (file, why it is not shown)."""

    entries: list[Entry] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)

    def of(self, *kinds: str) -> list[Entry]:
        """The records of these kinds that mean something, the newest first."""
        wanted = [e for e in self.entries if e.data["kind"] in kinds and not e.rehearsed]
        return sorted(wanted, key=lambda e: e.data["date"], reverse=True)


def search(folder: pathlib.Path) -> Found:
    """Every record and every stage below ``folder``."""
    found = Found()
    runs: dict[pathlib.Path, dict[str, list[dict[str, Any]]]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".jsonl") and p.is_file()):
        name = str(path.relative_to(folder))
        try:
            if path.stat().st_size > LIMIT_BYTES:
                raise record.RecordError(f"{path.stat().st_size >> 20} MiB, more than a record can have")
            if path.suffix == ".jsonl":
                lines = _stage_lines(path)
                _in_range(lines)
                runs.setdefault(path.parent, {})[path.stem] = lines
            else:
                data = compare.load(path)
                _in_range(data)
                found.entries.append(Entry(name, f"r{len(found.entries)}", data))
        except (record.RecordError, OSError, ValueError, RecursionError) as error:  # ValueError: no text, or no number
            found.refused.append((name, str(error).replace(str(path), name)))
    found.runs += [Run(str(place.relative_to(folder)), f"g{i}", of) for i, (place, of) in enumerate(runs.items())]
    for run in found.runs:
        for entry in found.entries:
            below = pathlib.PurePath(entry.path).parent.is_relative_to(run.path)
            entry.rehearsed = entry.rehearsed or (run.rehearsal and below)
    return found


def _stage_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """RecordError for a file whose lines are no stage's."""
    lines = stages.read_lines(path)
    wanted = {"stage": str, "name": str, "value": (str, *record.NUMBER), "unit": str}
    for line in lines:
        known = {key: value for key, value in line.items() if key in wanted} if isinstance(line, dict) else line
        problems = record.problems(known, wanted, "a line")
        if problems:
            raise record.RecordError(f"its lines are not those of a stage of make gpu: {problems[0][:200]}")
    if not lines:
        raise record.RecordError("it has no line that can be read")
    return lines


def _in_range(value: Any) -> None:
    """RecordError for a number that is out of LIMIT, at any depth; what is not finite may be there, unread."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _in_range(item)
    elif isinstance(value, (int, float)) and LIMIT < abs(value) < float("inf"):
        raise record.RecordError(
            f"it has the number {value:.3g}" if isinstance(value, float) else "it has a huge number"
        )


def wrong(line: dict[str, Any]) -> str:
    """What a line of a stage says went wrong, or ""."""
    name, value, unit = line["name"], line["value"], line["unit"]
    broken = value in ("failed", "error", "hung", "crashed") and unit in ("contract", "item")
    if unit in ("error", "red") or broken or (unit == "verdict" and value != "True"):
        return f"{name}: {value} {line.get('reason', '') or line.get('problems', '')}".strip()
    if unit == "status" and value in ("failed", "time limit"):
        return f"{value}: {line.get('detail', '')}"
    return ""


# -------------------------------------------------------------------------------------------------------------- numbers


def number(value: float) -> str:
    """Four digits, or all of those before the point."""
    if not _is_number(value):
        raise TypeError(f"{value!r} is not a number")
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return "0" if value == 0 else f"{value:#.4g}"


SCALED = ("bytes", "fraction")  # units that are shown as others


def _is_number(value: Any) -> TypeGuard[float]:
    return record.problems(value, record.NUMBER) == []


def quantity(value: float, unit: str) -> str:
    """A figure as one reads it."""
    if unit == "bytes":
        return f"{value / 2**30:.2f} GiB" if abs(value) >= 2**30 else f"{value / 2**20:.1f} MiB"
    if unit == "fraction":
        return f"{100 * value:.1f} %"
    return f"{number(value)} {unit}".strip()


def interval(figure: dict[str, Any]) -> timing.Interval | None:
    """The median of a figure with its interval, where it has the samples."""
    samples = figure["samples"]
    return compare.median_of(samples, figure["restarts"]) if len(samples) >= 2 and min(samples) > 0 else None


def _value(figure: dict[str, Any] | None, unit: bool = True) -> Cell:
    if figure is None:
        return NOTHING
    shown = quantity(figure["value"], figure["unit"]) if unit else number(figure["value"])
    return Cell(shown, float(figure["value"]))


def _ci(ci: timing.Interval | None) -> Cell:
    return NOTHING if ci is None else Cell(f"[{number(ci.low)}, {number(ci.high)}]")


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} × [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def machine_name(machine: dict[str, Any]) -> str:
    return machine["name"] + (f", {machine['cores']} cores" if machine["device"] == "cpu" else "")


def _commit(data: dict[str, Any]) -> str:
    return data["commit"][:10] + (" (modified)" if data["dirty"] else "")


def _day(data: dict[str, Any]) -> Cell:
    return Cell(data["date"][:16].replace("T", " "))


def _origin(entry: Entry) -> list[Cell]:
    """The last two cells of a row: where it comes from."""
    return [Cell(_commit(entry.data), link=entry.key), _day(entry.data)]


# ------------------------------------------------------------------------------------------------------------- sections


@dataclass(frozen=True)
class Speed:
    """Tokens/s of one training configuration. as_it_is: the preset with nothing changed, as one trains it; no rung of
    the ladder, no other model's parts or other settings. withheld: a check of its record is red."""

    preset: str
    shape: str
    what: str
    machine: str
    cuda: bool
    as_it_is: bool
    date: str
    tokens_per_s: float
    ci: timing.Interval | None
    more: tuple[Cell, Cell, Cell, Cell]  # MFU full and causal, step over its own, peak memory
    origin: tuple[Cell, Cell]
    withheld: bool


def speeds(found: Found) -> list[Speed]:
    """What tritium trained at, by every record and stage that says so: the newest first, of one record the fastest."""
    made = [s for entry in found.of("train", "throughput", "ladder") for s in _own(entry, _speeds)]
    made += [s for run in found.runs for s in _run_speeds(run)]
    return sorted(made, key=lambda s: (s.date, s.tokens_per_s), reverse=True)


def _speeds(entry: Entry) -> list[Speed]:
    data, kind = entry.data, entry.data["kind"]
    first, second = _origin(entry)

    def speed(
        preset: object,
        shape: dict[str, Any],
        what: str,
        as_it_is: bool,
        value: float,
        ci: timing.Interval | None,
        *more: Cell,
    ) -> Speed:
        return Speed(
            str(preset), f"T={shape['T']}, B={shape['B']}", what, entry.machine, data["machine"]["device"] == "cuda",
            as_it_is, data["date"], value, ci, (more[0], more[1], more[2], more[3]), (first, second), bool(entry.red),
        )  # fmt: skip

    if kind == "train":
        mode = "compiled" if data["compilation"]["compiled"] else "eager"
        dtype = {"bfloat16": "bf16", "float32": "fp32"}.get(data["dtype"], data["dtype"])
        over, figure = data["step_over_own"], _figure(entry, "tokens/s")
        return [
            speed(
                data["preset"], data["settings"], f"{dtype}, {mode}", as_it_is(data),
                figure["value"], interval(figure),
                *(_value(entry.figure(f"MFU, {full} of measured matmul")) for full in ("full", "causal")),
                Cell("{median:.3f} [{low:.3f}, {high:.3f}]".format(**over), over["median"]),
                _value(entry.figure("peak memory")),
            )
        ]  # fmt: skip
    if kind == "throughput":
        figures = {key: _figure(entry, f"{key} tokens/s") for key, arm in data["arms"].items() if arm["peer"] == OURS}
        models, same = data["settings"].get("models", {}), as_it_is(data)
        parts = {  # what of the preset's model is another one; a record of version 1 had only that itself
            key: models.get(data["arms"][key].get("model"), {}).get("changed", "") for key in figures
        }
        return [
            speed(
                data["preset"], data["settings"], ", ".join(filter(None, [data["arms"][key]["variant"], parts[key]])),
                same and not parts[key], figure["value"], interval(figure),
                NOTHING, NOTHING, NOTHING, _bytes(data["arms"][key]["peak_bytes"]),
            )
            for key, figure in figures.items()
        ]  # fmt: skip
    return [
        speed(
            cell["preset"], data["settings"]["presets"][cell["preset"]], f"{cell['variant']} ({cell['column']})", False,
            cell["tokens_per_s"]["median"], timing.Interval(**cell["tokens_per_s"]),
            NOTHING, NOTHING, NOTHING, _bytes(cell["peak_bytes"]),
        )
        for cell in data["cells"] if cell["status"] == "ok"
    ]  # fmt: skip


CHANGES = ("kernels", "precision", "model", "train", "optim")  # flags, and sections of flags, that change a preset


def as_it_is(data: dict[str, Any]) -> bool:
    """Whether the preset was measured with no flag that changes it."""
    flags = [word[2:].partition("=")[0].partition(".")[0] for word in data["command"].split() if word[:2] == "--"]
    return not set(flags) & set(CHANGES)


def _bytes(count: int) -> Cell:
    return Cell(quantity(count, "bytes"), count)


def _figure(entry: Entry, name: str) -> dict[str, Any]:
    figure = entry.figure(name)
    if figure is None:
        raise LookupError(f"it has no figure {name!r}")
    return figure


def _run_speeds(run: Run) -> list[Speed]:
    if run.rehearsal:
        return []
    made, environment = [], run.environment
    for stage, lines in run.lines.items():
        unfit = any(wrong(line) for line in lines if line["unit"] in ("verdict", "status"))
        for line in lines:
            preset, comma, what = line["name"].partition(", ")
            ours = comma and "tritium" in what and "recorded" not in line  # an earlier run's is in its own folder
            if line["unit"] == "tokens/s" and ours and not isinstance(line["value"], str):
                peak = line.get("peak_gib")
                cells = [NOTHING, NOTHING, NOTHING, NOTHING]
                if _is_number(full := line.get("full_over_measured_matmul")):
                    cells[0] = Cell(quantity(full, "fraction"), full)
                if _is_number(peak):
                    cells[3] = Cell(f"{peak:.2f} GiB", peak * 2**30)
                made.append(
                    Speed(
                        preset, f"T={line.get('T', '?')}, B={line.get('B', '?')}", what, run.machine, True, True,
                        environment["date"] if environment else "", float(line["value"]), None,
                        (cells[0], cells[1], cells[2], cells[3]),
                        (Cell(f"make gpu: {stage}", link=run.key), _day(environment) if environment else NOTHING),
                        unfit,
                    )
                )  # fmt: skip
    return made


def headline(found: Found) -> Section:
    """Tokens/s: of every preset on every machine the newest as it is, else of what was changed; then all of them."""
    section = Section("Training speed", "speed")
    made = speeds(found)
    machines = sorted({(not s.cuda, s.machine) for s in made}) or [(True, "this machine")]
    columns = [name for _, name in machines] + [ANY_GPU] * all(cpu for cpu, _ in machines)
    names = list(dict.fromkeys([*presets.names(), *(s.preset for s in made)]))
    rows = []
    for preset in names:
        row = [Cell(preset)]
        for machine in columns:
            here = [s for s in made if (s.preset, s.machine) == (preset, machine)]
            newest = next((s for s in here if s.as_it_is), here[0] if here else None)
            if newest is None:
                row.append(UNRUN)
            elif newest.withheld:
                row.append(Cell("withheld: red", kind="red", link=newest.origin[0].link))
            else:
                text = f"{number(newest.tokens_per_s)} at {newest.shape} ({newest.what})"
                row.append(Cell(text, newest.tokens_per_s, "ours", newest.origin[0].link))
        rows.append(row)
    section.blocks += [
        Text(
            "tritium’s tokens/s: of each preset, as it is, the newest on each machine; where it was only timed as a "
            "rung of the ladder or with other settings, these; unrun is what nobody measured."
        ),
        Table(["preset", *columns], rows),
    ]  # fmt: skip
    if made:
        heads = [
            "preset", "tokens/s", "95 % interval", "shape", "what", "MFU, full", "MFU, causal", "step ÷ own",
            "peak memory", "machine", "commit", "measured",
        ]  # fmt: skip
        lines = []
        for s in made:
            speed = [Cell(number(s.tokens_per_s), s.tokens_per_s, "ours"), _ci(s.ci)]
            if s.withheld:
                speed = [Cell("withheld: red", kind="red"), NOTHING]
            more = [NOTHING] * 4 if s.withheld else s.more
            lines.append([Cell(s.preset), *speed, Cell(s.shape), Cell(s.what), *more, Cell(s.machine), *s.origin])
        section.inner.append(
            Section("Every measurement", blocks=[
                Table(heads, lines),
                Text(
                    "MFU: model FLOPs over the product of matrices that was measured in the same run, in the step’s "
                    "dtype. Step ÷ own: the step over its bare products of matrices and the fastest attention, in the "
                    "same rounds. The intervals know how a record varies within itself, not from day to day."
                ),
            ])
        )  # fmt: skip
    return section


def peers(entry: Entry) -> Section:
    """A throughput record: every implementation, tritium's speed over each."""
    data, s = entry.data, entry.data["settings"]
    bars, rows = [], []
    void: dict[str, str] = data.get("void", {})  # version 1 had none
    for key, arm in sorted(data["arms"].items(), key=lambda item: -item[1]["tokens_per_s"]):
        ours, ci = arm["peer"] == OURS, interval(_figure(entry, f"{key} tokens/s"))
        value = arm["tokens_per_s"]
        low, high = (ci.low, ci.high) if ci else (value, value)
        bars.append(Bar(key, value, low, high, number(value), "ours" if ours else "other"))
        faster = NOTHING
        if key in data["speedup"]:
            faster = Cell(_ratio(data["speedup"][key]), data["speedup"][key]["median"])
        rows.append([
            Cell(key + " (void as a baseline)" * (arm["peer"] in void), kind="ours" * ours),
            Cell(number(value), value), _ci(ci), faster, Cell(f"{arm['startup_s']:.1f}", arm["startup_s"]),
            _bytes(arm["peak_bytes"]),
        ])  # fmt: skip
    absent = [[Cell(name), UNRUN, Cell(why)] for name, why in sorted(data["peers_absent"].items())]
    models = s.get("models") or {data["preset"]: {}}
    how = []
    for model, about in models.items():
        stopped = f"; {about['stopped']}" if about.get("stopped") else ""
        how.append(Text(f"{model}: {timing.how_taken(s['rounds'], about)}{stopped}."))
    how += [Text(f"{name} is void as a baseline: {why}.") for name, why in void.items()]
    heads = [
        "training step",
        "tokens/s",
        "95 % interval",
        "tritium is faster by (paired)",
        "start-up, s",
        "peak memory",
    ]
    return _measured(
        f"{data['preset']}, T={s['T']}, B={s['B']}", entry,
        [
            Bars(bars, about="tokens/s with 95 % intervals"), Table(heads, rows), *how,
            *([Table(["peer", "", "why"], absent)] if absent else []),
        ],
    )  # fmt: skip


def anatomy(entry: Entry) -> Section | None:
    """Where a step of a train record goes; None where it was not profiled."""
    data = entry.data
    parts = sorted((row for row in data.get("anatomy", []) if row["ms"] > 0), key=lambda row: -row["ms"])
    if not parts:
        return None
    rows = []
    for row in parts:
        best = row.get("roofline_ms")
        fraction = row.get("fraction")
        rows.append([
            Cell(row["row"]), Cell(f"{row['ms']:.2f}", row["ms"]),
            Cell(f"{100 * row['share']:.1f} %", row["share"], bar=row["share"]),
            NOTHING if best is None else Cell(f"{best:.2f}", best),
            NOTHING if fraction is None else Cell(f"{100 * fraction:.0f} %", fraction),
        ])  # fmt: skip
    total = sum(row["ms"] for row in parts)
    blocks: list[Block] = [
        Stack([(row["row"], row["share"]) for row in parts], "a step, part by part"),
        Table(["part", "ms", "share", "at best, ms", "of best"], rows),
    ]  # fmt: skip
    s = data["settings"]
    return _measured(f"{data['preset']}, T={s['T']}, B={s['B']}: a step of {total:.0f} ms", entry, blocks)


def kernels(entry: Entry) -> Section:
    """A kernels record: one row a timed call."""
    data, rows = entry.data, []
    for row in data["rows"]:
        over, of = row["over_reference"], row.get("of_bound")
        rows.append([
            Cell(row["op"]), Cell(row["backend"] + " compiled" * bool(row["compiled"])), Cell(row["case"]),
            Cell(row["dtype"]), Cell(row["what"]), Cell(number(row["p50_ms"]), row["p50_ms"]),
            Cell(f"[{number(row['p20_ms'])}, {number(row['p80_ms'])}]"), Cell(number(row["gb_per_s"]), row["gb_per_s"]),
            Cell(number(row["tflop_per_s"]), row["tflop_per_s"]),
            NOTHING if of is None else Cell(f"{100 * of:.0f} %", of, bar=of), Cell(row.get("bound_by", "–")),
            NOTHING if over is None else Cell(_ratio(over), over["median"]),
        ])  # fmt: skip
    heads = [
        "op", "backend", "case", "dtype", "what", "ms", "p20, p80", "GB/s", "TFLOP/s", "of bound",
        "bound by", "faster than reference",
    ]  # fmt: skip
    timed = {row["op"] for row in data["rows"]}
    missing = [op for op in ops() if op not in timed]
    blocks: list[Block] = [Table(heads, rows, "every timed call", folded=120)]
    if data["refused"]:
        unrun = [[Cell(f"{r['op']}.{r['backend']}"), UNRUN, Cell(r["why"])] for r in data["refused"]]
        blocks.append(Table(["backend", "", "why"], unrun, "backends that could not run", folded=12))
    if missing:
        blocks.append(Text(f"Unrun in this record: {', '.join(missing)}."))
    some = ", ".join(sorted(timed)) if len(timed) <= 4 else f"{len(timed)} ops"
    return _measured(f"{some or 'Kernels'} on {entry.machine}", entry, blocks)


def ops() -> list[str]:
    """The names of all ops: the folders of kernels/ that have a reference."""
    return sorted(path.parent.name for path in record.KERNELS.glob("*/reference.py"))


def ablation(entry: Entry) -> Section:
    """An ablate record: each arm against the baseline."""
    from tritium.benchmarks import ablate_results

    data, bars = entry.data, []
    kinds = {"baseline": "ours", "faster": "better", "slower": "worse"}
    for arm in data["arms"]:
        if arm["ratio"] is not None and arm["name"] != data["baseline"]:
            middle, low, high = (100 * (arm["ratio"][k] - 1) for k in ("median", "low", "high"))
            text = f"{middle:+.1f} % [{low:+.1f}, {high:+.1f}]"
            bars.append(Bar(arm["name"], middle, low, high, text, kinds.get(arm["verdict"], "none")))
    blocks: list[Block] = [Text(f"Baseline: {data['baseline']}.")]
    if bars:
        about = "tokens/s against the baseline with 95 % intervals; shaded: not told from none, by the baseline’s twin"
        blocks.append(Bars(bars, ablate_results.untold(data), about))
    for heads, rows in (ablate_results.cells(data), ablate_results.curve_cells(data)):
        if rows:
            cells = [[_ablated(text, i) for i, text in enumerate(row)] for row in rows]
            blocks.append(Table([head or "verdict" for head in heads], cells))
    blocks += [Text(line, loud=line.startswith(("TOO NOISY", "FAILED"))) for line in ablate_results.remarks(data)]
    s = data["settings"]
    return _measured(f"{data['preset']}, T={s['T']}, B={s['B']}, on {entry.machine}", entry, blocks)


def _ablated(text: str, column: int) -> Cell:
    """A cell that ablate_results wrote; it sorts by the number that it begins with."""
    first = text.replace(",", "").split(" ")[0]
    try:
        sort = float(first) if column else None
    except ValueError:
        sort = None
    return Cell(text, sort, "red" if text in ("RED", "withheld") else "")


def ladder(entry: Entry) -> Section:
    """A ladder record: presets by what was added; what has no figure says why."""
    cells = {(cell["preset"], cell["column"]): cell for cell in entry.data["cells"]}
    columns = list(dict.fromkeys(column for _, column in cells))
    rows, drawn, why = [], [], []
    for preset, shape in entry.data["settings"]["presets"].items():
        row = [Cell(f"{preset}, T={shape['T']}, B={shape['B']}")]
        bars = []  # of a size: another's would be out of scale
        for column in columns:
            cell = cells.get((preset, column))
            if cell is None or cell["status"] != "ok":
                row.append(UNRUN if cell is None else Cell(cell["status"], kind=LADDER.get(cell["status"], "red")))
                if cell is not None:
                    why.append([Cell(preset), Cell(column), Cell(f"{cell['status']}: {cell['reason']}")])
                continue
            ci, over = cell["tokens_per_s"], cell["over_first"]
            more = "" if over is None else f" ({over['median']:.2f} ×)"
            row.append(Cell(number(ci["median"]) + more, ci["median"]))
            bars.append(Bar(f"{preset}, {column}", ci["median"], ci["low"], ci["high"], number(ci["median"]), "ours"))
        rows.append(row)
        drawn += [Bars(bars)] if bars else []
    blocks: list[Block] = [
        *drawn, Text("Tokens/s with 95 % intervals, each size to its own scale; in brackets: over the first column."),
        Table(["preset", *columns], rows),
    ]  # fmt: skip
    if why:
        blocks.append(Table(["preset", "column", "why there is no figure"], why, "cells without a figure"))
    return _measured(f"tokens/s on {entry.machine}", entry, blocks)


LADDER = {  # what is not "ok" and no fault
    "not built yet": "unrun", "needs a GPU": "unrun", "needs another GPU": "unrun", "not run": "unrun",
    "out of memory": "muted",
}  # fmt: skip


def goals(found: Found) -> Section:
    """Every goal beside what was measured, by the newest run of make gpu on each GPU; unrun where there is none."""
    section = Section("Goals", "goals")
    seen = set()
    for entry in found.of("gpu"):
        if entry.machine not in seen:
            made = _own(entry, lambda entry: [_goal_section(entry)])
            section.inner += made
            seen |= {entry.machine} if made else set()
    if not section.inner:
        rows = [
            [Cell(f"{g.preset} {OVER if g.unit == '×' else g.unit}"), UNRUN, _goal(g.limit, g.unit, g.better), UNRUN]
            for g in TRAINING_GOALS
        ]
        section.blocks += [
            Table(["figure, on one H100", "measured", "goal", "verdict"], rows),
            Text("Unrun.", code="make gpu"),
        ]
    return section


def _goal(limit: float, unit: str, better: str) -> Cell:
    return Cell(f"{'≥' if better == 'higher' else '≤'} {quantity(limit, unit)}", limit)


def _goal_section(entry: Entry) -> Section:
    rows = []
    for row in entry.data["goals"]:
        kind = {"not met": "red", "met": "ours", "not run": "unrun"}.get(row["verdict"], "muted")
        verdict = UNRUN if row["verdict"] == "not run" else Cell(row["verdict"], kind=kind)
        value = UNRUN if row["value"] is None else Cell(quantity(row["value"], row["unit"]), row["value"])
        by = row["by"] + " (an earlier run)" * row["recorded"]
        rows.append([Cell(row["figure"]), value, _goal(row["goal"], row["unit"], row["better"]), verdict, Cell(by)])
    verdicts = [row["verdict"] for row in entry.data["goals"]]
    tally = ", ".join(f"{verdicts.count(v)} {'unrun' if v == 'not run' else v}" for v in dict.fromkeys(verdicts))
    table = Table(["figure", "measured", "goal", "verdict", "by"], rows, "every goal", folded=24)
    return _measured(f"On {entry.machine}", entry, [Text(f"Goals: {tally}."), table])


def figures(entry: Entry) -> Section:
    """A record of a kind that this page has no form for."""
    return _measured(f"{entry.data['kind']}: {entry.path}", entry, [_figure_table(entry)])


def _figure_table(entry: Entry) -> Table:
    rows = []
    for f in entry.data["figures"]:
        spread = NOTHING
        if len(f["samples"]) >= 2:
            cuts = statistics.quantiles(f["samples"], n=5, method="inclusive")
            low, high = (quantity(x, f["unit"]) if f["unit"] in SCALED else number(x) for x in (cuts[0], cuts[-1]))
            spread = Cell(f"[{low}, {high}]")
        better = Cell(f["better"] or "–", kind="muted")
        rows.append([Cell(f["name"]), _value(f), spread, Cell(str(len(f["samples"])), len(f["samples"])), better])
    return Table(["figure", "median", "p20, p80", "samples", "better"], rows, "figures")


def _measured(title: str, entry: Entry, blocks: Sequence[Block]) -> Section:
    """A section of one record: its red checks first, where it comes from last."""
    data = entry.data
    red = [Text(f"RED: {text}", loud=True) for text in entry.red]
    torch = data["versions"].get("torch", "unknown")
    where = Text(f"{entry.machine}; torch {torch}; commit {_commit(data)}, {data['date'][:10]}:", code=data["command"])
    return Section(title, blocks=[*red, *blocks, where])


KINDS: dict[str, tuple[str, str, Callable[[Entry], Section | None]]] = {  # kind → (title, key, its section)
    "throughput": ("Against other implementations", "peers", peers),
    "ladder": ("Ladder", "ladder", ladder),
    "train": ("Anatomy of a step", "anatomy", anatomy),
    "kernels": ("Kernels", "kernels", kernels),
    "ablate": ("Ablations", "ablations", ablation),
}


def _own(entry: Entry, made: Callable[[Entry], list[Any]]) -> list[Any]:
    """What ``made`` reads from a record's own fields; nothing, and the entry says so, where they do not fit."""
    try:
        return made(entry)
    except MISFITS as error:
        entry.problem = f"its own fields are not those of kind {entry.data['kind']!r}: {type(error).__name__}: {error}"
        return []


def _listed(section: Callable[[Entry], Section | None], entry: Entry) -> list[Section | None]:
    return [section(entry)]


def by_kind(found: Found) -> list[Section]:
    """A section for every kind; where a kind has no record, how to make one."""
    made = [goals(found)]
    for kind, (title, key, section) in KINDS.items():
        inner = [s for entry in found.of(kind) for s in _own(entry, functools.partial(_listed, section)) if s]
        if inner:
            made.append(Section(title, key, inner=inner))
        else:
            made.append(Section(title, key, [Text("Unrun.", code=COMMANDS[kind])]))
    others = found.of(*({e.data["kind"] for e in found.entries} - {*KINDS, "gpu"}))
    broken = [e for e in found.of(*KINDS, "gpu") if e.problem]
    if others or broken:
        made.append(Section("Other records", "others", inner=[figures(e) for e in [*broken, *others]]))
    return made


COMMANDS = {
    "throughput": "tritium bench peers",
    "ladder": "tritium bench ladder",
    "train": "tritium bench train PRESET --anatomy",
    "kernels": "tritium bench kernels --out FILE",
    "ablate": "tritium ablate PRESET AXIS=a,b",
}


def gpu_runs(found: Found) -> Section:
    """The stages of every ``make gpu``, line by line."""
    section = Section("make gpu", "gpu", only_page=True)
    if not found.runs:
        section.blocks.append(Text("Unrun.", code="make gpu"))
    for run in found.runs:
        about = [Text(f"RED: {text}", loud=True) for text in run.red]
        if run.rehearsal:
            about.insert(0, Text("A rehearsal without a GPU: its figures mean nothing.", loud=True))
        missing = [name for name in STAGES if name not in run.lines]
        made = Section(f"{run.path}: {run.machine}", run.key, [*about, _outcomes(run, missing)])
        made.inner = [
            Section(stage, blocks=[_lines_table(lines)], folded=True) for stage, lines in _in_order(run.lines).items()
        ]
        section.inner.append(made)
    return section


STAGES = tuple(gpu.STAGES)


def _in_order(lines: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The stages in the order in which make gpu runs them, others after them."""
    return {s: lines[s] for s in [*(s for s in STAGES if s in lines), *(s for s in lines if s not in STAGES)]}


def _outcomes(run: Run, missing: Sequence[str]) -> Table:
    """How every stage ended."""
    rows = []
    for stage, lines in _in_order(run.lines).items():
        end = next((line for line in reversed(lines) if line["unit"] == "status"), None)
        status = "cut short" if end is None else str(end["value"])
        kind = {"ok": "", "recorded": "muted", "not run": "unrun"}.get(status, "red")
        spent = None if end is None else end.get("seconds")
        seconds = Cell(f"{spent:.0f}", spent) if _is_number(spent) else NOTHING
        measured = len(lines) - (end is not None)
        detail = Cell(str(end.get("detail", "")) if end else "no last line: it was killed, or still runs")
        rows.append([Cell(stage), Cell(status, kind=kind), seconds, Cell(str(measured), measured), detail])
    rows += [[Cell(stage), UNRUN, NOTHING, NOTHING, Cell("")] for stage in missing]
    return Table(["stage", "status", "seconds", "lines", "detail"], rows)


def _lines_table(lines: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for line in lines:
        value = line["value"]
        shown = Cell(value) if isinstance(value, str) else Cell(number(value), float(value))
        if wrong(line):
            shown = Cell(shown.text, kind="red")
        rest = {k: v for k, v in line.items() if k not in ("stage", "name", "value", "unit")}
        more = [f"{k} {text}" for k, v in rest.items() if (text := _said(v))]
        rows.append([Cell(line["name"]), shown, Cell(line["unit"]), Cell(", ".join(more))])
    return Table(["name", "value", "unit", "more"], rows, folded=len(rows))


def _said(value: Any) -> str:
    """A value of a line's in a few letters; "" for what is nothing or too long."""
    if isinstance(value, dict) and record.problems(value, RATIO) == []:
        return _ratio(value)
    if isinstance(value, float) and _is_number(value):
        return number(value)
    return "" if value is None or isinstance(value, (dict, list)) else str(value)


RATIO = {"median": record.NUMBER, "low": record.NUMBER, "high": record.NUMBER, "level": record.NUMBER}


def machines(found: Found) -> Section:
    """Every machine that something was measured on."""
    seen: dict[str, list[dict[str, Any]]] = {}
    environments = [run.environment for run in found.runs if not run.rehearsal]
    for data in [*(e.data for e in found.entries if not e.rehearsed), *filter(None, environments)]:
        seen.setdefault(f"{machine_name(data['machine'])} ({data['machine']['arch']})", []).append(data)
    rows = []
    for name, records in sorted(seen.items()):
        m = max(records, key=lambda data: data["date"])["machine"]
        torch = sorted({data["versions"].get("torch", "unknown") for data in records})
        triton = sorted({data["versions"].get("triton", "unknown") for data in records})
        both = [[*d["machine"]["state"]["throttled_by"], *compare.throttled_after(d["machine"])] for d in records]
        held = sorted({reason for reasons in both for reason in reasons})
        clock = [c for data in records if (c := data["machine"]["state"]["clock_mhz"]) is not None]
        power = [c for data in records if (c := data["machine"]["state"]["power_w"]) is not None]
        load = [data["machine"]["load_average"][0] for data in records if data["machine"]["load_average"]]
        rows.append([
            Cell(name), Cell(", ".join(m["features"]) or "–"), Cell(quantity(m["memory_bytes"], "bytes")),
            Cell(_range(clock)), Cell(_range(power)), Cell(_range(load)),
            Cell(", ".join(held), kind="red") if held else NOTHING, Cell(", ".join(torch)), Cell(", ".join(triton)),
            Cell(str(len(records)), len(records)),
        ])  # fmt: skip
    heads = [
        "machine", "features", "host memory", "clock, MHz", "power, W", "load at the start", "throttled by", "torch",
        "triton", "records",
    ]  # fmt: skip
    return Section("Machines", "machines", [Table(heads, rows)])


def _range(values: Sequence[float]) -> str:
    if not values:
        return "–"
    least, most = f"{min(values):,.4g}", f"{max(values):,.4g}"
    return least if least == most else f"{least} to {most}"


def provenance(found: Found) -> Section:
    """Every record: command, source, versions, checks, kernels, figures with their samples in order."""
    section = Section("Records", "records", only_page=True)
    for entry in sorted(found.entries, key=lambda e: e.path):
        data = entry.data
        tally = (
            f"RED: {len(entry.red)} of {len(data['checks'])} checks" if entry.red else f"{len(data['checks'])} checks"
        )
        title = f"{entry.path}: {data['kind']}, {data['date'][:16].replace('T', ' ')}, commit {_commit(data)}, {tally}"
        versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
        state = {k: v for k, v in data["machine"]["state"].items() if v not in (None, [])}
        state_text = "; ".join(f"{k} {v}" for k, v in state.items())
        after = {k: v for k, v in (data["machine"]["state_after"] or {}).items() if v not in (None, [])}
        after_text = "; ".join(f"{k} {v}" for k, v in after.items())
        blocks: list[Block] = [Text(f"RED: {text}", loud=True) for text in entry.red]
        if entry.rehearsed:
            blocks.append(Text("Of a rehearsal without a GPU: its figures mean nothing.", loud=True))
        if entry.problem:
            blocks.append(Text(entry.problem, loud=True))
        if names := compare.unsettled(data):
            blocks.append(Text(f"Timed before it settled: {', '.join(names)}."))
        blocks += [
            Text("Command:", code=data["command"]),
            Text(f"Commit {data['commit']}{' (modified)' if data['dirty'] else ''}; {versions}."),
            Text(
                f"{entry.machine}, {data['machine']['arch']}"
                + ("" if (threads := data["machine"]["threads"]) is None else f", {_count(threads, 'thread')}")
                + (f"; at the start: {state_text}" if state else "")
                + (f"; at the end: {after_text}" if after else "")
                + "."
            ),
        ]
        if data["environment"]:
            blocks.append(Text("Set: " + ", ".join(f"{k}={v}" for k, v in data["environment"].items()) + "."))
        if data["checks"]:
            rows = [
                [Cell(c["name"]), Cell("ok") if c["ok"] else Cell("RED", kind="red"), Cell(c["detail"])]
                for c in data["checks"]
            ]
            blocks.append(Table(["check", "", "detail"], rows))
        blocks.append(_figure_table(entry))
        sampled = [f for f in data["figures"] if len(f["samples"]) >= 4]
        if sampled:
            blocks.append(
                Points([(f["name"], f["samples"], f"{len(f['samples'])} samples, in order") for f in sampled[:40]])
            )
        if data["kernels"]:
            blocks.append(_sites(data["kernels"]))
        if data["sources"]:
            rows = [[Cell(name), Cell(digest)] for name, digest in sorted(data["sources"].items())]
            blocks.append(Table(["kernel source", "digest"], rows, "digests of the kernels’ sources", folded=0))
        section.inner.append(Section(title, entry.key, blocks, folded=True))
    return section


def _sites(kernels: Iterable[dict[str, Any]]) -> Table:
    """Which backend served which call sites; sites with the same answer in one row."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for row in kernels:
        groups.setdefault((row["op"], row["phase"], row["backend"], row["why"]), []).append(row["site"])
    rows = [
        [Cell(op), Cell(phase), Cell(backend), Cell(str(len(sites)), len(sites)), Cell(why)]
        for (op, phase, backend, why), sites in groups.items()
    ]
    return Table(["op", "phase", "backend", "sites", "why"], rows, "which backend served which call sites", folded=0)


def alarms(found: Found) -> list[Section]:
    """What is red, first of all; nothing where nothing is."""
    red = [(entry.path, text) for entry in found.entries if not entry.rehearsed for text in entry.red]
    red += [(f"{run.path}: make gpu", text) for run in found.runs if not run.rehearsal for text in run.red]
    return [Section("Red", "red", [Text(f"{path}: {text}", loud=True) for path, text in red])] if red else []


def refused(found: Found) -> list[Section]:
    """Files that are shown nowhere, or only in part, with the reason."""
    rows = [*found.refused, *((e.path, f"shown by its figures only, {e.problem}") for e in found.entries if e.problem)]
    if not rows:
        return []
    table = Table(["file", "why"], [[Cell(path), Cell(why[:600])] for path, why in sorted(rows)], "files")
    return [Section("Files that could not be shown", "files", [table], only_page=True)]


def build(found: Found) -> list[Section]:
    """All sections, in the order in which they are read."""
    kinds = [headline(found), *by_kind(found)]  # first, since they find out which records are not what they say
    return [*alarms(found), *kinds, gpu_runs(found), machines(found), provenance(found), *refused(found)]


# ------------------------------------------------------------------------------------------------------------- writing


def measured_part(found: Found) -> str:
    """What ``--markdown`` puts between its markers."""
    wanted = [s for s in build(found) if not s.only_page and (s.blocks or s.inner)]
    about = "Made by `tritium bench report --markdown`; every figure is of the record that its commit and command name."
    return "\n\n".join(["## Measured", about, markdown(wanted, 3)])


def write_part(path: pathlib.Path, text: str) -> None:
    """Replace what lies between the markers of a page, and nothing else; ValueError where they are not there once, in
    order, or hold another program's markers."""
    begin, end = MARKERS
    before = path.read_text() if path.exists() else ""
    if before.count(begin) != 1 or before.count(end) != 1 or before.index(begin) > before.index(end):
        raise ValueError(
            f"{path} must have these two lines once, in this order, where the tables should be; nothing was written:\n"
            f"{begin}\n{end}"
        )
    head, _, rest = before.partition(begin)
    inside, _, tail = rest.partition(end)
    if "<!--" in inside:
        raise ValueError(
            f"{path} has a comment between {begin} and {end}, so something else writes there too; nothing was written. "
            "Move it out of this part"
        )
    if head.count(OTHERS[0]) != head.count(OTHERS[1]):
        raise ValueError(
            f"{path} has {begin} inside the part that make check-kernels writes and would overwrite; nothing was "
            f"written. Move it before {OTHERS[0]} or after {OTHERS[1]}"
        )
    _replace(path, f"{head}{begin}\n\n{text}\n\n{end}{tail}".encode("utf-8", "replace"))


OTHERS = ("<!-- written by make check-kernels: from here -->", "<!-- to here -->")  # kernels/aot.py's


def _replace(path: pathlib.Path, content: bytes) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + "s" * (n != 1)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="tritium bench report", allow_abbrev=False,
        description="Everything that was measured, on one HTML page that needs no other file.",
    )  # fmt: skip
    made.add_argument(
        "folder", type=pathlib.Path, metavar="DIR", nargs="?", default=RESULTS,
        help="searched for records and the stages of make gpu (default: benchmarks/results)",
    )  # fmt: skip
    made.add_argument("--out", type=pathlib.Path, help="the page (default: DIR/report.html)")
    made.add_argument(
        "--markdown", type=pathlib.Path, metavar="FILE",
        help=f"also put the tables between {MARKERS[0]} and {MARKERS[1]} of this page",
    )  # fmt: skip
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """``tritium bench report``; for the exit status see the module."""
    made = parser()
    a, unknown = made.parse_known_args(argv)
    if unknown:
        from tritium.kernels.op import nearest

        flags = [flag for action in made._actions for flag in action.option_strings]
        made.error(f"there is no argument {unknown[0]!r} beside DIR; the nearest are {nearest(unknown[0], flags)}")
    if not a.folder.is_dir():
        made.error(f"there is no folder {a.folder}; name one with records, e.g. what --out of a benchmark was")
    found = search(a.folder)
    if not found.entries and not found.runs:
        reasons = "".join(f"\n  {path}: {why}" for path, why in found.refused)
        print(
            f"tritium bench report: {a.folder} has no record, so no page was written; to make one: tritium bench train "
            f"tiny{reasons}",
            file=sys.stderr,
        )
        return 1
    sections = build(found)
    newest = max((e.data["date"] for e in found.entries), default="")[:10]
    about = f"{_count(len(found.entries), 'record')} and {_count(len(found.runs), 'run')} of make gpu in {a.folder}"
    about += f"; the newest record is of {newest}" if newest else ""
    out = a.out or a.folder / "report.html"
    try:
        if a.markdown is not None:
            write_part(a.markdown, measured_part(found))
        _replace(out, html_page("tritium: what was measured", about, sections))
    except (OSError, ValueError) as error:
        print(f"tritium bench report: {error}", file=sys.stderr)
        return 1
    red = sum(len(e.red) for e in found.entries if not e.rehearsed)
    red += sum(len(run.red) for run in found.runs if not run.rehearsal)
    problems = f"{_count(red, 'red check')}, {_count(len(found.refused), 'file')} that could not be shown"
    print(f"{about}; {problems}\nwritten: {out}", flush=True)
    if a.markdown is not None:
        print(f"written: {a.markdown}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
