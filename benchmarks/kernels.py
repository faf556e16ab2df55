"""Speed of the ops: op × backend × case, interleaved, for backends that are right.

    tritium bench kernels [OP ...] [--backends a,b] [--cases PATTERN] [--dtypes fp32,bf16] [--device cuda] [--compiled]

Before a backend is timed it is held to the contract (tritium.kernels.contract) on the op's small cases, in the dtype
and on the device of the timing. One that is red gets no figure, and the exit status is 1. Rates are those of an ideal
kernel's work (cases.py: bytes and flops that must be moved and done once) in the time that this backend took. They are
shown as parts of what a large copy and a large product reach on this device, measured before and after each op, and of
the bound: kernels/peaks.py's where it knows the device, else the one that these two rates give.

Other packages' kernels are backends like tritium's own, where they are installed; Inductor is the reference under
torch.compile.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import math
import pathlib
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tritium.benchmarks import record, stages, timing
from tritium.kernels import contract, peaks
from tritium.kernels.case import Case
from tritium.kernels.op import Backend, KernelError, Op, nearest
from tritium.kernels.ops import OPS
from tritium.kernels.site import Machine, interpreting

if TYPE_CHECKING:
    from tritium.benchmarks.gpu_baseline import Bench

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_GFLOP = 2.0  # on a CPU, larger cases are left out unless named
INDUCTOR = "inductor"  # a name for the reference under torch.compile
ROW: record.Schema = {
    "op": str, "backend": str, "case": str, "dtype": str, "compiled": bool,
    "what": str,  # "forward", "forward+backward" or, of an update op, "update"
    "stable": bool,  # whether its warm-up ended before its limit
    "p20_ms": record.NUMBER, "p50_ms": record.NUMBER, "p80_ms": record.NUMBER, "noise": record.NUMBER,
    "gb_per_s": record.NUMBER, "tflop_per_s": record.NUMBER,
    "of_copy": record.NUMBER, "of_matmul": record.NUMBER,  # as fractions of this device's measured rates
    "of_bound": record.NUMBER,
    "bound_by": str,  # "memory", "tensor cores", ... of kernels/peaks.py; else "measured copy" or "measured matmul"
    "over_reference": (dict, type(None)),  # interval of the speed ratio to the eager reference; null for that itself
}  # fmt: skip
SCHEMA: record.Schema = {
    "clock": str,
    "rounds": int,
    "rates": {str: {"copy_gb_per_s": record.NUMBER, "matmul_tflop_per_s": record.NUMBER}},  # by dtype, medians
    "peak": (str, type(None)),  # the device in kernels/peaks.py
    "rows": [ROW],
    "refused": [{"op": str, "backend": str, "why": str}],
    "red": [str],
}


@dataclass(frozen=True)
class Measured:
    """One timed call: see ROW."""

    op: str
    backend: str
    case: str
    dtype: str
    compiled: bool
    what: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    noise: float
    gb_per_s: float
    tflop_per_s: float
    over_reference: dict[str, float] | None
    samples_ms: tuple[float, ...] = ()
    stable: bool = True

    @property
    def label(self) -> str:
        """What names its figure in a record."""
        mode = " compiled" if self.compiled else ""
        return f"{self.op}.{self.backend}{mode} {self.case} {self.dtype} {self.what}"

    def __str__(self) -> str:
        label = f"{self.op}.{self.backend}{' compiled' if self.compiled else ''}"
        ratio = ""
        if self.over_reference is not None:
            ratio = "{median:.2f} × reference [{low:.2f}, {high:.2f}]".format(**self.over_reference)
        spread = f"{self.p50_ms:>9.4f} ms [{self.p20_ms:.4f}, {self.p80_ms:.4f}]"
        rates = f"{self.gb_per_s / 1e3:>7.4f} TB/s {self.tflop_per_s:>8.4f} TFLOP/s"
        warm = "" if self.stable else "  (timed before it settled)"
        return f"{label:<34} {self.case:<24} {self.dtype:<5} {self.what:<17} {spread} {rates}  {ratio}{warm}"


class Gate:
    """Which backends may be timed: each is held to the contract once per dtype and mode, on the op's small cases."""

    def __init__(self, device: str, say: Callable[[str], object] = lambda text: None):
        self.device, self.say = device, say
        self.red: list[str] = []
        self._passed: dict[tuple[str, str, torch.dtype, bool], bool] = {}

    def trust(self, reports: Sequence[contract.Report]) -> None:
        """Take over a check of all small cases that has been made, so as not to make it again; and the reference, which
        is what it was made against."""
        for key in {(r.op, r.backend, r.dtype, r.compiled) for r in reports}:
            mine = [r for r in reports if (r.op, r.backend, r.dtype, r.compiled) == key]
            self.red += [str(r) for r in mine if r.status == "failed"]
            self._passed[key] = any(r.ok for r in mine) and not any(r.status == "failed" for r in mine)
            self._passed[key[0], "reference", key[2], key[3]] = True

    def admits(self, op: Op, backend: Backend, dtype: torch.dtype, compiled: bool = False) -> bool:
        """False when a check failed (its text is in ``red``) or when not one could be made."""
        if backend.name == "reference" and not compiled:  # what the contract is made of
            return True
        key = (op.name, backend.name, dtype, compiled)
        if key not in self._passed:
            small = [case for case in op.cases.CASES if not case.large]
            if compiled:  # the compiler sees one function; a few cases of it are enough, each costs seconds
                small = [case for case in small if math.prod(case.shape.values()) > 0][:2]
            mode = " compiled" if compiled else ""
            short = str(dtype).removeprefix("torch.")
            self.say(f"{op.name}.{backend.name}{mode} {short}: its contract, {len(small)} cases")
            reports = [contract.check(op, backend, case, dtype, self.device, compiled=compiled) for case in small]
            failed = [str(report) for report in reports if report.status == "failed"]
            if not failed and not any(report.ok for report in reports):
                failed = [f"{op.name}.{backend.name} {dtype}: no case could be run, so nothing shows that it is right"]
            self.red += failed
            self._passed[key] = not failed
        return self._passed[key]


def call_of(
    backend: Backend, inputs: Mapping[str, Any], compiled: bool = False, backward: bool = False
) -> Callable[[], object]:
    """One call on ``inputs`` (of cases.py), with its backward if asked for; ``prepare`` runs outside, as in a run."""
    arguments = dict(inputs)
    if backend.prepare is not None and isinstance(arguments.get("seq_start"), Tensor):
        arguments["seq_start"] = backend.prepare(arguments["seq_start"])
    function = torch.compile(backend.function, fullgraph=True, dynamic=False) if compiled else backend.function
    if not backward:
        return lambda: function(**arguments)
    leaves = [value for value in arguments.values() if isinstance(value, Tensor) and value.requires_grad]
    with torch.no_grad():
        upstream = [torch.randn_like(output) for output in _tuple(function(**arguments))]
    return lambda: torch.autograd.grad(_tuple(function(**arguments)), leaves, upstream)


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def kinds(op: Op) -> tuple[str, ...]:
    """What is timed of an op."""
    if op.updates:
        return ("update",)
    return ("forward", "forward+backward") if op.has_gradient else ("forward",)


def work(op: Op, case: Case, dtype: torch.dtype, what: str) -> tuple[int, int]:
    """(FLOPs, bytes) of an ideal kernel: forward or update, or with the backward added."""
    flops, moved = op.cases.flops(case), op.cases.bytes(case, dtype)
    if what == "forward+backward":
        flops, moved = flops + op.cases.flops_backward(case), moved + op.cases.bytes_backward(case, dtype)
    return flops, moved


@dataclass
class Request:
    """What to time. backends: empty for all; module paths are added. pattern: of case names, or several with commas
    between; empty for the large ones (on a CPU, those it can bear). compiled: every backend under torch.compile as
    well. inductor: the reference alone. say: told what is being done, before each part that takes a while.
    """

    ops: Sequence[Op]
    device: str
    dtypes: Sequence[torch.dtype]
    backends: Sequence[str] = ()
    pattern: str = ""
    compiled: bool = False
    rounds: int = 10
    inner: int = 3
    inductor: bool = False
    say: Callable[[str], object] = lambda text: None


def bench_case(
    op: Op,
    backends: Sequence[tuple[Backend, bool]],
    case: Case,
    dtype: torch.dtype,
    request: Request,
    clock: timing.Clock,
    refused: list[dict[str, str]],
    broken: list[str] | None = None,
) -> Iterator[Measured]:
    """Time the given (backend, compiled) on one case, interleaved; a round is twice ``inner`` calls of each.

    A backend for which the device's memory does not suffice is left out, and ``refused`` says so; of one that raises
    anything else ``broken`` (None: it is raised).
    """
    (short,) = (name for name, known in DTYPES.items() if known == dtype)
    request.say(f"{op.name} {case.name} {short}: inputs")
    inputs = [op.cases.inputs(case, dtype, request.device, seed) for seed in (0, 1)]
    for what in kinds(op):
        arms: dict[str, timing.Arm] = {}
        named: dict[str, tuple[Backend, bool]] = {}
        stable: dict[str, bool] = {}
        for backend, compiled in backends:
            key = f"{backend.name}{' compiled' if compiled else ''}"
            request.say(f"{op.name}.{key} {case.name} {short} {what}: warm-up")
            try:
                turn = itertools.cycle([call_of(backend, i, compiled, what == "forward+backward") for i in inputs])
                arm = timing.timed(lambda turn=turn: next(turn)(), clock, request.inner)  # type: ignore[misc]
                stable[key] = timing.warm_up(arm, limit_s=20.0).stable
            except torch.OutOfMemoryError:
                refused.append({"op": op.name, "backend": key, "why": f"{case} {what}: out of memory"})
                torch.cuda.empty_cache()
                continue
            except Exception as error:  # a backend of anyone's; the others are timed all the same
                if broken is None:
                    raise
                words = (str(error).strip() or "no message").splitlines()[0][:300]
                broken.append(f"{op.name}.{key} {case} {what}: {type(error).__name__}: {words}")
                continue
            arms[key], named[key] = arm, (backend, compiled)
        if not arms:
            continue
        request.say(f"{op.name} {case.name} {short} {what}: {request.rounds} rounds of {', '.join(arms)}")
        samples = timing.interleave(arms, request.rounds)
        flops, moved = work(op, case, dtype, what)
        for key, taken in samples.items():
            backend, compiled = named[key]
            ratio = None
            if key != "reference" and "reference" in samples:
                ratio = timing.speedup(taken, samples["reference"]).to_json()
            low, ms, high = (taken.quantile_ms(q) for q in (0.2, 0.5, 0.8))
            yield Measured(
                op.name, backend.name, case.name, short, compiled, what, low, ms, high, timing.noise(taken),
                moved / ms / 1e6, flops / ms / 1e9, ratio, tuple(taken.ms), stable[key],
            )  # fmt: skip


def wanted(op: Op, case: Case, request: Request) -> bool:
    """Whether a case is to be timed."""
    if request.pattern:
        return any(fnmatch.fnmatch(case.name, pattern) for pattern in request.pattern.split(","))
    return case.large and (request.device != "cpu" or op.cases.flops(case) <= CPU_GFLOP * 1e9)


def check_request(op: Op, backend: str, device: str, dtypes: Sequence[torch.dtype], pattern: str) -> Request:
    """What ``tritium kernels check`` times of one backend: on a GPU the large cases; on a CPU one case, the smallest of
    these if it can bear it, else the largest of the others."""
    request = Request([op], device, dtypes, [backend], pattern)
    if not pattern and device == "cpu":
        bearable = [case for case in op.cases.CASES if op.cases.flops(case) <= CPU_GFLOP * 1e9]
        large = [case for case in bearable if case.large]
        chosen = min(large, key=op.cases.flops) if large else max(bearable, key=op.cases.flops)
        request = Request([op], device, dtypes, [backend], chosen.name, rounds=6, inner=1)
    return request


def bench_ops(
    request: Request,
    gate: Gate,
    clock: timing.Clock,
    refused: list[dict[str, str]],
    broken: list[str] | None = None,
) -> Iterator[Measured]:
    """Time every wanted backend of every wanted op on its large cases (or those named by ``pattern``).

    The eager reference is always among them. Backends that cannot serve a case are added to ``refused``; red ones to
    ``gate.red``; those that raise where they are timed to ``broken``, or it is raised where that is None.
    """
    machine = Machine.here(request.device)
    for op, dtype in itertools.product(request.ops, request.dtypes):
        for case in op.cases.CASES:
            if not wanted(op, case, request):
                continue
            chosen: list[tuple[Backend, bool]] = []
            paths = [name for name in request.backends if "." in name and name not in op.backends()]
            for name in [*op.backends(), *paths]:
                if request.backends and name not in request.backends and name != "reference":
                    continue
                try:
                    backend = op.load(name)
                    why = backend.unsupported(contract.site_of(op, case, dtype, machine))
                except KernelError as error:
                    why = str(error)
                if why is not None:
                    row = {"op": op.name, "backend": name, "why": why}
                    refused += [row] if row not in refused else []
                    continue
                also = request.compiled or (name == "reference" and request.inductor)
                modes = (False, True) if also and not op.updates else (False,)
                chosen += [(backend, mode) for mode in modes if gate.admits(op, backend, dtype, mode)]
            yield from bench_case(op, chosen, case, dtype, request, clock, refused, broken)


def rates(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What a large copy and a large product reach on this device now: what all rates are fractions of."""
    from tritium.benchmarks import anatomy
    from tritium.engine import metrics

    side = 8192 if device == "cuda" else 1024
    return {
        "copy_gb_per_s": anatomy.copy_rate(device) / 1e9,
        "matmul_tflop_per_s": metrics.matmul_rate(torch.device(device), dtype, side, side, side) / 1e12,
    }


def peak_of(name: str) -> peaks.Peak | None:
    """The entry of kernels/peaks.py for a device's marketing name, or None: also for a board of the same chip that is
    slower or has other memory, of which that entry's figures are no bound."""
    peak = peaks.by_name(name)
    return peak if peak is not None and peak.same_matrix(name) and peak.same_memory(name) else None


def fractions(row: Measured, reached: Mapping[str, float], peak: peaks.Peak | None = None) -> dict[str, Any]:
    """ROW's of_copy, of_matmul, of_bound and bound_by."""
    of_copy = row.gb_per_s / reached["copy_gb_per_s"]
    of_matmul = row.tflop_per_s / reached["matmul_tflop_per_s"]
    if peak is not None:
        op = OPS[row.op]
        (case,) = (case for case in op.cases.CASES if case.name == row.case)
        bound_ms, by = peaks.bound(op, case, DTYPES[row.dtype], row.what, peak)
        of_bound = bound_ms / row.p50_ms
    elif row.op in peaks.ON_TENSOR_CORES and of_matmul > of_copy:  # products count only where they are matrices'
        of_bound, by = of_matmul, "measured matmul"
    else:
        of_bound, by = of_copy, "measured copy"
    return {"of_copy": of_copy, "of_matmul": of_matmul, "of_bound": of_bound, "bound_by": by}


def on_device(bench: Bench) -> None:
    """The stage ``kernels`` of ``make gpu``: every op at the shapes that matter, in bf16."""
    gate = Gate(bench.device)
    refused: list[dict[str, str]] = []
    broken: list[str] = []
    ops = [OPS["layer_norm"]] if bench.tiny else list(OPS.values())
    request = Request(ops, bench.device, (torch.bfloat16,))
    if bench.tiny:
        request = Request(ops, bench.device, (torch.float32,), pattern="odd", rounds=2, inner=1)
    for row in bench_ops(request, gate, bench.cold, refused, broken):
        more = {
            key: value
            for key, value in asdict(row).items()
            if key not in ("op", "backend", "case", "what", "samples_ms")
        }
        name = f"{row.op}.{row.backend} {row.case} {row.what}"
        bench.lines.write(name, row.gb_per_s, "GB/s", **more)
    for item in refused:
        bench.lines.write(f"{item['op']}.{item['backend']}", item["why"][:300], "refused")
    if gate.red:
        raise SystemExit("red, hence not timed: " + "; ".join(gate.red))
    if broken:
        raise SystemExit("failed where it was to be timed: " + "; ".join(broken))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="tritium bench kernels", allow_abbrev=False,
        description="Speed of the ops, backend by backend; one that breaks the contract gets no figure.",
    )  # fmt: skip
    made.add_argument("ops", nargs="*", metavar="OP", help="default: all")
    made.add_argument(
        "--backends", default="",
        help=f"comma-separated names or module paths of your own; {INDUCTOR} is the reference compiled; the reference "
        f"is always timed (default: all that can run, on a GPU {INDUCTOR} too)",
    )  # fmt: skip
    made.add_argument(
        "--cases", default="", metavar="PATTERN", help="case names, e.g. 'gpt2_*' (default: the large ones)"
    )
    made.add_argument("--dtypes", default="", help="fp32, bf16, fp16 (default: fp32 on a CPU, bf16 on a GPU)")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--compiled", action="store_true", help="every backend also inside torch.compile")
    made.add_argument("--rounds", type=int, default=10, help="interleaved rounds (default: 10)")
    made.add_argument("--json", action="store_true", help="print the record, and all else to stderr")
    made.add_argument(
        "--out",
        type=pathlib.Path,
        help="file of the record (default: benchmarks/results/MACHINE/kernels_OPS_DTYPES.json)",
    )
    return made


def _check(made: argparse.ArgumentParser, a: argparse.Namespace, dtypes: Sequence[str]) -> None:
    """Exit with status 2 where the command line cannot be meant, before anything is timed."""

    def known(given: Sequence[str], names: Sequence[str], noun: str) -> None:
        for name in given:
            if name not in names:
                made.error(
                    f"there is no {noun} {name!r}; the nearest are {nearest(name, names)}. All: {', '.join(names)}"
                )

    known(a.ops, list(OPS), "op")
    known(dtypes, list(DTYPES), "dtype")
    ops = [OPS[name] for name in a.ops or OPS]
    backends = sorted({name for op in ops for name in op.backends()} | {INDUCTOR})
    known([name for name in a.backends.split(",") if name and "." not in name], backends, "backend of these ops")
    cases = sorted({case.name for op in ops for case in op.cases.CASES})
    for pattern in filter(None, a.cases.split(",")):
        if not fnmatch.filter(cases, pattern):
            made.error(f"--cases {pattern} matches no case of these ops; the nearest are {nearest(pattern, cases)}")
    if interpreting():
        made.error("TRITON_INTERPRET is set, and Triton's interpreter says nothing about speed; unset it")
    if a.rounds < 2:
        made.error(f"--rounds must be at least 2, or there is no interval; it is {a.rounds}")


def _path(a: argparse.Namespace, dtypes: Sequence[str], folder: pathlib.Path) -> pathlib.Path:
    """Where the record goes when --out does not say: a file for each choice, so that a part does not replace the
    whole."""
    parts = ["kernels", "_".join(a.ops) or "all", *dtypes, a.backends, a.cases, "compiled" if a.compiled else ""]
    return folder / (re.sub(r"[^\w-]+", "_", "_".join(filter(None, parts))) + ".json")


@stages.ended_by_signals()
def main(argv: Sequence[str] | None = None) -> int:
    """``tritium bench kernels``; 0, or 1 when a backend was red, failed at a size or named and without a figure, 2 for
    a wrong command line, 130 after Ctrl-C: then the ops that were done are in a record of their own,
    NAME_stopped.json."""
    argv = list(sys.argv[1:] if argv is None else argv)
    made = parser()
    a, unknown = made.parse_known_args(argv)
    if unknown:
        flags = [flag for action in made._actions for flag in action.option_strings]
        made.error(f"there is no flag {unknown[0]!r}; the nearest are {nearest(unknown[0], flags)}")
    if a.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: torch finds no GPU here, so there is nothing to time; use --device cpu")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if a.device == "auto" else a.device
    dtypes = a.dtypes.split(",") if a.dtypes else ["bf16" if device == "cuda" else "fp32"]
    dtypes, a.ops = list(dict.fromkeys(dtypes)), list(dict.fromkeys(a.ops))
    _check(made, a, dtypes)
    say = sys.stderr if a.json else sys.stdout
    backends = [name for name in a.backends.split(",") if name]
    result = record.begin("kernels", shlex.join(["tritium", "bench", "kernels", *argv]), device)
    from tritium.benchmarks import throughput

    path = a.out or _path(a, dtypes, throughput.results_folder(result))
    if why := record.unwritable(path):
        made.error(f"--out: {why}")
    peak = peak_of(result["machine"]["name"]) if device == "cuda" else None
    gate = Gate(device, _progress)
    refused: list[dict[str, str]] = []
    broken: list[str] = []
    clock = timing.clock_for(device, scrub_bytes=256 << 20)
    rows: list[dict[str, Any]] = []
    seen: dict[str, list[dict[str, float]]] = {}
    named = [name for name in backends if name != INDUCTOR] or ["reference"] * bool(backends)
    inductor = INDUCTOR in backends or (device == "cuda" and not backends)
    stopped = ""
    todo = list(itertools.product(a.ops or OPS, dtypes))
    for done, (name, dtype) in enumerate(todo):
        op = OPS[name]
        request = Request(
            [op], device, [DTYPES[dtype]], named, a.cases, a.compiled, a.rounds, inductor=inductor, say=_progress
        )  # fmt: skip
        if not any(wanted(op, case, request) for case in op.cases.CASES):
            why = "its large cases are too much for a CPU" if not a.cases else f"it has no case {a.cases}"
            refused.append({"op": name, "backend": "*", "why": f"{why}; name one with --cases"})
            continue
        try:
            _progress(f"{name} {dtype}, {done + 1} of {len(todo)}: a copy and a product, that rates are parts of")
            before = rates(device, DTYPES[dtype])
            found = list(bench_ops(request, gate, clock, refused, broken))
            around = [before, rates(device, DTYPES[dtype])]
        except KeyboardInterrupt as interrupt:  # what is done is written
            stopped = str(interrupt) or "stopped by Ctrl-C"
            refused += [{"op": op, "backend": "*", "why": f"{stopped} ({dtype})"} for op, dtype in todo[done:]]
            path = path.with_name(f"{path.stem}_stopped.json")
            break
        if not found:
            continue
        seen.setdefault(dtype, []).extend(around)
        reached = {key: statistics.mean(one[key] for one in around) for key in before}
        for row in found:
            of = fractions(row, reached, peak)
            shares = "{of_bound:.0%} of bound ({bound_by}), {of_copy:.0%} of copy, {of_matmul:.0%} of matmul".format(
                **of
            )
            print(f"{row}  {shares}", file=say, flush=True)
            fields = asdict(row) | of
            result["figures"].append(record.figure(row.label, "ms", "lower", fields.pop("samples_ms")))
            rows.append(fields)
    if stopped and not rows:
        print(f"tritium bench kernels: {stopped} before the first op was done; nothing is written", file=sys.stderr)
        return 130
    record.after(result)
    for item in refused:
        print(f"refused {item['op']}.{item['backend']}: {item['why']}", file=say)
    for text in gate.red:
        print(f"RED, hence no speed: {text}", file=sys.stderr)
    for text in broken:
        print(f"BROKEN, hence no speed: {text}", file=sys.stderr)
    for dtype, taken in seen.items():
        for key, name, unit in (("copy_gb_per_s", "copy", "GB/s"), ("matmul_tflop_per_s", "matmul", "TFLOP/s")):
            result["figures"].append(record.figure(f"{name} {dtype}", unit, "", [one[key] for one in taken]))
    result["sources"] = record.sources((row["op"], row["backend"]) for row in rows)
    result["checks"] = contract_checks(rows, gate.red) + [
        record.check(f"{label} runs what it does not refuse", False, "; ".join(texts)[:2000])
        for label, texts in itertools.groupby(sorted(broken), lambda text: text.split()[0])
    ]
    result |= {
        "clock": clock.name, "rounds": a.rounds, "rows": rows, "refused": refused, "red": gate.red,
        "rates": {
            dtype: {key: statistics.median(one[key] for one in taken) for key in taken[0]}
            for dtype, taken in seen.items()
        },
        "peak": None if peak is None else peak.name,
    }  # fmt: skip
    for dtype, rate in result["rates"].items():
        shown = "{copy_gb_per_s:.1f} GB/s, a product {matmul_tflop_per_s:.3g} TFLOP/s".format(**rate)
        print(f"measured here, {dtype}: a copy reads and writes {shown}", file=say)
    replaced = record.write(result, SCHEMA, path)
    print(f"written: {path}{replaced}", file=say, flush=True)
    if a.json:
        print(json.dumps(result, indent=1))
    timed = {INDUCTOR if row["compiled"] and row["backend"] == "reference" else row["backend"] for row in rows}
    silent = [name for name in backends if name not in timed]
    for name in silent if not stopped else ():
        reasons = dict.fromkeys([i["why"] for i in refused if i["backend"] == name] or ["see above"])
        print(f"{name} gave no figure: {'; '.join(reasons)}", file=sys.stderr)
    return 130 if stopped else int(bool(gate.red or broken or silent))


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def contract_checks(rows: Sequence[Mapping[str, Any]], red: Sequence[str]) -> list[dict[str, Any]]:
    """A check for each backend of an op: that it keeps its contract. The timed ones do; ``red`` holds the others'."""
    checks = {}
    for row in rows:
        name = f"{row['op']}.{row['backend']} keeps its contract"
        checks[name] = record.check(name, True, "on every small case that it does not refuse, before it was timed")
    for text in red:
        label = next((word for word in text.split() if "." in word), "a backend")
        name = f"{label} keeps its contract"
        checks[name] = record.check(name, False, text[:2000])
    return list(checks.values())


if __name__ == "__main__":
    sys.exit(main())
