"""Two records of the same benchmark: how much faster, how sure, and what else differs between them.

    tritium bench compare A.json B.json [--gate 0.98] [--strict] [--gate-single] [--anyway]

For every figure that is a goal ("higher" or "lower" is better), the ratio of the medians, turned so that above 1 means
that B is the better one, with a 95 % interval. Two records were taken at different times, so nothing is paired; each
one's samples are resampled in blocks of neighbours (moving-block bootstrap, Künsch 1989), since a machine that is slow
for a second is slow for several samples, and the interval is widened by Student's t for so few blocks. What is assumed:
samples further apart than a block (an eighth of a record, two rounds at least) know nothing of each other. Where a
record has several processes of what it measured, the interval is Student's over these, and covers what differs between
two processes of one program; where neither has, it does not. What drifts more slowly than a record lasts is in no
interval: run A, B, A and compare the As to see it.

Exit status: 0; 1 when a gated figure is certainly below the gate (its whole interval is; with --strict, when any of it
is, or when B lacks the figure or the record), when a gate judged nothing, or when a check in either record is red,
since the speed of something wrong is not compared; 2 when the records are not of the same thing (--anyway compares
them) or cannot be read.
"""

from __future__ import annotations

import argparse
import collections
import math
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from tritium.benchmarks import record
from tritium.benchmarks.curves import student_quantile
from tritium.benchmarks.timing import Interval, by_restart

RESAMPLES = 4_000
MANY = 20  # so many verdicts at 95 % hold a wrong one more often than not
CLOCK_TOLERANCE = 0.05  # clocks and power limits that differ by less are the same


@dataclass(frozen=True)
class Line:
    """One figure of both records. ratio: above 1 where B is better; ratio.low and high are equal to its median where a
    record has fewer than two samples of it."""

    name: str
    unit: str
    a: float
    b: float
    ratio: Interval
    sampled: bool
    restarted: tuple[bool, bool] = (False, False)  # whether A, and B, has it of several processes

    @property
    def verdict(self) -> str:
        if not self.sampled:
            return "no interval"
        if self.ratio.low > 1.0:
            return "better"
        return "worse" if self.ratio.high < 1.0 else "no difference shown"

    def gated(self, gate: float, single: bool = False) -> str:
        """Where the interval lies: "below the gate", "inside the gate" or "on the gate", and "not gated" for a figure
        without samples unless ``single`` asks for those too."""
        if not self.sampled and not single:
            return "not gated"
        if self.ratio.high < gate:
            return "below the gate"
        return "inside the gate" if self.ratio.low >= gate else "on the gate"

    def text(self, width: int) -> str:
        """A row under :func:`heads`, with ``width`` columns for the name."""
        interval = f"[{self.ratio.low:.3f}, {self.ratio.high:.3f}]" if self.sampled else ""
        values = f"{self.a:>13.6g}{self.b:>13.6g} {self.unit:<9}"
        return f"{self.name:<{width}} {values}{self.ratio.median:>7.3f} {interval:<16} {self.verdict}"


def heads(width: int) -> str:
    return f"{'':<{width}} {'A':>13}{'B':>13} {'':<9}{'B/A':>7} 95 % interval    (above 1: B is better)"


def ratio_of_medians(
    top: Sequence[float], bottom: Sequence[float], restarts: tuple[Sequence[int], Sequence[int]] = ((), ()), *,
    level: float = 0.95, seed: int = 0,
) -> Interval:  # fmt: skip
    """median(top) / median(bottom) of two lists of at least two positive samples each, with its interval.

    The lists are resampled independently, in blocks. A bootstrap knows only the spread between the blocks it has, which
    for few of them falls short: every deviation is stretched by √(blocks / (blocks - 1)) and the interval by Student's
    quantile over the normal one, its degrees of freedom by Welch and Satterthwaite.

    restarts: of top's and bottom's samples, as in a FIGURE. Where either has several, see :func:`_over_restarts`.
    """
    return _interval([(1.0, top, restarts[0]), (-1.0, bottom, restarts[1])], level, seed)


def median_of(
    samples: Sequence[float], restarts: Sequence[int] = (), *, level: float = 0.95, seed: int = 0
) -> Interval:
    """The median of at least two positive samples with its interval, as :func:`ratio_of_medians` takes it."""
    return _interval([(1.0, samples, restarts)], level, seed)


def _over_restarts(parts: Sequence[tuple[float, Sequence[float]]], level: float) -> Interval:
    """exp of the signed sum of the means of the logarithms of each part's medians, one of each restart, with Student's
    interval (Welch's, where two parts have several). The process of a part that has one is taken to deviate as those
    of the other part do."""
    logs = [(sign, numpy.log(numpy.asarray(medians, dtype=numpy.float64))) for sign, medians in parts]
    known = [(float(values.var(ddof=1)), values.size) for _, values in logs if values.size > 1]
    variances = [(variance / size, size - 1) for variance, size in known]
    if len(known) < len(logs):  # then one of the two is known, and what is taken over from it is no second estimate
        ((variance, size),) = known
        variances = [(variance / size + variance, size - 1)]
    total = sum(variance for variance, _ in variances)
    middle = float(sum(sign * values.mean() for sign, values in logs))
    half = 0.0
    if total > 0.0:
        freedom = max(1, int(total**2 / sum(v**2 / f for v, f in variances)))
        half = student_quantile(level, freedom) * math.sqrt(total)
    return Interval(math.exp(middle), math.exp(middle - half), math.exp(middle + half), level)


def _interval(parts: Sequence[tuple[float, Sequence[float], Sequence[int]]], level: float, seed: int) -> Interval:
    """exp of the signed sum of the medians of the logarithms of each part's samples."""
    if any(len(set(restarts)) > 1 for _, _, restarts in parts):
        each = [(sign, by_restart(samples, restarts or [0] * len(samples))) for sign, samples, restarts in parts]
        return _over_restarts(each, level)
    generator = numpy.random.default_rng(seed)
    middle, spread = 0.0, numpy.zeros(RESAMPLES)
    variances = []
    for sign, samples, _ in parts:
        logs = numpy.log(numpy.asarray(samples, dtype=numpy.float64))
        size = block_of(logs.size)
        blocks = logs.size / size
        deviations = (_medians(logs, generator, size) - numpy.median(logs)) * math.sqrt(blocks / (blocks - 1.0))
        middle += sign * float(numpy.median(logs))
        spread += sign * deviations
        variances.append((float(deviations.var()), blocks - 1.0))
    total = sum(variance for variance, _ in variances)
    stretch = 1.0
    if total > 0.0:
        freedom = max(1, int(total**2 / sum(v**2 / f for v, f in variances)))
        stretch = student_quantile(level, freedom) / statistics.NormalDist().inv_cdf((1.0 + level) / 2.0)
    tail = (1.0 - level) / 2.0
    low, high = numpy.quantile(spread, (tail, 1.0 - tail)) * stretch
    # a resample's median is skewed by chance: the interval holds at least the estimate itself
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    return Interval(math.exp(middle), math.exp(middle + low), math.exp(middle + high), level)


def block_of(n: int) -> int:
    """How many neighbours of ``n`` samples are drawn together: two rounds of two, or an eighth of a long record; fewer
    where there would be less than five blocks."""
    return max(1, min(4, n // 5), n // 8)


def _medians(samples: numpy.ndarray, generator: numpy.random.Generator, block: int) -> numpy.ndarray:
    """Medians of RESAMPLES resamples of circular blocks."""
    n = samples.size
    starts = generator.integers(0, n, size=(RESAMPLES, -(-n // block), 1))
    picked = (starts + numpy.arange(block)).reshape(RESAMPLES, -1)[:, :n] % n
    return numpy.median(samples[picked], axis=1)


def compare(a: dict[str, Any], b: dict[str, Any]) -> tuple[list[Line], list[str]]:
    """(the goals that both records have, in A's order; the goals that are not compared, and why)."""
    theirs = {figure["name"]: figure for figure in b["figures"]}
    lines, left_out = [], []
    for mine in a["figures"]:
        name, other = mine["name"], theirs.get(mine["name"])
        if not mine["better"]:
            continue
        if other is None:
            left_out.append(f"only in A: {name}")
        elif (mine["unit"], mine["better"]) != (other["unit"], other["better"]):
            units = [f"{f['unit']}, {f['better'] or 'neither'} is better" for f in (mine, other)]
            left_out.append(f"{name}: measured as {units[0]} in A, as {units[1]} in B")
        elif min(mine["value"], other["value"], *mine["samples"], *other["samples"]) <= 0:
            left_out.append(f"{name}: {mine['value']:g} → {other['value']:g} {mine['unit']}, which has no ratio")
        else:
            lines.append(_line(mine, other))
    named = {figure["name"] for figure in a["figures"]}
    left_out += [f"only in B: {f['name']}" for f in b["figures"] if f["better"] and f["name"] not in named]
    return lines, left_out


def _line(mine: dict[str, Any], other: dict[str, Any]) -> Line:
    top, bottom = (other, mine) if mine["better"] == "higher" else (mine, other)
    sampled = all(len(f["samples"]) >= 2 for f in (top, bottom))
    if sampled:
        ratio = ratio_of_medians(top["samples"], bottom["samples"], (top["restarts"], bottom["restarts"]))
    else:
        value = top["value"] / bottom["value"]
        ratio = Interval(value, value, value)
    restarted = (bool(mine["restarts"]), bool(other["restarts"]))
    return Line(mine["name"], mine["unit"], mine["value"], other["value"], ratio, sampled, restarted)


def not_the_same(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Why two records are not of the same thing."""
    settings = [_object(r, "settings") for r in (a, b)]
    facts = {
        "kind": [r["kind"] for r in (a, b)],
        "preset": [r["preset"] for r in (a, b)],
        "device": [f"{r['machine']['name']}, {r['machine']['arch']}" for r in (a, b)],
        "dtype": [r.get("dtype") for r in (a, b)],
        **{f"settings.{k}": [s.get(k) for s in settings] for k in ("T", "B", "processes", "precision")},
    }
    shapes = [_object(s, "presets") for s in settings]  # a ladder's
    facts |= {f"settings.presets.{k}": [s[k] for s in shapes] for k in shapes[0] if k in shapes[1]}
    if a["machine"]["device"] == "cpu":
        facts["cores"] = [r["machine"]["cores"] for r in (a, b)]
        # of processors with one name, or of a virtual one, the instructions may differ
        facts["features"] = [", ".join(r["machine"]["features"]) or "none" for r in (a, b)]
        threads = [r["machine"]["threads"] for r in (a, b)]
        if None not in threads:  # a record from before version 3 does not say
            facts["threads"] = threads
    return [f"{name}: {x} and {y}" for name, (x, y) in facts.items() if x != y]


def _object(of: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An object among fields that nobody has checked; {} where there is none."""
    found = of.get(key)
    return found if isinstance(found, dict) else {}


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What else differs, and may be the cause or the point of a difference."""
    found = []
    for name in ("commit", "dirty"):
        if a.get(name) != b.get(name):
            found.append(f"{name}: {a.get(name)} → {b.get(name)}")
    found += [
        f"version of {name}: {a['versions'].get(name)} → {b['versions'].get(name)}"
        for name in sorted(a["versions"].keys() | b["versions"].keys())
        if a["versions"].get(name) != b["versions"].get(name)
    ]
    set_a, set_b = a["environment"], b["environment"]
    if set_a is not None and set_b is not None:  # a record from before version 3 does not say
        found += [
            f"environment: {name}: {set_a.get(name, 'unset')} → {set_b.get(name, 'unset')}"
            for name in sorted(set_a.keys() | set_b.keys())
            if set_a.get(name) != set_b.get(name)
        ]
    found += [f"kernels: {text}" for text in _kernels(a, b)]
    for name in sorted(a["sources"].keys() | b["sources"].keys()):
        old, new = a["sources"].get(name, "absent"), b["sources"].get(name, "absent")
        if old == new == "unknown":
            found.append(f"source of {name}: in no file, so whether it is the same is not known")
        elif old != new:
            found.append(f"source of {name}: {old} → {new}")
    configs = [_flat(_object(r, "settings").get("config", {})) for r in (a, b)]
    found += [
        f"{name}: {configs[0].get(name)} → {configs[1].get(name)}"
        for name in sorted(configs[0].keys() | configs[1].keys())
        if configs[0].get(name) != configs[1].get(name)
    ]
    found += [
        f"{label} was timed before it settled: {', '.join(names[:3])}" + f" + {len(names) - 3}" * (len(names) > 3)
        for label, r in (("A", a), ("B", b))
        if (names := unsettled(r))
    ]
    return found + _machine(a["machine"], b["machine"])


def unsettled(r: Mapping[str, Any]) -> list[str]:
    """What a record has timed though its warm-up ended at its limit, without two windows that agree."""
    found = ["the step"] if _object(r, "warm_up").get("stable") is False else []
    arms = {key: arm for key, arm in _object(r, "arms").items() if isinstance(arm, dict)}
    found += [key for key, arm in arms.items() if _object(arm, "warm_up").get("stable") is False]
    for key, parts in (("cells", "{preset} {column}"), ("rows", "{op}.{backend} {case} {what}")):
        listed = r.get(key)
        for item in listed if isinstance(listed, list) else []:
            if isinstance(item, dict) and item.get("stable") is False:
                found.append(parts.format_map(collections.defaultdict(str, item)))
    return found


def _kernels(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """op: backend → backend, and at which call sites, of those that another backend serves."""
    served = [{(row["op"], row["site"], row["phase"]): row["backend"] for row in r["kernels"]} for r in (a, b)]
    changed: dict[str, list[str]] = {}
    for key in dict.fromkeys([*served[0], *served[1]]):
        old, new = (s.get(key, "absent") for s in served)
        if old != new:
            op, site, phase = key
            changed.setdefault(f"{op}: {old} → {new}", []).append(f"{site} {phase}")
    return [f"{what} at {sites[0]}" + (f" + {len(sites) - 1}" * (len(sites) > 1)) for what, sites in changed.items()]


def _machine(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Clocks and limits that differ, throttling, load."""
    found = []
    for when, key in (("", "state"), (", afterwards", "state_after")):
        for field in ("clock_mhz", "clock_max_mhz", "memory_clock_mhz", "power_limit_w"):
            old, new = (_number(_object(m, key).get(field)) for m in (a, b))
            if old is not None and new is not None and abs(new - old) > CLOCK_TOLERANCE * max(old, new):
                found.append(f"{field}{when}: {old:g} → {new:g}")
    for label, m in (("A", a), ("B", b)):
        held = dict.fromkeys([*m["state"]["throttled_by"], *throttled_after(m)])
        if held:
            found.append(f"{label} was throttled: {', '.join(held)}")
        for when, key, most in (("began", "load_average", 0.5), ("ended", "load_after", 1.5)):  # with its own load
            if m[key] and m[key][0] > most * m["cores"]:
                found.append(f"{label} {when} on a busy machine: load {m[key][0]} on {m['cores']} cores")
    return found


def throttled_after(machine: Mapping[str, Any]) -> list[str]:
    """The reasons that were named when all was timed."""
    found = _object(machine, "state_after").get("throttled_by")
    return [str(reason) for reason in found] if isinstance(found, list) else []


def _number(value: Any) -> float | None:
    return value if record.problems(value, record.NUMBER) == [] else None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value} if prefix else {}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}" if prefix else key).items()}


def red(r: dict[str, Any]) -> list[str]:
    """The checks of a record that failed."""
    return [f"{check['name']}: {check['detail']}" for check in r["checks"] if not check["ok"]]


def pairs(a: pathlib.Path, b: pathlib.Path) -> tuple[list[tuple[pathlib.Path, pathlib.Path]], list[pathlib.Path]]:
    """(the two files, or of two folders the records that have the same name; those that only one folder has)."""
    if a.is_dir() != b.is_dir():
        for path in (a, b):
            if not path.exists():
                raise record.RecordError(f"there is no {path}; give two records or two folders of records")
        raise record.RecordError(f"{a} and {b} must both be records or both be folders of records")
    if not a.is_dir():
        return [(a, b)], []
    names = [{p.name for p in folder.glob("*.json")} for folder in (a, b)]
    common = sorted(names[0] & names[1])
    if not common:
        raise record.RecordError(f"{a} and {b} have no record of the same name, so there is nothing to compare")
    alone = [folder / name for folder, mine in zip((a, b), names, strict=True) for name in sorted(mine - set(common))]
    return [(a / name, b / name) for name in common], alone


def load(path: pathlib.Path) -> dict[str, Any]:
    """``record.read`` for files of which nothing is known: whatever is wrong with one is a RecordError."""
    if not path.exists():
        from tritium.kernels.op import nearest

        beside = [p.name for p in path.parent.glob("*.json")] if path.parent.is_dir() else []
        hint = f"; the nearest in {path.parent} are {nearest(path.name, beside)}" if beside else ""
        raise record.RecordError(f"there is no file {path}{hint}")
    try:
        return record.read(path)
    except record.RecordError:
        raise
    except Exception as error:  # a file of anyone's: of a version that is brought up to date, anything may be missing
        said = f"{type(error).__name__}: {str(error)[:200]}"
        raise record.RecordError(f"{path} is a damaged record, or none ({said})") from error


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="tritium bench compare", allow_abbrev=False,
        description="Two records of the same benchmark: ratios with intervals, and what else differs.",
        epilog="exit status: 0; 1 below the gate, or a red check in a record; 2 not of the same thing, or not readable",
    )  # fmt: skip
    made.add_argument("a", type=pathlib.Path, metavar="A", help="the record before, or a folder of records")
    made.add_argument("b", type=pathlib.Path, metavar="B", help="the record after, or a folder of records")
    made.add_argument("--gate", type=float, help="fail where B/A is certainly below this, e.g. 0.98")
    made.add_argument(
        "--strict", action="store_true", help="fail where B/A is not certainly above the gate, or B lacks a figure"
    )
    made.add_argument(
        "--gate-single", action="store_true", help="gate figures that were taken once too, by their bare ratio"
    )
    made.add_argument("--anyway", action="store_true", help="compare records that are not of the same thing")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """``tritium bench compare``; for the exit status see the module."""
    made = parser()
    a, unknown = made.parse_known_args(argv)
    if unknown:
        from tritium.kernels.op import nearest

        flags = [flag for action in made._actions for flag in action.option_strings]
        made.error(f"there is no argument {unknown[0]!r} beside A and B; the nearest are {nearest(unknown[0], flags)}")
    if a.gate is not None and not 0.0 < a.gate < 10.0:
        made.error(f"--gate is a ratio, e.g. 0.98, not {a.gate}")
    for flag in ("strict", "gate_single"):
        if getattr(a, flag) and a.gate is None:
            made.error(f"--{flag.replace('_', '-')} says how to use a gate, and there is none; add --gate 0.98")
    try:
        found, alone = pairs(a.a, a.b)
    except record.RecordError as error:
        _complain(str(error))
        return 2
    status = 0
    for i, (path_a, path_b) in enumerate(found):
        print("\n" * bool(i), end="")
        try:
            status = max(status, _show(path_a, path_b, load(path_a), load(path_b), a))
        except record.RecordError as error:
            _complain(str(error))
            status = 2
    for path in alone:
        print(f"not compared, the other folder has none of this name: {path}")
        if a.strict and path.parent == a.a:
            print(f"\ngate {a.gate:g}: FAILED, B lacks the record of {path}")
            status = max(status, 1)
    return status


def _of_processes(lines: Sequence[Line]) -> list[str]:
    """What the intervals know of the difference between two processes of one program."""
    found, sampled = [], [line for line in lines if line.sampled]
    if any(not any(line.restarted) for line in sampled):
        found.append(
            "Of what each record has of one process, it does not know either what differs between two processes of one "
            "program."
        )
    if any(any(line.restarted) and not all(line.restarted) for line in sampled):
        found.append(
            "Where one record has several processes and the other one, that one is taken to deviate as they do."
        )
    return found


def _complain(text: str) -> None:
    print(f"tritium bench compare: {text}", file=sys.stderr)


def _show(
    path_a: pathlib.Path, path_b: pathlib.Path, a: dict[str, Any], b: dict[str, Any], options: argparse.Namespace
) -> int:
    different = not_the_same(a, b)
    if different and not options.anyway:
        _complain(
            f"{path_a} and {path_b} are not of the same thing ({'; '.join(different)}), so a ratio would say nothing; "
            "--anyway compares them"
        )
        return 2
    wrong = [f"A: {text}" for text in red(a)] + [f"B: {text}" for text in red(b)]
    if wrong:
        _complain(f"{path_a} and {path_b} are not compared, a check failed in them:\n  " + "\n  ".join(wrong))
        return 1
    print(f"A: {path_a}, {a['date']}, {a['commit'][:10]}\nB: {path_b}, {b['date']}, {b['commit'][:10]}")
    for text in [*different, *differences(a, b)]:
        print(f"  {text}")
    lines, left_out = compare(a, b)
    for text in left_out:
        print(f"  not compared: {text}")
    if not lines:
        _complain("the records have no figure in common that is a goal")
        return 2
    gate, single = options.gate, options.gate_single
    width = max(len(line.name) for line in lines)
    print(f"\n{heads(width)}")
    for line in lines:
        print(line.text(width) + (f", {line.gated(gate, single)}" if gate is not None else ""))
    print("\nAn interval knows how each record varies within itself; a drift from one to the other it does not know.")
    for text in _of_processes(lines):
        print(text)
    sampled = sum(line.sampled for line in lines)
    if sampled >= MANY:
        print(
            f"Each verdict is right 95 times in 100 by itself: of {sampled} figures that did not change, about "
            f"{0.05 * sampled:.0f} would be called better or worse."
        )
    if gate is None:
        return 0
    refused = ("below the gate", "on the gate") if options.strict else ("below the gate",)
    failed = [line.name for line in lines if line.gated(gate, single) in refused]
    if all(line.gated(gate, single) == "not gated" for line in lines):
        print(
            f"\ngate {gate:g}: FAILED, nothing was gated: no figure of both records has two samples; --gate-single "
            "gates those that were taken once"
        )
        return 1
    if options.strict:
        failed += [text for text in left_out if not text.startswith("only in B")]
    rule = "not certainly above it" if options.strict else "certainly below it"
    print(f"\ngate {gate:g}: " + (f"FAILED, {rule}: {'; '.join(failed)}" if failed else "passed"))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
