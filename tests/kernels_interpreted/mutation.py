"""Planted faults in the Triton kernels' sources: each must turn the contract red, by its numbers.

Files test_mutants_*.py have a list of :class:`Mutant` and two tests of two lines each.
"""

import importlib.util
import pathlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tritium.kernels import contract, ops
from tritium.kernels.case import Case
from tritium.kernels.op import Backend


@dataclass(frozen=True)
class Mutant:
    """A fault: ``before`` becomes ``after`` in the op's impl_triton.py, or in ``shared``, a module that it imports from
    (dotted), and ``case`` is the one that must see it."""

    op: str
    name: str
    before: str
    after: str
    case: str
    dtype: torch.dtype = torch.float32
    shared: str = ""

    def __str__(self) -> str:
        return f"{self.op}: {self.name}"


def _planted(name: str, source: str, folder: pathlib.Path):
    path = folder / f"{name}.py"  # a file, since Triton reads a kernel's source from it
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mutated(mutant: Mutant, folder: pathlib.Path) -> Backend:
    """The op's Triton backend with the fault in its source, under a module and op name of its own."""
    op = ops.OPS[mutant.op]
    source = pathlib.Path(op.load("triton").module.__file__).read_text()
    name = "mutant_" + "".join(c if c.isalnum() else "_" for c in str(mutant))

    def fault(text: str) -> str:
        assert mutant.before in text, f"{mutant}: the source has changed and no longer holds {mutant.before!r}"
        return text.replace(mutant.before, mutant.after)

    if mutant.shared:
        package, _, last = mutant.shared.rpartition(".")
        assert f"from {package} import {last}\n" in source or f"from {package} import {last} as" in source, (
            f"{mutant}: {mutant.op} must import the shared module whole, 'from {package} import {last}'"
        )
        text = pathlib.Path(importlib.import_module(mutant.shared).__file__).read_text()
        _planted(f"{name}_shared", fault(text).replace('_triton"', f'_{name}"'), folder)
        source = source.replace(f"from {package} import {last}", f"import {name}_shared as {last}", 1).replace(
            f"import {name}_shared as {last} as ", f"import {name}_shared as "
        )
    else:
        source = fault(source)
    registered = f'"{mutant.op}_triton"'
    assert registered in source
    module = _planted(name, source.replace(registered, f'"{name}"'), folder)
    return Backend(mutant.op, name, getattr(module, mutant.op), module)


def case_of(mutant: Mutant, extra: Mapping[str, Case] = {}) -> Case:
    if mutant.case in extra:
        return extra[mutant.case]
    (case,) = (c for c in ops.OPS[mutant.op].cases.CASES if c.name == mutant.case)
    return case


def assert_red(mutant: Mutant, folder: pathlib.Path, extra: Mapping[str, Case] = {}) -> None:
    """The contract must fail on the mutant's case by its numbers, and pass there without the fault."""
    case, op = case_of(mutant, extra), ops.OPS[mutant.op]
    report = contract.check(op, mutated(mutant, folder), case, mutant.dtype, variants=("plain",))
    assert report.status == "failed", report
    assert "raised" not in report.reason, f"a fault must be seen by its numbers, not by a crash: {report}"


def assert_green(mutant: Mutant, extra: Mapping[str, Case] = {}) -> None:
    report = contract.check(ops.OPS[mutant.op], "triton", case_of(mutant, extra), mutant.dtype, variants=("plain",))
    assert report.ok, report
