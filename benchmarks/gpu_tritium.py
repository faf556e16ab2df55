"""Stages of ``make gpu`` that run tritium's own code: the contract on the device, then training steps by kernel
choice.
"""

from __future__ import annotations

import collections
import gc
from collections.abc import Iterator
from functools import partial

import torch

from tritium.benchmarks import ours, peers, timing
from tritium.benchmarks.gpu_baseline import Bench, iter_arm, shape_of, write_speed
from tritium.benchmarks.peers import textbook
from tritium.benchmarks.throughput import LOSS_STEPS, equal_losses
from tritium.engine.precision import resolve
from tritium.kernels import contract
from tritium.kernels.case import Case
from tritium.kernels.op import KernelError, Op
from tritium.kernels.ops import OPS

CHOICES = ("auto", "triton", "reference")


def contract_cases(large: bool = False) -> Iterator[tuple[Op, str, Case]]:
    """Every (op, backend, case): the first case of every backend, then the second of every one, ..., so that a stage
    which runs out of time has looked at all of them."""
    wanted = {op: [case for case in op.cases.CASES if case.large == large] for op in OPS.values()}
    for i in range(max(map(len, wanted.values()))):
        for op, cases in wanted.items():
            for backend in op.backends() if i < len(cases) else ():
                yield op, backend, cases[i]


def contract_on_device(bench: Bench) -> None:
    """Every backend that says it can, on every small case, eager and then compiled, in fp32 and bf16; red ends the
    stage as failed.
    """
    seen: collections.Counter[str] = collections.Counter()
    broken: set[tuple[str, str]] = set()
    modes = (
        [(False, torch.float32)]
        if bench.tiny
        else [(False, torch.bfloat16), (False, torch.float32), (True, torch.bfloat16)]
    )
    for compiled, dtype in modes:
        for op, backend, case in contract_cases():
            if (op.name, backend) in broken or (bench.tiny and case is not op.cases.CASES[0]):
                continue
            short = f"{op.name}.{backend} {case} {str(dtype).removeprefix('torch.')}{' compiled' if compiled else ''}"
            try:
                report = contract.check(op, backend, case, dtype, bench.device, compiled=compiled)
                if report.refused and not op.updates:
                    report = contract.check(op, backend, case, dtype, bench.device, compiled=compiled, phase="eval")
            except KernelError as error:  # its module cannot be imported here
                bench.lines.write(f"{op.name}.{backend}", str(error)[:300], "refused")
                seen["refused"] += 1
                broken.add((op.name, backend))
                continue
            seen[report.status] += 1
            more = {} if report.worst is None else {"of_bound": float(f"{report.worst.ratio:.3g}")}
            bench.lines.write(short, report.status, "contract", reason=report.reason[:300], phase=report.phase, **more)
    for status in ("passed", "refused", "failed"):
        bench.lines.write(status, seen[status], "checks")
    if seen["failed"] or not seen["passed"]:
        raise SystemExit(f"{seen['failed']} checks of the contract failed, {seen['passed']} passed")


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
            chosen = config.replace(kernels={"default": choice})
            training = ours.build(chosen, bench.device, B)
            bench.lines.write(f"tritium --kernels={choice}", _chosen(training), "kernels")
            add(f"tritium --kernels={choice}", training)
    if not losses:
        raise SystemExit("nothing could be trained; the lines above say why")
    equal = equal_losses(losses)
    bench.lines.write(
        "equal losses", str(equal["ok"]), "verdict", worst_relative=equal["worst_relative"], problems=equal["problems"]
    )
    if not equal["ok"]:
        raise SystemExit("speeds are not compared: " + "; ".join(equal["problems"]))
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


def _chosen(training: ours.Training) -> str:
    """op=backend of every call site in training, e.g. "attention=triton, layer_norm=native"."""
    rows = [row for row in training.engine.table if row.phase == "train"]
    return ", ".join(dict.fromkeys(f"{row.op}={row.backend}" for row in rows))
