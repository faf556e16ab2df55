"""Two records of the same benchmark: how much faster, how sure, and what else differs between them.

    tritium bench compare A.json B.json [--gate 0.98] [--strict]

For every figure that is a goal ("higher" or "lower" is better), the ratio of the medians, turned so that above 1 means
that B is the better one, with a 95 % interval. Two records were taken at different times, so nothing is paired; their
samples are resampled in blocks of neighbours (moving-block bootstrap, Künsch 1989), since a machine that is slow for a
second is slow for several samples. What drifts more slowly than a record lasts is in no interval: run A, B, A and
compare the As to see it.

Exit status: 0; 1 when B is certainly below the gate (the whole interval is; with --strict, when it is not certainly
above: any of it is below), or when a check in either record is red, since the speed of something wrong is not compared;
2 when the records are not of the same thing (--anyway compares them).
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from tritium.benchmarks import record
from tritium.benchmarks.timing import Interval

BLOCK = 4  # neighbouring samples that are drawn together: two rounds
RESAMPLES = 10_000


@dataclass(frozen=True)
class Line:
    """One figure of both records. ratio: above 1 where B is better; ratio.low and high are equal to its median where a
    record has fewer than two samples."""

    name: str
    unit: str
    a: float
    b: float
    ratio: Interval
    sampled: bool

    @property
    def verdict(self) -> str:
        if not self.sampled:
            return "no interval"
        if self.ratio.low > 1.0:
            return "better"
        return "worse" if self.ratio.high < 1.0 else "no difference shown"

    def below(self, gate: float, strict: bool) -> bool:
        """Whether this fails the gate; a figure without samples never does."""
        return self.sampled and (self.ratio.low if strict else self.ratio.high) < gate

    def __str__(self) -> str:
        interval = f"[{self.ratio.low:.3f}, {self.ratio.high:.3f}]" if self.sampled else ""
        values = f"{self.a:>14.6g}{self.b:>14.6g} {self.unit:<10}"
        return f"{self.name:<52} {values}{self.ratio.median:>7.3f} {interval:<16} {self.verdict}"


def ratio_of_medians(
    top: Sequence[float], bottom: Sequence[float], *, level: float = 0.95, seed: int = 0, block: int = BLOCK
) -> Interval:
    """median(top) / median(bottom) with a percentile interval; both are resampled independently, in blocks."""
    generator = numpy.random.default_rng(seed)
    tops, bottoms = (_medians(numpy.asarray(s, dtype=numpy.float64), generator, block) for s in (top, bottom))
    tail = (1.0 - level) / 2.0
    low, high = numpy.quantile(tops / bottoms, (tail, 1.0 - tail))
    return Interval(float(numpy.median(top) / numpy.median(bottom)), float(low), float(high), level)


def _medians(samples: numpy.ndarray, generator: numpy.random.Generator, block: int) -> numpy.ndarray:
    """Medians of RESAMPLES resamples of circular blocks."""
    n = samples.size
    block = max(1, min(block, n // 4))
    count = -(-n // block)
    starts = generator.integers(0, n, size=(RESAMPLES, count, 1))
    picked = (starts + numpy.arange(block)).reshape(RESAMPLES, -1)[:, :n] % n
    return numpy.median(samples[picked], axis=1)


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[Line]:
    """The goals that both records have, in A's order."""
    theirs = {figure["name"]: figure for figure in b["figures"]}
    lines = []
    for mine in a["figures"]:
        other = theirs.get(mine["name"])
        if other is None or not mine["better"] or mine["value"] <= 0 or other["value"] <= 0:
            continue
        pair = (other, mine) if mine["better"] == "higher" else (mine, other)
        sampled = all(len(f["samples"]) >= 2 for f in pair)
        if sampled:
            ratio = ratio_of_medians(pair[0]["samples"], pair[1]["samples"])
        else:
            value = pair[0]["value"] / pair[1]["value"]
            ratio = Interval(value, value, value)
        lines.append(Line(mine["name"], mine["unit"], mine["value"], other["value"], ratio, sampled))
    return lines


def not_the_same(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Why two records are not of the same thing."""
    facts = {
        "kind": [r["kind"] for r in (a, b)],
        "preset": [r["preset"] for r in (a, b)],
        "device": [r["machine"]["name"] for r in (a, b)],
        **{f"settings.{k}": [r.get("settings", {}).get(k) for r in (a, b)] for k in ("T", "B")},
    }
    return [f"{name}: {x} and {y}" for name, (x, y) in facts.items() if x != y]


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What else differs, and may be the cause or the point of a difference."""
    found = []
    for name in ("commit", "dirty", "dtype"):
        if a.get(name) != b.get(name):
            found.append(f"{name}: {a.get(name)} → {b.get(name)}")
    found += [
        f"version of {name}: {a['versions'].get(name)} → {b['versions'].get(name)}"
        for name in sorted(a["versions"].keys() | b["versions"].keys())
        if a["versions"].get(name) != b["versions"].get(name)
    ]
    backends = [{row["site"] + " " + row["phase"]: row["backend"] for row in r["kernels"]} for r in (a, b)]
    changed = sorted(
        {
            f"{old} → {new}"
            for site in backends[0].keys() | backends[1].keys()
            if (old := backends[0].get(site)) != (new := backends[1].get(site))
        }
    )
    found += [f"kernels: {text}" for text in changed]
    found += [
        f"source of {name}: {a['sources'].get(name, 'absent')} → {b['sources'].get(name, 'absent')}"
        for name in sorted(a["sources"].keys() | b["sources"].keys())
        if a["sources"].get(name) != b["sources"].get(name)
    ]
    configs = [_flat(r.get("settings", {}).get("config", {})) for r in (a, b)]
    found += [
        f"{name}: {configs[0].get(name)} → {configs[1].get(name)}"
        for name in sorted(configs[0].keys() | configs[1].keys())
        if configs[0].get(name) != configs[1].get(name)
    ]
    for label, r in (("A", a), ("B", b)):
        state = r["machine"]["state"]
        if state["throttled_by"]:
            found.append(f"{label} was throttled: {', '.join(state['throttled_by'])}")
        if r["machine"]["load_average"] and r["machine"]["load_average"][0] > 0.5 * r["machine"]["cores"]:
            found.append(f"{label} began on a busy machine: load {r['machine']['load_average'][0]}")
    return found


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}" if prefix else key).items()}


def red(r: dict[str, Any]) -> list[str]:
    """The checks of a record that failed."""
    return [f"{check['name']}: {check['detail']}" for check in r["checks"] if not check["ok"]]


def pairs(a: pathlib.Path, b: pathlib.Path) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """The two files, or of two folders the records that have the same name."""
    if a.is_dir() != b.is_dir():
        raise record.RecordError(f"{a} and {b} must both be records or both be folders of records")
    if not a.is_dir():
        return [(a, b)]
    names = sorted({p.name for p in a.glob("*.json")} & {p.name for p in b.glob("*.json")})
    if not names:
        raise record.RecordError(f"{a} and {b} have no record of the same name")
    return [(a / name, b / name) for name in names]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="tritium bench compare", allow_abbrev=False,
        description="Two records of the same benchmark: ratios with intervals, and what else differs.",
    )  # fmt: skip
    made.add_argument("a", type=pathlib.Path, metavar="A", help="the record before, or a folder of records")
    made.add_argument("b", type=pathlib.Path, metavar="B", help="the record after, or a folder of records")
    made.add_argument("--gate", type=float, help="fail where B/A is certainly below this, e.g. 0.98")
    made.add_argument("--strict", action="store_true", help="fail where B/A is not certainly above the gate")
    made.add_argument("--anyway", action="store_true", help="compare records that are not of the same thing")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """``tritium bench compare``; for the exit status see the module."""
    made = parser()
    a = made.parse_args(argv)
    if a.gate is not None and not 0.0 < a.gate < 10.0:
        made.error(f"--gate is a ratio, e.g. 0.98, not {a.gate}")
    if a.strict and a.gate is None:
        made.error("--strict needs a --gate to be strict about")
    try:
        found = [(x, y, record.read(x), record.read(y)) for x, y in pairs(a.a, a.b)]
    except record.RecordError as error:
        print(f"tritium bench compare: {error}", file=sys.stderr)
        return 2
    return max(_show(*item, a) for item in found)


def _show(
    path_a: pathlib.Path, path_b: pathlib.Path, a: dict[str, Any], b: dict[str, Any], options: argparse.Namespace
) -> int:
    different = not_the_same(a, b)
    if different and not options.anyway:
        print(
            f"{path_a} and {path_b} are not of the same thing ({'; '.join(different)}), so a ratio would say nothing; "
            "--anyway compares them",
            file=sys.stderr,
        )
        return 2
    wrong = [f"A: {text}" for text in red(a)] + [f"B: {text}" for text in red(b)]
    if wrong:
        print(
            f"{path_a} and {path_b} are not compared, a check failed in them:\n  " + "\n  ".join(wrong), file=sys.stderr
        )
        return 1
    print(f"A: {path_a}, {a['date']}, {a['commit'][:10]}\nB: {path_b}, {b['date']}, {b['commit'][:10]}")
    for text in [*different, *differences(a, b)]:
        print(f"  {text}")
    lines = compare(a, b)
    if not lines:
        print("the records have no figure in common that is a goal", file=sys.stderr)
        return 2
    print(f"\n{'':<52} {'A':>14}{'B':>14} {'':<10}{'B/A':>7} 95 % interval    (above 1: B is better)")
    for line in lines:
        print(line)
    if options.gate is None:
        return 0
    failed = [line.name for line in lines if line.below(options.gate, options.strict)]
    rule = "not certainly above" if options.strict else "certainly below"
    print(f"\ngate {options.gate:g}: " + (f"FAILED, {rule} it: {', '.join(failed)}" if failed else "passed"))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
