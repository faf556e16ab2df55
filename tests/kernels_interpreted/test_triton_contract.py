"""The contract over every Triton backend: every case, options in pairs, every layout, under compile, and opcheck."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import products
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tritium.engine import syncs
from tritium.kernels import contract, ops, options
from tritium.kernels.case import Case
from tritium.kernels.lib import triton_lists
from tritium.kernels.site import Machine

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP32, BF16, FP16)
ATTENTION = ("attention", "attention_lse")  # a head takes the interpreter 0.1 to 0.5 s, all else some 10 ms


def small(name: str) -> list[Case]:
    return [c for c in ops.OPS[name].cases.CASES if not c.large]


# ----------------------------------------------------------------------------------------------------- every op serves


def test_every_op_has_a_triton_backend():
    assert [name for name, op in ops.OPS.items() if "triton" not in op.backends()] == []


@pytest.mark.parametrize("name", ops.OPS)
def test_no_case_of_any_op_is_refused(name):
    op = ops.OPS[name]
    backend = op.load("triton")
    packages = {"triton": "3.6.0"}
    machines = [Machine("cuda", arch, packages=packages) for arch in ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120")]
    machines.append(Machine("cpu", "x86_64", interpreted=True, packages=packages))
    for case, dtype, machine in itertools.product(op.cases.CASES, DTYPES, machines):
        for phase in ("train",) if op.updates else ("train", "eval", "prefill", "decode"):
            assert backend.unsupported(contract.site_of(op, case, dtype, machine, phase=phase)) is None, (case, dtype)


# ------------------------------------------------------------------------------------------------------------ contract


def runs() -> Iterator[tuple[str, Case, torch.dtype]]:
    """Every case in fp32 and, in turn, in one of the 16-bit types; attention, which takes longest, every third."""
    for name in ops.OPS:
        for number, case in enumerate(small(name)):
            yield name, case, FP32
            if name not in ATTENTION or number % 3 == 0:
                yield name, case, (BF16, FP16)[number % 2]


@pytest.mark.parametrize(("name", "case", "dtype"), list(runs()), ids=str)
def test_every_case_keeps_the_contract(name, case, dtype):
    """Layouts, expanded and partial gradients too, except where the time they take would be for the same code again."""
    thorough = dtype == FP32 and (name not in ATTENTION or case.name in ("cross", "documents_grouped"))
    report = contract.check(
        ops.OPS[name], "triton", case, dtype, variants=contract.VARIANTS if thorough else ("plain",)
    )
    assert report.ok, report


ATTENTION_OPTIONS = products.PRODUCTS["attention"]


def pairwise(values: Mapping[str, Sequence[object]]) -> list[dict[str, object]]:
    """Few choices that together contain every pair of values of any two options; greedy, and the same every time."""
    names = list(values)
    wanted = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in values[a] for y in values[b]}
    every = [dict(zip(names, choice, strict=True)) for choice in itertools.product(*values.values())]
    chosen = []
    while wanted:
        best = max(every, key=lambda choice: len(wanted & set(itertools.combinations(choice.items(), 2))))
        chosen.append(best)
        wanted -= set(itertools.combinations(best.items(), 2))
    return chosen


@pytest.mark.parametrize(
    ("case", "dtype"),
    [products.case_of("attention", o) for o in pairwise({**ATTENTION_OPTIONS, "dtype": DTYPES})],
    ids=str,
)
def test_attention_options_in_pairs(case, dtype):
    report = contract.check(ops.attention, "triton", case, dtype, variants=("plain",))
    assert report.ok, report


def test_pairs_are_all_there():
    chosen = pairwise({"a": (1, 2, 3), "b": (1, 2), "c": (1, 2)})
    assert len(chosen) < 12
    for x, y in itertools.product((1, 2, 3), (1, 2)):
        assert any(c["a"] == x and c["b"] == y for c in chosen)


# ---------------------------------------------------------------------------------------- compiled, and as a custom op


def busiest(name: str) -> Case:
    """The case that sets most options, small ones first."""
    op = ops.OPS[name]
    with_values = [c for c in small(name) if all(c.shape.values())]
    return max(with_values, key=lambda c: sum(options.chosen(op, c).values()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ops.OPS)
def test_compiled_into_one_graph(name, dtype):
    variants = ("plain", "expanded") if dtype == FP32 else ("plain",)
    report = contract.check(ops.OPS[name], "triton", busiest(name), dtype, compiled="aot_eager", variants=variants)
    assert report.ok, report


@pytest.mark.parametrize("name", ops.OPS)
def test_no_host_waits_and_nothing_is_written_outside(name):
    triton_lists._layout.cache_clear()  # what an update's first call makes is watched too
    report = contract.check(ops.OPS[name], "triton", busiest(name), FP32, variants=(), watch=syncs.forbidden)
    assert report.ok, report


class Caught(TorchDispatchMode):
    """The custom ops of this package that are called within, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "tritium":
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ops.OPS)
def test_opcheck(name):
    """torch's own checks of a custom op, with the arguments that the op's public function gives it."""
    op = ops.OPS[name]
    arguments = op.cases.inputs(busiest(name), FP32, "cpu", 0)
    with torch.no_grad(), Caught() as caught:
        op.load("triton").function(**arguments)
    assert caught.calls, "no custom op was called, so compiled models and FLOP counters do not see this op"
    for function, args, kwargs in caught.calls:
        assert function.name().startswith(f"tritium::{name}_triton")
        args = [
            a.detach().clone().requires_grad_(needs_gradient(a)) if isinstance(a, torch.Tensor) else a for a in args
        ]
        checks = ["test_schema", "test_faketensor"] + ([] if op.updates else ["test_autograd_registration"])
        assert set(torch.library.opcheck(function, args, kwargs, test_utils=checks).values()) == {"SUCCESS"}


def needs_gradient(value: torch.Tensor) -> bool:
    return value.requires_grad and value.is_floating_point()


# ----------------------------------------------------------------------------------------------------- the full product


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ops.OPS)
def test_full_every_case_and_variant(name, dtype, tally):
    for case, seed in itertools.product(small(name), range(3)):
        tally.count("cases", contract.check(ops.OPS[name], "triton", case, dtype, seed=seed))


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ops.OPS)
def test_full_every_case_compiled(name, dtype, tally):
    for case in small(name):
        report = contract.check(ops.OPS[name], "triton", case, dtype, compiled="aot_eager")
        tally.count("cases compiled into one graph", report)


@pytest.mark.full
@pytest.mark.parametrize(("name", "piece"), list(products.pieces()), ids=str)
@pytest.mark.timeout(3600)
def test_full_product_of_options(name, piece, tally):
    for case, dtype in products.cases(name, piece):
        report = contract.check(ops.OPS[name], "triton", case, dtype, variants=("plain",))
        tally.count(products.PRODUCT, report)
