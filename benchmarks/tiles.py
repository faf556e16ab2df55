"""Other tiles for the Triton launchers: which are right, and which is fastest on this GPU (a stage of ``make gpu``).

Every launcher asks its module's ``config(...)`` for a tile. A :class:`Variant` puts another one in its place for a
while, with plans of its own, so that tiles are timed interleaved in one process. A tile is held to the contract before
it is timed, each in a process that it may spoil (:mod:`workers`), and must agree with the launcher's own on the case
that is timed. The best are written to kernels/tuning/tiles/DEVICE.json, where launchers on such a device find them.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import inspect
import itertools
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tritium.benchmarks import kernels, timing, workers
from tritium.benchmarks.gpu_baseline import Bench
from tritium.kernels import contract
from tritium.kernels.lib import triton_launch as launch
from tritium.kernels.ops import OPS
from tritium.kernels.site import Machine

Changes = Mapping[str, int | str]  # field of the tile → another value, or "x2" or "/2" of the launcher's own
AGREE = 8.0  # roundoffs of the largest element, between two tiles' results: another order of summation, no more
WARPS: tuple[Changes, ...] = ({"num_warps": "/2"}, {"num_warps": "x2"})
NORMS, POINTWISE = ("layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm"), ("gelu", "swiglu", "geglu", "relu2")
ROWS: tuple[Changes, ...] = ({"BLOCK_N": "x2"}, {"BLOCK_N": "/2"}, {"BLOCK_N": "x2", "num_warps": "x2"})


@dataclass(frozen=True)
class Part:
    """One choice of a launcher: calls of ``function`` in ``module`` whose arguments have the values ``when``.

    what: which of kernels.kinds() is timed. case: on which case. gate: small cases whose tiles are chosen by the same
    calls. also: further ops whose launchers ask by the same calls: the tile is held to their contract too.
    """

    op: str
    name: str
    module: str
    what: str
    case: str
    gate: tuple[str, ...]
    candidates: tuple[Changes, ...]
    when: Mapping[str, Any] = field(default_factory=dict)
    function: str = "config"
    also: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.op} {self.name} {self.case}"


def _attention(head: int, case: str) -> tuple[Part, ...]:
    """The three kernels at one width of heads."""
    module, gate, also = "tritium.kernels.attention.impl_triton", (f"head_{head}",), ("attention_lse",)
    return (
        Part("attention", "forward", module, "forward", case, gate, (
            {"BLOCK_N": 128, "num_stages": 2}, {"num_stages": 2}, {"num_stages": 4}, {"num_warps": 4},
            {"BLOCK_M": 64, "num_warps": 4}, {"BLOCK_N": 32, "num_stages": 4},
        ), {"kernel": "forward", "D": head}, also=also),
        Part("attention", "backward_keys", module, "forward+backward", case, gate, (
            {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8}, {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8},
            {"num_stages": 3}, {"num_warps": 8}, {"BLOCK_M": 32, "BLOCK_N": 64},
        ), {"kernel": "backward_keys", "D": head}, also=also),
        Part("attention", "backward_queries", module, "forward+backward", case, gate, (
            {"BLOCK_M": 128, "num_warps": 8, "num_stages": 2}, {"BLOCK_N": 32}, {"num_warps": 8}, {"num_stages": 2},
            {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8},
        ), {"kernel": "backward_queries", "D": head}, also=also),
    )  # fmt: skip


def _norm(op: str, case: str) -> tuple[Part, ...]:
    module, gate = "tritium.kernels.lib.triton_norms", ("odd", "gpt2_width", "many_rows")
    programs: tuple[Changes, ...] = ({"programs": "x2"}, {"programs": "/2"}, {"STAGES": 2}, {"STAGES": 4})
    also = tuple(name for name in NORMS if name != op and name.startswith("add_") == op.startswith("add_"))
    backward = WARPS + ROWS + programs
    return (
        Part(op, "forward", module, "forward", case, gate, WARPS + ROWS, {"backward": False}, also=also),
        Part(op, "backward", module, "forward+backward", case, gate, backward, {"backward": True}, also=also),
    )


def _pointwise(op: str, case: str) -> tuple[Part, ...]:
    module, gate = "tritium.kernels.lib.triton_pointwise", ("odd", "several_tiles")
    narrower: Changes = {"BLOCK_F": "/2", "BLOCK_N": "x2"}
    also = tuple(name for name in POINTWISE if name != op)
    return (Part(op, "tile", module, "forward+backward", case, gate, (*WARPS, *ROWS, narrower), also=also),)


PARTS = (
    *_attention(64, "gpt2_124m_1k"),
    *_norm("layer_norm", "gpt2_124m"),
    *_norm("add_layer_norm", "gpt2_124m"),
    Part("cross_entropy", "tile", "tritium.kernels.cross_entropy.impl_triton", "forward+backward", "gpt2_16k",
         ("odd", "padded", "smoothing"),
         ({"BLOCK_V": "x2"}, {"BLOCK_V": "/2"}, *WARPS, {"BLOCK_V": "x2", "num_warps": "x2"}),
         also=("linear_cross_entropy",)),
    *_pointwise("gelu", "gpt2_124m"),
    Part("adamw", "tile", "tritium.kernels.adamw.impl_triton", "update", "gpt2_124m", ("odd", "several_tiles"),
         ({"CHUNK": "x2"}, {"CHUNK": "/2"}, {"BLOCK": "x2", "num_warps": "x2"}, {"num_warps": "x2"})),
    Part("global_norm", "tile", "tritium.kernels.global_norm.impl_triton", "forward", "gpt2_124m",
         ("odd", "several_tiles"),
         ({"programs_per_processor": "/2"}, {"CHUNK": "x2"}, {"CHUNK": "/2", "num_warps": "/2"})),
    *_attention(128, "d128_4k"),
    *_norm("rms_norm", "width_768"),
    *_norm("add_rms_norm", "width_768"),
    *_pointwise("swiglu", "llama_8b"),
    *_pointwise("geglu", "gpt2_124m"),
    *_pointwise("relu2", "gpt2_124m"),
    Part("embedding", "tile", "tritium.kernels.embedding.impl_triton", "forward+backward", "gpt2_124m",
         ("odd", "several_tiles"), (*WARPS, {"ROWS": "x2"}, {"ROWS": "/2"})),
    Part("rope", "tile", "tritium.kernels.rope.impl_triton", "forward+backward", "gpt2_124m", ("odd", "many_tokens"),
         WARPS + ROWS),
    Part("linear", "tile", "tritium.kernels.linear.impl_triton", "forward+backward", "gpt2_124m_up",
         ("odd", "three_axes", "long_sum"),
         ({"BLOCK_N": 128, "num_stages": 4}, {"BLOCK_N": 128, "num_warps": 4, "num_stages": 4}, {"num_stages": 4},
          {"BLOCK_K": 32, "num_stages": 4})),
)  # fmt: skip


def changed(tile: Any, changes: Changes) -> Any:
    """The named tuple ``tile`` with ``changes``."""
    values = {}
    for name, value in changes.items():
        own = getattr(tile, name)
        values[name] = value if isinstance(value, int) else 2 * own if value == "x2" else max(own // 2, 1)
    return tile._replace(**values)


class Variant:
    """A context in which the calls of ``part`` give the launcher's own tile with ``changes``, whatever was measured
    before. used: the arguments of these calls → (own tile, changed tile), as they happened.
    """

    def __init__(self, part: Part, changes: Changes):
        self.module: ModuleType = importlib.import_module(part.module)
        self.used: dict[str, tuple[dict[str, int], dict[str, int]]] = {}
        own: Callable[..., Any] = inspect.unwrap(getattr(self.module, part.function))
        signature = inspect.signature(own)

        def config(*args: Any, **kwargs: Any) -> Any:
            tile = own(*args, **kwargs)
            given = launch.arguments_of(signature, args, kwargs)
            if any(given.get(name) != value for name, value in part.when.items()):
                return tile
            other = changed(tile, changes)
            self.used[json.dumps(given)] = (tile._asdict(), other._asdict())
            return other

        # plans are cached, and would be the launcher's own: while this is entered the module has caches of its own
        self.mine: dict[str, Any] = {part.function: config}
        for name, function in vars(self.module).items():
            if isinstance(function, functools._lru_cache_wrapper) and name != part.function:
                size = function.cache_parameters()["maxsize"]
                self.mine[name] = functools.lru_cache(maxsize=size)(function.__wrapped__)
        self.theirs = {name: getattr(self.module, name) for name in self.mine}

    def __enter__(self) -> Variant:
        vars(self.module).update(self.mine)
        return self

    def __exit__(self, *exc: object) -> None:
        vars(self.module).update(self.theirs)


# ------------------------------------------------------------------------------------------------------------ the stage


def tune(bench: Bench) -> None:
    """Hold every candidate to the contract, time those that keep it, write the best. With ops named (``OPS=``) the best
    go to kernels/tuning/tiles/DEVICE.json too, in the place of what was there of the parts that were looked at.
    """
    from tritium.benchmarks import gpu_tritium as tritium

    arch = Machine.here(bench.device).arch
    entries: list[dict[str, Any]] = []
    parts = list(_parts(bench))
    known = {part.label: _facts(bench, part) for part in parts}
    red = tritium.red_backends(bench)
    fresh = []
    for part in parts:
        if (status := red.get((part.op, "triton"))) in ("hung", "crashed"):  # so would every candidate
            bench.lines.write(part.label, f"{status} in the contract", "left out")
            continue
        repeat = bench.run.again or bool(bench.run.ops)
        found = None if repeat else bench.run.earlier.line(part.label, {**known[part.label], "unit": "part"})
        if found is None:
            fresh.append(part)
        else:
            bench.lines.write(part.label, found.line["value"], "part", **known[part.label], recorded=str(found.path))
    gates = [
        workers.Item(f"{part.label} {_text(changes)}", f"{part.label} {_text(changes)}",
                     {"kind": "gate", "label": part.label, "changes": dict(changes)}, tritium.SLOW_S)
        for part in fresh for changes in _candidates(bench, part)
    ]  # fmt: skip
    green: dict[str, list[dict[str, Any]]] = {part.label: [] for part in fresh}
    finished: set[str] = set(green)
    count = 2 if bench.tiny else max(1, min(6, (os.cpu_count() or 1) // 2))
    for done in tritium.through_children(bench, gates, count):
        status = done.answer.get("status", done.status)
        bench.lines.write(done.item.name, status, "contract", reason=done.answer.get("reason", done.detail)[:300])
        label = done.item.task["label"]
        if status == "passed":
            green[label].append(done.item.task["changes"])
        elif status == "not run":
            finished.discard(label)
    timings = [
        workers.Item(label, label, {"kind": "time", "label": label, "changes": found}, tritium.SLOW_S)
        for label, found in green.items() if found
    ]  # fmt: skip
    for done in tritium.through_children(bench, timings, 1):
        for row in done.answer.get("rows", ()):
            ratio = row["over_own"]
            more = {key: row[key] for key in ("ms", "tile", "own")}
            interval = {"low": round(ratio["low"], 4), "high": round(ratio["high"], 4)}
            bench.lines.write(f"{done.item.name} {_text(row['changes'])}", ratio["median"], "× own tile", **interval,
                              **more)  # fmt: skip
        for why in done.answer.get("left_out", ()):
            bench.lines.write(done.item.name, why[:300], "left out")
        if done.status != "done":
            bench.lines.write(done.item.name, f"{done.status}: {done.detail}"[:300], "error")
            finished.discard(done.item.name)
            continue
        if (best := done.answer["best"]) is not None:
            about = {key: value for key, value in best.items() if key != "uses"}
            about |= {"arch": arch, **known[done.item.name], "date": datetime.date.today().isoformat()}
            entries += [{**about, **use} for use in best["uses"]]
    for label in finished:
        best_tile = next((_text(e["changes"]) for e in entries if e["label"] == label), "the launcher's own")
        bench.lines.write(label, best_tile, "part", **known[label])
    write(bench.lines.out / f"tiles_{arch}.json", entries)
    if bench.run.ops and not bench.tiny and (device := launch.device_name()):
        path = launch.tiles_path(device)
        write(path, entries, finished)
        bench.lines.write("written", str(path), "file", entries=len(entries))
    if not parts:
        raise SystemExit(f"no tile of {', '.join(bench.run.ops)} is a choice here; parts: {_known_ops()}")


def _known_ops() -> str:
    return ", ".join(dict.fromkeys(part.op for part in PARTS))


def _parts(bench: Bench) -> Iterator[Part]:
    """What to look at: in a rehearsal the first part of the named ops, or of layer_norm."""
    ops = bench.run.ops or (["layer_norm"] if bench.tiny else ())
    seen: set[str] = set()
    for part in PARTS:
        if (not ops or part.op in ops) and not (bench.tiny and part.op in seen):
            seen.add(part.op)
            yield part


def _candidates(bench: Bench, part: Part) -> Sequence[Changes]:
    return part.candidates[:2] if bench.tiny else part.candidates


def _facts(bench: Bench, part: Part) -> dict[str, Any]:
    from tritium.benchmarks import gpu_tritium as tritium

    about = {"op": part.op, "part": part.name, "candidates": [_text(c) for c in part.candidates]}
    facts = {name: value for name, value in bench.run.facts.items() if name != "tiles"}  # what is written changes it
    return {**about, "digest": tritium.source_of(part.op, "triton"), **facts}


def _text(changes: Changes) -> str:
    return " ".join(f"{name}={value}" for name, value in changes.items())


def write(path: pathlib.Path, entries: Sequence[Mapping[str, Any]], finished: Collection[str] = ()) -> None:
    """Put ``entries`` into the file, whole or not at all, in the place of those of the parts ``finished`` (labels) and
    of those for the same calls; of two new ones for the same calls the first stays. A damaged file is replaced.
    """
    try:
        old = [entry for entry in launch.read_tiles(path) if entry.get("label") not in finished]
    except ValueError as error:
        print(f"replaced: {error}", file=sys.stderr)
        old = []

    def key(entry: Mapping[str, Any]) -> tuple[str, str, str]:
        return entry["module"], entry["function"], json.dumps(entry["arguments"], sort_keys=True)

    merged = {key(entry): entry for entry in [*old, *reversed(entries)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(sorted(merged.values(), key=key), indent=2) + "\n")
    os.replace(temporary, path)


# ------------------------------------------------------------------------------------------------------ in the children


def try_one(bench: Bench, task: Mapping[str, Any]) -> dict[str, Any]:
    """Hold one candidate of a part to the contract, or time all that have kept it."""
    (part,) = (part for part in PARTS if part.label == task["label"])
    if task["kind"] == "gate":
        return hold(part, task["changes"], bench)
    return compare(part, task["changes"], bench)


def hold(part: Part, changes: Changes, bench: Bench) -> dict[str, Any]:
    """{status, reason}: "passed" when every gate case that this tile is used on keeps the contract, and of every op one
    is; in a rehearsal, the first gate case of the first op."""
    dtype = torch.float32 if bench.tiny else torch.bfloat16
    for op in [OPS[part.op]] if bench.tiny else [OPS[name] for name in (part.op, *part.also)]:
        used = 0
        cases = [case for case in op.cases.CASES if case.name in part.gate]
        for case in cases[:1] if bench.tiny else cases:
            with Variant(part, changes) as variant:  # a new one has cached no plan of another case
                report = contract.check(op, "triton", case, dtype, bench.device, variants=("plain", "strided"))
            if report.status == "failed":
                return {"status": "failed", "reason": f"{op.name} {case}: {report.reason}"[:300]}
            used += bool(report.ok and variant.used)
        if not used:
            why = f"no {op.name} of {', '.join(part.gate)} uses this tile: nothing shows it right"
            return {"status": "refused", "reason": why}
    return {"status": "passed", "reason": ""}


def compare(part: Part, found: Sequence[Changes], bench: Bench) -> dict[str, Any]:
    """{rows, left_out, best}: the tiles ``found`` beside the launcher's own, interleaved. best: the fastest of those
    whose interval lies above 1, or None."""
    op, dtype = OPS[part.op], torch.float32 if bench.tiny else torch.bfloat16
    name = part.gate[0] if bench.tiny else part.case
    (case,) = (case for case in op.cases.CASES if case.name == name)
    inputs = [op.cases.inputs(case, dtype, bench.device, seed) for seed in (0, 1)]
    backend = op.load("triton")
    arms: dict[str, timing.Arm] = {}
    variants: dict[str, tuple[Changes, Variant]] = {}
    left_out: list[str] = []
    own_results: list[Tensor] = []
    for changes in [{}, *found]:
        variant, key = Variant(part, changes), _text(changes)
        with contextlib.ExitStack() as stack:
            stack.enter_context(variant)
            try:
                calls = [kernels.call_of(backend, i, backward=part.what == "forward+backward") for i in inputs]
                if not op.updates:
                    results = [t.detach() for t in _tensors(calls[0]())]
                    own_results = own_results or results
                    if (why := disagreement(own_results, results, dtype)) is not None:
                        left_out.append(f"{key}: {why}")
                        continue
                arm = _arm(variant, calls, bench)
                timing.warm_up(arm, limit_s=10.0)
            except Exception as error:  # a tile that does not fit the GPU
                if not changes:
                    raise
                left_out.append(f"{key}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
                continue
        arms[key], variants[key] = arm, (changes, variant)
    samples = timing.interleave(arms, 2 if bench.tiny else 8)
    rows: list[dict[str, Any]] = []
    for key, taken in samples.items():
        changes, variant = variants[key]
        if changes:
            own, tile = next(iter(variant.used.values()))
            rows.append({
                "changes": dict(changes), "over_own": timing.speedup(taken, samples[""]).to_json(),
                "ms": taken.median_ms, "tile": tile, "own": own,
                "uses": [{"arguments": json.loads(a), "own": o, "tile": t} for a, (o, t) in variant.used.items()],
            })  # fmt: skip
    if (best := fastest(rows)) is not None:
        about = {"label": part.label, "op": part.op, "part": part.name, "module": part.module,
                 "function": part.function, "case": case.name, "what": part.what}  # fmt: skip
        best = {**about, **{key: best[key] for key in ("changes", "over_own", "uses")}}
    return {"rows": rows, "left_out": left_out, "best": best}


def fastest(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Of what was timed the fastest that is shown to be faster than the launcher's own, or None."""
    faster = [row for row in rows if row["over_own"]["low"] > 1.0]
    return max(faster, key=lambda row: row["over_own"]["median"], default=None)


def _arm(variant: Variant, calls: Sequence[Callable[[], object]], bench: Bench) -> timing.Arm:
    turn = itertools.cycle(calls)

    def arm() -> float:
        with variant:
            return statistics.median(bench.cold.times_ms([next(turn) for _ in range(1 if bench.tiny else 3)]))

    return arm


def _tensors(result: object) -> list[Tensor]:
    found = result if isinstance(result, (tuple, list)) else (result,)
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def disagreement(own: Sequence[Tensor], other: Sequence[Tensor], dtype: torch.dtype) -> str | None:
    """Why two tiles' results are not one result up to rounding, or None."""
    for i, (a, b) in enumerate(zip(own, other, strict=True)):
        if not a.numel():
            continue
        error, scale = (a.double() - b.double()).abs().max().item(), a.double().abs().max().item()
        if not error <= AGREE * contract.unit_roundoff(dtype) * scale:  # also when it is NaN
            return f"its result {i} differs from the launcher's own by {error:.3g}, where the largest is {scale:.3g}"
    return None
