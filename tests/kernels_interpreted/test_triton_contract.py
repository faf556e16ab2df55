"""The contract over the Triton kernels: every case, options in pairs, every layout, under compile, and opcheck."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch

from tritium.kernels import contract, ops
from tritium.kernels.case import Case

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
OPS = ("attention", "layer_norm", "cross_entropy", "linear_cross_entropy")
# where layouts, expanded gradients and partial gradients are tried too; elsewhere they would repeat the same code
THOROUGH = {
    "attention": {"cross"},
    "layer_norm": {"odd", "wide_weights", "no_bias", "three_axes", "one_column", "no_rows"},
    "cross_entropy": {"everything", "one_class", "no_rows", "several_tiles"},
    "linear_cross_entropy": {"everything", "no_rows", "same_dtype_weight", "tiny"},
}


def small(name: str) -> list[Case]:
    return [c for c in ops.OPS[name].cases.CASES if not c.large]


def runs() -> Iterator[tuple[str, Case, torch.dtype]]:
    """Every case in fp32 and, in turn, in one of the 16-bit types; attention, which takes longest, every third."""
    for name in OPS:
        for number, case in enumerate(small(name)):
            yield name, case, FP32
            if name != "attention" or number % 3 == 0:
                yield name, case, (BF16, FP16)[number % 2]


@pytest.mark.parametrize(("name", "case", "dtype"), list(runs()), ids=str)
def test_every_case_keeps_the_contract(name, case, dtype):
    variants = contract.VARIANTS if case.name in THOROUGH[name] else ("plain",)
    report = contract.check(ops.OPS[name], "triton", case, dtype, variants=variants)
    assert report.ok, report


@pytest.mark.full
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(("name", "case"), [(n, c) for n in OPS for c in small(n)], ids=str)
def test_full_every_case_and_variant_in_every_dtype(name, case, dtype):
    for seed in range(3):
        report = contract.check(ops.OPS[name], "triton", case, dtype, seed=seed)
        assert report.ok, report


def pairwise(options: Mapping[str, Sequence[object]]) -> list[dict[str, object]]:
    """Few choices that together contain every pair of values of any two options; greedy, and the same every time."""
    names = list(options)
    wanted = {
        ((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in options[a] for y in options[b]
    }  # fmt: skip
    every = [dict(zip(names, values, strict=True)) for values in itertools.product(*options.values())]
    chosen = []
    while wanted:
        best = max(every, key=lambda choice: len(wanted & set(itertools.combinations(choice.items(), 2))))
        chosen.append(best)
        wanted -= set(itertools.combinations(best.items(), 2))
    return chosen


ATTENTION = {
    "T": ((37, 37), (5, 70), (70, 33), (1, 9)),
    "heads": ((2, 2), (4, 2), (3, 1)),
    "D": (8, 24, 64),
    "causal": (True, False),
    "documents": (False, True),
    "window": (0, 6),
    "softcap": (0.0, 7.0),
    "dropout": (0.0, 0.2),
    "dtype": (FP32, BF16, FP16),
}


def attention_case(T, heads, D, dtype, **options) -> tuple[Case, torch.dtype]:
    shape = {"B": 1, "Tq": T[0], "Tk": T[1], "H": heads[0], "G": heads[1], "D": D}
    if options["documents"] and T[0] > T[1]:  # documents are about queries that are keys too
        shape["Tq"] = T[1]
    return Case(" ".join(f"{k}={v}" for k, v in {**shape, **options}.items()), shape, options), dtype


@pytest.mark.parametrize(("case", "dtype"), [attention_case(**o) for o in pairwise(ATTENTION)], ids=str)
def test_attention_options_in_pairs(case, dtype):
    report = contract.check(ops.attention, "triton", case, dtype, variants=("plain",))
    assert report.ok, report


SHAPES = ("T", "heads", "D", "dtype")


@pytest.mark.full
@pytest.mark.parametrize(SHAPES, list(itertools.product(*(ATTENTION[name] for name in SHAPES))), ids=str)
def test_full_attention_options(T, heads, D, dtype):
    rest = {name: values for name, values in ATTENTION.items() if name not in SHAPES}
    for values in itertools.product(*rest.values()):
        case, _ = attention_case(T, heads, D, dtype, **dict(zip(rest, values, strict=True)))
        report = contract.check(ops.attention, "triton", case, dtype, variants=("plain",))
        assert report.ok, report


def test_pairs_are_all_there():
    chosen = pairwise({"a": (1, 2, 3), "b": (1, 2), "c": (1, 2)})
    assert len(chosen) < 12
    for x, y in itertools.product((1, 2, 3), (1, 2)):
        assert any(c["a"] == x and c["b"] == y for c in chosen)


COMPILED = {
    "attention": "more_queries", "layer_norm": "wide_weights", "cross_entropy": "everything",
    "linear_cross_entropy": "chunks",
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_compiled_into_one_graph(name):
    (case,) = (c for c in small(name) if c.name == COMPILED[name])
    report = contract.check(ops.OPS[name], "triton", case, FP32, compiled="aot_eager", variants=("plain",))
    assert report.ok, report


OPCHECK = {
    "attention": (
        torch.randn(1, 5, 2, 16).requires_grad_(), torch.randn(1, 7, 1, 16).requires_grad_(),
        torch.randn(1, 7, 1, 16).requires_grad_(), None, None, True, 0.25, 0, 0.0, 0.0,
    ),
    "layer_norm": (torch.randn(3, 9).requires_grad_(), torch.ones(9).requires_grad_(), None, 1e-5),
    "cross_entropy": (torch.randn(3, 8).requires_grad_(), torch.tensor([1, -100, 4]), 5, -100, 0.1, 0.0, 0.0),
    "linear_cross_entropy": (
        torch.randn(3, 4).requires_grad_(), torch.randn(8, 4).requires_grad_(), torch.tensor([1, -100, 4]),
        5, -100, 0.0, 0.0, 0.0, 2, True, True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    ops.OPS[name].load("triton")
    operator = getattr(torch.ops.tritium, f"{name}_triton").default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    assert set(torch.library.opcheck(operator, OPCHECK[name], test_utils=checks).values()) == {"SUCCESS"}
