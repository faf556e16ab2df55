"""Stages of ``make gpu`` that run tritium's own code: the contract on the device, the kernels' speed, training steps.

The contract and the kernels' speed are done item by item in children (:mod:`workers`): a kernel that hangs or spoils
the device costs itself. What an earlier run has shown of the same source is taken over (:mod:`gpu_records`).
"""

from __future__ import annotations

import collections
import functools
import gc
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from tritium.benchmarks import kernels, ours, peers, record, stages, timing, workers
from tritium.benchmarks.gpu_baseline import Bench, iter_arm, shape_of, tokens_per_second, write_speed
from tritium.benchmarks.gpu_records import oracle_digest
from tritium.benchmarks.peers import textbook
from tritium.benchmarks.throughput import LOSS_STEPS, equal_losses
from tritium.engine.config import Config
from tritium.engine.precision import resolve
from tritium.kernels import contract, peaks
from tritium.kernels.case import Case
from tritium.kernels.op import KernelError, Op
from tritium.kernels.ops import OPS

CHOICES = ("auto", "triton", "reference")
# what a step of GPT-2 spends its time in comes first
VALUE = ("attention", "linear_cross_entropy", "layer_norm", "adamw", "gelu", "global_norm", "cross_entropy", "linear")
LEFT_OUT = ("attention", "linear_cross_entropy", "layer_norm", "adamw")  # of `ablation`, where --ops names none
SLOW_S = 90.0  # what inputs of a large case, made by the host, or a compiled graph may take beside a hang's QUIET_S
COMPILE_S = 60.0  # what one Triton kernel may take to compile


def ops_of(bench: Bench) -> list[Op]:
    """The ops that the run looks at, the most valuable first."""
    names = [*(name for name in VALUE if name in OPS), *(name for name in OPS if name not in VALUE)]
    return [OPS[name] for name in names if not bench.run.ops or name in bench.run.ops]


@functools.cache
def source_of(op: str, backend: str) -> str:
    """record.source_digest, or "unknown" where the backend cannot be imported: then nothing is run of it either."""
    try:
        return record.source_digest(op, backend)
    except KernelError:
        return "unknown"


def through_children(bench: Bench, items: Sequence[workers.Item], count: int) -> Iterator[workers.Done]:
    """Every item as it ends, done by children of this stage."""
    patience = 3.0 if bench.tiny else 1.0  # a rehearsal may share a few cores with others
    path = bench.lines.out / bench.lines.stage
    return workers.work(
        items, [*bench.run.child, bench.lines.stage], path, count=min(count, len(items)), end=bench.run.end,
        quiet_s=patience * workers.QUIET_S, start_s=patience * 60.0,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ contract


def contract_cases(ops: Sequence[Op] | None = None, large: bool = False) -> Iterator[tuple[Op, str, Case]]:
    """Every (op, backend, case): the first case of every backend, then the second of every one, ..., so that a stage
    which runs out of time has looked at all of them; the references, which they are held to, at the end."""
    wanted = {op: [case for case in op.cases.CASES if case.large == large] for op in ops or OPS.values()}
    for references in (False, True):
        for i in range(max(map(len, wanted.values()))):
            for op, cases in wanted.items():
                for backend in op.backends() if i < len(cases) else ():
                    if (backend == "reference") == references:
                        yield op, backend, cases[i]


MODES = {  # stage → (inside torch.compile, dtype)
    "contract": (False, "bf16"), "contract_compiled": (True, "bf16"), "contract_fp32": (False, "fp32"),
}  # fmt: skip
COMPILED_CASES = 2  # of an op, inside torch.compile: it sees one function, and each case costs it seconds


def contract_on_device(bench: Bench) -> None:
    """Every backend that says it can, on every small case; the stage's name says in which mode. Red, a hang or a crash
    ends the stage as failed.
    """
    compiled, short = MODES[bench.lines.stage]
    seen: collections.Counter[str] = collections.Counter()
    items: list[workers.Item] = []
    facts: dict[str, dict[str, Any]] = {}
    hung = {name for name, status in red_backends(bench, earlier=False).items() if status == "hung"}
    for op, backend, case in contract_cases(ops_of(bench)):
        if bench.tiny:
            short = "fp32"  # the interpreter's bf16 is not to be trusted
            if case is not op.cases.CASES[0] or (compiled and (op.name, backend) != ("gelu", "reference")):
                continue
        elif compiled and case not in [c for c in op.cases.CASES if 0 not in c.shape.values()][:COMPILED_CASES]:
            continue
        task = {"op": op.name, "backend": backend, "case": case.name, "dtype": short, "compiled": compiled}
        name = f"{op.name}.{backend} {case} {short}{' compiled' if compiled else ''}"
        facts[name] = {**task, **_known_by(bench, op.name, backend)}
        found = None if bench.run.again else bench.run.earlier.line(name, {**facts[name], "value": "passed"})
        if found is not None:
            kept = {k: v for k, v in found.line.items() if k not in ("stage", "name", "value", "unit", "recorded")}
            bench.lines.write(name, "passed", "contract", **kept, recorded=str(found.path))
            seen["recorded"] += 1
        elif (op.name, backend) in hung:  # it would cost its patience again
            why = f"{op.name}.{backend} hung in an earlier stage"
            bench.lines.write(name, "not run", "contract", **facts[name], reason=why)
            seen["not run"] += 1
        else:
            items.append(workers.Item(name, f"{op.name}.{backend}", task, SLOW_S if compiled or bench.tiny else 0.0))
    count = 2 if bench.tiny else max(1, min(6, (os.cpu_count() or 1) // 2))
    late = False
    for done in through_children(bench, items, count):
        answer = {"reason": done.detail} if done.status != "done" else dict(done.answer)
        # an error is the harness's own, outside of contract.check: then nothing is shown either
        status = answer.pop("status", "failed" if done.status == "error" else done.status)
        seen[status] += 1
        late = late or done.detail.startswith(workers.NO_TIME)
        bench.lines.write(done.item.name, status, "contract", **facts[done.item.name], **answer)
    for status in ("recorded", "passed", "refused", "failed", "hung", "crashed", "not run"):
        bench.lines.write(status, seen[status], "checks")
    red = {status: seen[status] for status in ("failed", "hung", "crashed") if seen[status]}
    if late and not red and not seen["passed"] + seen["recorded"]:
        print(f"the contract: no time left, {seen['not run']} not run and none of them red", file=sys.stderr)
        raise SystemExit(stages.OUT_OF_TIME)
    if red or not seen["passed"] + seen["recorded"]:
        said = ", ".join(f"{count} {status}" for status, count in red.items())
        said = said or f"none passed, {seen['not run']} not run, {seen['refused']} refused"
        raise SystemExit(f"the contract: {said}; {seen['passed'] + seen['recorded']} passed")


def _known_by(bench: Bench, op: str, backend: str) -> dict[str, str]:
    """What a record of this backend must share with this run to count."""
    return {"digest": source_of(op, backend), "oracle": oracle_digest(op), **bench.run.facts}


def check_case(bench: Bench, task: Mapping[str, Any]) -> dict[str, Any]:
    """In a child: one backend on one case, forward only where it refuses to train."""
    op = OPS[task["op"]]
    (case,) = (case for case in op.cases.CASES if case.name == task["case"])
    dtype = kernels.DTYPES[task["dtype"]]
    compiled = "aot_eager" if task["compiled"] and bench.tiny else task["compiled"]  # Inductor takes half a minute
    try:
        backend = op.load(task["backend"])
    except KernelError as error:  # its module cannot be imported here
        return {"status": "refused", "reason": str(error)[:300]}
    report = contract.check(op, backend, case, dtype, bench.device, compiled=compiled)
    if report.refused and not op.updates:
        report = contract.check(op, backend, case, dtype, bench.device, compiled=compiled, phase="eval")
    more = {} if report.worst is None else {"of_bound": f"{report.worst.ratio:.3g}"}
    return {"status": report.status, "reason": report.reason[:300], "phase": report.phase, **more}


# --------------------------------------------------------------------------------------------------------------- speed


def speed(bench: Bench) -> None:
    """Every op at the shapes that matter, in bf16, backend beside backend; one that the contract is not green for gets
    no figure.
    """
    items: list[workers.Item] = []
    facts: dict[str, dict[str, Any]] = {}
    shown = stages.read_lines(bench.lines.out / "contract.jsonl")
    ops = [OPS["layer_norm"]] if bench.tiny else ops_of(bench)
    short = "fp32" if bench.tiny else "bf16"
    large = {op: sorted((c for c in op.cases.CASES if c.large), key=partial(_without_goal, op)) for op in ops}
    if bench.tiny:
        large = {op: [case for case in op.cases.CASES if case.name == "odd"] for op in ops}
    for i in range(max(map(len, large.values()), default=0)):
        for op, cases in large.items():
            if i >= len(cases):
                continue
            name = f"{op.name} {cases[i]}"
            digests = {backend: source_of(op.name, backend) for backend in op.backends()}
            facts[name] = {"op": op.name, "case": cases[i].name, "digests": digests, **bench.run.facts}
            found = None if bench.run.again else bench.run.earlier.line(name, {**facts[name], "value": "timed"})
            if found is not None:
                _take_over(bench, found.path, op.name, cases[i].name)
                continue
            task = {
                "op": op.name, "case": cases[i].name, "dtype": short,
                "reports": _shown(op, short, shown, bench.tiny),
            }  # fmt: skip
            items.append(workers.Item(name, op.name, task, SLOW_S))
    red: list[str] = []
    for done in through_children(bench, items, 1):  # alone: others on the device would be in the figures
        for row in done.answer.get("rows", ()):
            more = {key: value for key, value in row.items() if key not in ("samples_ms", "gb_per_s")}
            digest = facts[done.item.name]["digests"].get(row["backend"], "unknown")
            name = f"{row['op']}.{row['backend']} {row['case']} {row['what']}"
            bench.lines.write(name, row["gb_per_s"], "GB/s", **more, digest=digest, **bench.run.facts)
        for refused in done.answer.get("refused", ()):
            bench.lines.write(f"{refused['op']}.{refused['backend']}", refused["why"][:300], "refused")
        red += [text for text in done.answer.get("red", ()) if text not in red]
        bad = done.status in ("hung", "crashed", "error")
        red += [f"{done.item.name}: {done.status}: {done.detail}"] if bad else []
        status = "timed" if done.status == "done" and not done.answer["red"] else done.status
        bench.lines.write(done.item.name, status, "item", **facts[done.item.name], reason=done.detail)
    if red:
        raise SystemExit("red, hence not timed: " + "; ".join(red))


def _without_goal(op: Op, case: Case) -> bool:
    """Sorts the cases that have goals before the others."""
    return not any(peaks.goal_of(op, case, what) for what in ("forward", "backward", "forward+backward", "update"))


def _take_over(bench: Bench, path: pathlib.Path, op: str, case: str) -> None:
    """The figures of one op's case from an earlier run, marked with where they come from."""
    for line in bench.run.earlier.files[path]:
        if (line.get("op"), line.get("case")) == (op, case):
            kept = {k: v for k, v in line.items() if k not in ("stage", "name", "value", "unit", "recorded")}
            bench.lines.write(line["name"], line["value"], line["unit"], **kept, recorded=str(path))


def _shown(op: Op, short: str, lines: Sequence[Mapping[str, Any]], tiny: bool) -> list[list[str]]:
    """(backend, case, status) of the contract's lines, for every backend that has been held to all small cases or has
    failed one: who is not here, the child holds to the contract before it times him."""
    mine = [
        line for line in lines
        if line["unit"] == "contract" and (line.get("op"), line.get("dtype"), line.get("compiled"))
        == (op.name, short, False)
    ]  # fmt: skip
    small = {case.name for case in op.cases.CASES if not case.large}
    if tiny:
        small = {op.cases.CASES[0].name}
    found = []
    for backend in op.backends():
        rows = [(backend, line["case"], line["value"]) for line in mine if line["backend"] == backend]
        red = any(status in ("failed", "hung", "crashed") for _, _, status in rows)
        if red or {case for _, case, status in rows if status != "not run"} >= small:
            found += [list(row) for row in rows]
    return found


def time_case(bench: Bench, task: Mapping[str, Any], gates: dict[str, kernels.Gate]) -> dict[str, Any]:
    """In a child: all backends of one op on one case, interleaved. gates: of the ops that this child has met."""
    op, dtype = OPS[task["op"]], kernels.DTYPES[task["dtype"]]
    if op.name not in gates:
        gates[op.name] = kernels.Gate(bench.device)
        gates[op.name].trust([
            contract.Report(op.name, backend, case, dtype, bench.device, "train", False, status == "passed",
                            status == "refused", status)
            for backend, case, status in task["reports"]
        ])  # fmt: skip
    gate, refused = gates[op.name], list[dict[str, str]]()
    request = kernels.Request([op], bench.device, (dtype,), pattern=task["case"])
    if bench.tiny:
        request = kernels.Request([op], bench.device, (dtype,), pattern=task["case"], rounds=2, inner=1)
    rows = [asdict(row) for row in kernels.bench_ops(request, gate, bench.cold, refused)]
    return {"rows": rows, "refused": refused, "red": gate.red}


# ------------------------------------------------------------------------------------------------------ in the children


def serve(stage: str, bench: Bench) -> None:
    """Do the items of a stage until stdin closes."""
    from tritium.benchmarks import tiles

    gates: dict[str, kernels.Gate] = {}
    tasks: dict[str, Callable[[Bench, Mapping[str, Any]], dict[str, Any]]] = {
        **dict.fromkeys(MODES, check_case),
        "kernels": lambda bench, task: time_case(bench, task, gates),
        "tiles": tiles.try_one,
    }

    def alive() -> None:
        if bench.device == "cuda":  # an illegal access shows here, or at the next use of the device
            torch.cuda.synchronize()
            torch.zeros(1, device="cuda").add_(1).item()

    try:  # before the first item, whose time it is not
        from triton import knobs
    except ImportError:
        knobs = None
    alive()

    def do(task: dict[str, Any], beat: workers.Beat) -> dict[str, Any]:
        if knobs is not None:
            _beat_while_compiling(knobs.runtime, beat)
        return tasks[stage](bench, task)

    workers.serve(do, alive)


def _beat_while_compiling(runtime: Any, beat: workers.Beat) -> None:
    """Let Triton say when it begins to compile a kernel and when it is done with it."""

    def begins(**about: Any) -> None:
        beat(COMPILE_S)

    def is_done(**about: Any) -> None:
        beat(0.0)

    runtime.jit_cache_hook, runtime.jit_post_compile_hook = begins, is_done


# ------------------------------------------------------------------------------------------------------------- training

RED = ("failed", "hung", "crashed")


def red_backends(bench: Bench, earlier: bool = True) -> dict[tuple[str, str], str]:
    """(op, backend) → how it broke the contract, in this run or (``earlier``) in one before with the same source."""
    found: dict[tuple[str, str], str] = {}
    for lines in bench.run.earlier.files.values() if earlier else ():
        for line in lines:
            if line["unit"] == "contract" and line["value"] in RED and {"op", "backend", "digest"} <= line.keys():
                op, backend = line["op"], line["backend"]
                same = op in OPS and _known_by(bench, op, backend).items() <= line.items()
                if (
                    same
                    and bench.run.earlier.line(line["name"], {**_known_by(bench, op, backend), "value": "passed"})
                    is None
                ):
                    found[op, backend] = line["value"]
    for stage in MODES:
        for line in stages.read_lines(bench.lines.out / f"{stage}.jsonl"):
            if line["unit"] == "contract" and line["value"] in RED:
                found[line["op"], line["backend"]] = line["value"]
    return found


def sound(bench: Bench, config: Config) -> Config:
    """``config`` less the backends that broke the contract: one that hung there would cost this stage all of its time,
    and what is wrong needs no speed. In their place is what auto chooses, or the reference; a line says so."""
    from tritium.benchmarks import ablate

    red = red_backends(bench)
    for _ in range(2 * len(red)):  # what auto chooses may be red too
        try:
            rows = ablate.planned(config, bench.device)
        except KernelError:  # who builds it will say why
            return config
        bound = {(row.op, row.backend) for row in rows if row.phase == "train"}
        for op, backend in sorted(bound & red.keys() - {(op, "reference") for op in OPS}):
            instead = "reference" if getattr(config.kernels, op) == "auto" else "auto"
            config = config.replace(kernels={op: instead})
            said = f"{red[op, backend]} in the contract: {op}={instead} in its place"
            bench.lines.write(f"{op}.{backend}", said, "left out", op=op, backend=backend)
    return config


def training_by_kernels(bench: Bench) -> None:
    """GPT-2 124M with each kernel choice and in plain PyTorch, on equal losses, interleaved; a choice that cannot be
    met says why.
    """
    config, B, T = shape_of(bench, "gpt2_124m")
    if bench.tiny:
        config = config.replace(train={"compile": "false"})
    resolved = resolve("auto", torch.device(bench.device))  # as ours
    precision = "bf16" if resolved == torch.bfloat16 else "fp32"
    batches = peers.batches(config.model, B, T, 4, bench.device)
    weights = peers.initial_weights(config.model)
    arms: dict[str, timing.Arm] = {}
    losses: dict[str, tuple[list[float], str]] = {}

    def add(name: str, training: ours.Training | peers.Training) -> None:
        training.load(weights)
        losses[name] = ([training.step(*batches[i]).item() for i in range(LOSS_STEPS)], precision)
        arms[name] = iter_arm([partial(training.step, *batch) for batch in batches], bench.warm)

    variant = peers.Variant(precision, "high", compile="false" if bench.tiny else "default")
    with bench.lines.attempt("plain PyTorch"):
        add("plain PyTorch", textbook.build(config.model, variant, bench.device, config.optim))
    for choice in CHOICES:
        with bench.lines.attempt(f"tritium --kernels={choice}"):
            chosen = sound(bench, config.replace(kernels={"default": choice}))
            training = ours.build(chosen, bench.device, B)
            bench.lines.write(f"tritium --kernels={choice}", _chosen(training), "kernels")
            add(f"tritium --kernels={choice}", training)
    _equal(bench, losses)
    for arm in arms.values():
        timing.warm_up(arm, limit_runs=2 if bench.tiny else 20, limit_s=40.0)
    samples = timing.interleave(arms, 2 if bench.tiny else 12)
    first = next(iter(samples))
    for name, taken in samples.items():
        ratio = timing.speedup(taken, samples[first])
        low_high = {"over_first": round(ratio.median, 4), "low": round(ratio.low, 4), "high": round(ratio.high, 4)}
        write_speed(
            bench,
            f"gpt2_124m, {name}",
            taken.median_ms,
            config.model,
            B,
            T,
            first=first,
            **low_high,
            times=taken.to_json(),
        )
    gc.collect()


def training_of_size(bench: Bench) -> None:
    """A larger GPT-2, the stage's name less ``training_``, with the kernel choices that fit, one after the other."""
    preset = preset_of(bench)
    config, B, T = shape_of(bench, preset)
    if bench.tiny:
        config = config.replace(train={"compile": "false"})
    batches = peers.batches(config.model, B, T, 4, bench.device)
    weights = peers.initial_weights(config.model)
    losses: dict[str, tuple[list[float], str]] = {}
    for choice in ("auto", "triton"):
        name = f"{preset}, tritium --kernels={choice}"

        def build(choice: str, name: str) -> ours.Training:
            training = ours.build(sound(bench, config.replace(kernels={"default": choice})), bench.device, B)
            training.load(weights)
            precision = "bf16" if training.engine.dtype == torch.bfloat16 else "fp32"
            losses[name] = ([training.step(*batches[i]).item() for i in range(LOSS_STEPS)], precision)
            return training

        tokens_per_second(bench, name, partial(build, choice, name), config, B, T)
        bench.free()
    _equal(bench, losses)


def preset_of(bench: Bench) -> str:
    """gpt2_SIZE of a stage KIND_SIZE, gpt2_124m of a stage without a size."""
    size = bench.lines.stage.partition("_")[2]
    return f"gpt2_{size or '124m'}"


def _equal(bench: Bench, losses: Mapping[str, tuple[list[float], str]]) -> None:
    """Write whether the losses agree; what does not is the end of the stage."""
    if not losses:
        raise SystemExit("nothing could be trained; the lines above say why")
    equal = equal_losses(losses)
    bench.lines.write(
        "equal losses", str(equal["ok"]), "verdict", worst_relative=equal["worst_relative"], problems=equal["problems"]
    )
    if not equal["ok"]:
        raise SystemExit("speeds are not compared: " + "; ".join(equal["problems"]))


def _chosen(training: ours.Training) -> str:
    """op=backend of every call site in training, e.g. "attention=triton, layer_norm=native"."""
    rows = [row for row in training.engine.table if row.phase == "train"]
    return ", ".join(dict.fromkeys(f"{row.op}={row.backend}" for row in rows))


# ------------------------------------------------------------------------------------ the benchmarks of `tritium bench`


def _as_measured(bench: Bench, preset: str) -> tuple[Config, int, int]:
    """(config, B, T): with Triton's kernels on a GPU, where ``auto`` has no measurement yet to go by."""
    config, B, T = shape_of(bench, preset)
    if bench.tiny:
        return config.replace(train={"compile": "false"}), B, T
    return sound(bench, config.replace(kernels={"default": "triton"})), B, T


def _kernels(bench: Bench, preset: str) -> str:
    """The same for a benchmark that is told one choice for all ops."""
    config, _, _ = shape_of(bench, preset)
    for choice in ("triton", "auto"):
        chosen = config.replace(kernels={"default": choice})
        if sound(bench, chosen) == chosen:
            return choice
    return "reference"


def _figures(bench: Bench, result: Mapping[str, Any], path: pathlib.Path) -> None:
    """A record's figures and checks as lines; a check that does not hold ends the stage, unless it is rehearsed."""
    for figure in result["figures"]:
        bench.lines.write(
            f"{result['preset']}, {figure['name']}", figure["value"], figure["unit"], better=figure["better"],
            record=path.name,
        )  # fmt: skip
    red = [check for check in result["checks"] if not check["ok"]]
    for check in red:
        bench.lines.write(f"check: {check['name']}", check["detail"][:300] or "no detail", "red")
    if red and not bench.tiny:
        raise SystemExit("; ".join(f"{check['name']}: {check['detail']}" for check in red)[:1000])


def anatomy(bench: Bench) -> None:
    """Where the time of a step goes, and the step over its own products and attention, as `tritium bench train
    --anatomy` has it. Not through its main(), which reads flags by tyro and draws by matplotlib: a bare machine has
    neither.
    """
    from tritium.benchmarks import anatomy as anatomies
    from tritium.benchmarks import training

    preset = preset_of(bench)
    config, B, T = _as_measured(bench, preset)
    result = training.bench(
        config, T, B, rounds=2 if bench.tiny else 8, device=bench.device, explain=True,
        command=f"tritium bench train {preset} --anatomy --T {T} --B {B} --kernels {config.kernels.default}",
        say=lambda text: bench.lines.write("under way", text, "text"),
    )  # fmt: skip
    path = bench.lines.out / f"train_{preset}_T{T}_B{B}.json"
    record.write(result, training.SCHEMA, path)
    (bench.lines.out / f"{bench.lines.stage}.txt").write_text(
        f"{training.summary(result)}\n\n{anatomies.text(result['anatomy'])}\n"
    )
    _figures(bench, result, path)


def ablation(bench: Bench) -> None:
    """Each op in turn set to its reference (`tritium ablate --mode leave-one-out`); not through its main() for the
    reasons that ``anatomy`` has. The contract has been its gate."""
    from tritium.benchmarks import ablate, ablate_results

    preset = "gpt2_124m"
    config, B, T = _as_measured(bench, preset)
    if bench.tiny:
        only = {"default": "reference", "gelu": "triton"}  # the interpreter takes minutes for all of them
        config, B, T = sound(bench, config.replace(kernels=only, model={"block_size": 16})), 1, 16
    names = list(bench.run.ops) or (["gelu"] if bench.tiny else list(LEFT_OUT))
    bound = {row.op: row.backend for row in ablate.planned(config, bench.device) if row.phase == "train"}
    for name in [name for name in names if bound.get(name, "reference") == "reference"]:
        why = f"{preset} does not call it" if name not in bound else "its reference computes it here"
        bench.lines.write(f"{name}=reference", f"{why}: nothing can be left out", "left out")
        names.remove(name)
    if not names:
        return
    config = config.replace(train={"batch_rows": B, "micro_rows": B})
    request = ablate.Request(
        config, ablate.left_out(config, names, bench.device), [], "leave-one-out", T, B, bench.device,
        rounds=2 if bench.tiny else 6, gate=False, say=lambda text: bench.lines.write("under way", text, "text"),
        command=f"tritium ablate {preset} {' '.join(names)} --mode leave-one-out --T {T} --B {B} --no-gate "
        f"--kernels {config.kernels.default}",
    )  # fmt: skip
    result = ablate.ablate(request)
    path = bench.lines.out / f"ablate_{preset}_T{T}_B{B}.json"
    record.write(result, ablate.SCHEMA, path)
    (bench.lines.out / f"{bench.lines.stage}.txt").write_text(ablate_results.text(result) + "\n")
    _figures(bench, result, path)


def against_peers(bench: Bench) -> None:
    """tritium beside the same model in plain PyTorch and Hugging Face's (`tritium bench peers`)."""
    from tritium.benchmarks import throughput

    # one process of each: there is no time for more, and the record says what its intervals cover
    argv = ["gpt2_124m", "--screening-steps", "0", "--restarts", "1", "--rounds", "6", "--device", bench.device]
    argv += ["--kernels", _kernels(bench, "gpt2_124m")]
    if bench.tiny:
        argv = ["tiny", "--T", "16", "--B", "1", "--restarts", "1", "--rounds", "2", "--screening-steps", "0",
                "--peers", "textbook", "--device", bench.device, "--precision", "fp32"]  # fmt: skip
    _through_main(bench, throughput.main, argv, "throughput_*.json")


def ladder(bench: Bench) -> None:
    """The four GPT-2 sizes, rung by rung (`tritium bench ladder`)."""
    from tritium.benchmarks import ladder

    argv = ["--rounds", "6", "--device", bench.device, "--kernels", _kernels(bench, "gpt2_124m")]
    if bench.tiny:
        argv = ["--presets", "tiny", "--T", "16", "--B", "1", "--rounds", "2", "--device", bench.device]
    _through_main(bench, ladder.main, argv, "ladder*.json")


def _through_main(bench: Bench, main: Callable[[list[str]], int], argv: list[str], pattern: str) -> None:
    """Run a benchmark by its command line, into a folder of its own; its record's figures become lines."""
    with tempfile.TemporaryDirectory(prefix="tritium-gpu-") as folder:
        # its arms are processes that import tritium by name, which need not be installed here
        (pathlib.Path(folder) / "names" / "tritium").mkdir(parents=True)
        for part in ("engine", "kernels", "benchmarks"):
            (pathlib.Path(folder) / "names" / "tritium" / part).symlink_to(record.ROOT / part)
        path = os.pathsep.join([str(pathlib.Path(folder) / "names"), *filter(None, [os.environ.get("PYTHONPATH")])])
        before, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH"), path
        start = time.time()
        try:
            status = main([*argv, "--out", str(bench.lines.out)])
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before
    written = [p for p in bench.lines.out.glob(pattern) if p.stat().st_mtime >= start - 1.0]
    for file in written:
        _figures(bench, record.read(file), file)
    if status != 0 or not written:
        raise SystemExit(f"exit status {status}, {len(written)} records; what it said is in its stderr")
