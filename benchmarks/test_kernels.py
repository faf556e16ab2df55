"""The ops under pytest-benchmark: ``pytest benchmarks/test_kernels.py [-k layer_norm]``. A backend that is red fails,
untimed.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tritium.benchmarks.kernels import CPU_GFLOP, Gate, call_of, kinds
from tritium.kernels import contract
from tritium.kernels.case import Case
from tritium.kernels.op import KernelError, Op
from tritium.kernels.ops import OPS
from tritium.kernels.site import Machine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
GATE = Gate(DEVICE)


def runnable() -> Iterator[Any]:
    """(op, backend, case, what) of everything that says it can run here, at the shapes that matter."""
    machine = Machine.here(DEVICE)
    for op in OPS.values():
        for case in op.cases.CASES:
            if not case.large or (DEVICE == "cpu" and op.cases.flops(case) > CPU_GFLOP * 1e9):
                continue
            for name in op.backends():
                try:
                    reason = op.load(name).unsupported(contract.site_of(op, case, DTYPE, machine))
                except KernelError as error:
                    reason = str(error)
                if reason is None:
                    for what in kinds(op):
                        yield pytest.param(op, name, case, what, id=f"{op.name}-{name}-{case}-{what}")


@pytest.mark.parametrize(("op", "name", "case", "what"), list(runnable()))
def test_speed(benchmark: Any, op: Op, name: str, case: Case, what: str) -> None:
    backend = op.load(name)
    assert GATE.admits(op, backend, DTYPE), "\n".join(GATE.red)
    benchmark.group = f"{op.name} {case} {what}"
    call = call_of(backend, op.cases.inputs(case, DTYPE, DEVICE, 0), backward=what == "forward+backward")
    synchronize = torch.cuda.synchronize if DEVICE == "cuda" else (lambda: None)
    benchmark.pedantic(lambda: (call(), synchronize()), rounds=5, warmup_rounds=2)
