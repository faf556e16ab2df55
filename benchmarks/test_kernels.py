"""The ops under pytest-benchmark: ``pytest benchmarks/ [-k layer_norm] --benchmark-json FILE``. A backend that is red
fails, untimed.

By default each op is timed on one case, the smallest of its large ones; on a CPU, where that is too much, the largest
of the others. ``-m "full or not full"`` takes all large cases that the device can bear, and the forward alone as
well. The JSON's ``extra_info`` has TB/s and TFLOP/s at the median.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tritium.benchmarks.kernels import CPU_GFLOP, Gate, call_of, kinds, work
from tritium.kernels import contract
from tritium.kernels.case import Case
from tritium.kernels.op import KernelError, Op
from tritium.kernels.ops import OPS
from tritium.kernels.site import Machine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
CPU_BYTES = 256 << 20  # of a case's operands: by default, larger ones are left to a GPU
GATE = Gate(DEVICE)


def cases(op: Op) -> tuple[list[Case], Case]:
    """The cases of a full run, and the one of a default run."""
    bearable = [c for c in op.cases.CASES if DEVICE == "cuda" or op.cases.flops(c) <= CPU_GFLOP * 1e9]
    large = [case for case in bearable if case.large]
    light = [case for case in large if DEVICE == "cuda" or op.cases.bytes(case, DTYPE) <= CPU_BYTES]
    if light:
        return large, min(light, key=lambda case: op.cases.bytes(case, DTYPE))
    one = max((case for case in bearable if not case.large), key=op.cases.flops)
    return [*large, one], one


def runnable() -> Iterator[Any]:
    """(op, backend, case, what) of everything that says it can run here."""
    machine = Machine.here(DEVICE)
    for op in OPS.values():
        every, one = cases(op)
        for case in every:
            for name in op.backends():
                try:
                    reason = op.load(name).unsupported(contract.site_of(op, case, DTYPE, machine))
                except KernelError as error:
                    reason = str(error)
                if reason is not None:
                    continue
                for what in kinds(op):
                    marks = [] if case is one and what == kinds(op)[-1] else [pytest.mark.full]
                    yield pytest.param(op, name, case, what, id=f"{op.name}-{name}-{case}-{what}", marks=marks)


@pytest.mark.parametrize(("op", "name", "case", "what"), list(runnable()))
def test_speed(benchmark: Any, op: Op, name: str, case: Case, what: str) -> None:
    backend = op.load(name)
    assert GATE.admits(op, backend, DTYPE), "\n".join(GATE.red)
    benchmark.group = f"{op.name} {case} {what}"
    call = call_of(backend, op.cases.inputs(case, DTYPE, DEVICE, 0), backward=what == "forward+backward")
    synchronize = torch.cuda.synchronize if DEVICE == "cuda" else (lambda: None)
    benchmark.pedantic(lambda: (call(), synchronize()), rounds=5, warmup_rounds=2)
    if benchmark.stats is not None:  # None with --benchmark-disable
        flops, moved = work(op, case, DTYPE, what)
        seconds = benchmark.stats.stats.median
        benchmark.extra_info |= {
            "op": op.name, "backend": name, "case": case.name, "what": what, "dtype": str(DTYPE).removeprefix("torch."),
            "device": DEVICE, "flops": flops, "bytes": moved,
            "tb_per_s": moved / seconds / 1e12, "tflop_per_s": flops / seconds / 1e12,
        }  # fmt: skip
