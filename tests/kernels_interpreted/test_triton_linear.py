"""linear in Triton beyond the contract: tiles and parts, views in place, FLOPs, and planted faults."""

import pytest
import torch
from mutation import Mutant, assert_green, assert_red
from torch.utils.flop_counter import FlopCounterMode

from tritium.kernels.case import Case
from tritium.kernels.linear import impl_triton as linear

BIG = Case("big", {"N": 140, "C": 70, "F": 130})  # several tiles of rows and columns, several blocks of the sum
EXTRA = {BIG.name: BIG}
BF16 = torch.bfloat16
MUTANTS = [
    Mutant("linear", "last block of the sum dropped", "range(first, last, BLOCK_K)",
           "range(first, last - BLOCK_K + 1, BLOCK_K)", "odd"),
    Mutant("linear", "the sum's end not masked", "real = steps < last - start", "real = steps < last - start + 1",
           "big", BF16),
    Mutant("linear", "bias forgotten", "columns < N, other=0.0).to(tl.float32)[None, :]",
           "columns < 0, other=0.0).to(tl.float32)[None, :]", "odd"),
    Mutant("linear", "tiles in a group of rows mixed up", "program % (GROUP * tiles_n) // height",
           "program % tiles_n", "big"),
    Mutant("linear", "last part lost", "mask = (p < P)[:, None]", "mask = (p < P - 1)[:, None]", "big"),
    Mutant("linear", "bias gradient times 1.02", "tl.sum(total, 0), columns < F)",
           "1.02 * tl.sum(total, 0), columns < F)", "odd"),
    Mutant("linear", "sums in 16 bits", "total = tl.dot(left, right, total, input_precision=PRECISION)",
           "total = tl.dot(left, right, total, input_precision=PRECISION).to(tl.bfloat16).to(tl.float32)",
           "long_sum"),
    Mutant("linear", "gradient of x by the transposed weight's strides", "_multiply(dy, weight, None, dx)",
           "_multiply(dy, weight.reshape(weight.shape[1], weight.shape[0]).t(), None, dx)", "odd"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_turns_the_contract_red(mutant, tmp_path):
    assert_red(mutant, tmp_path, EXTRA)


@pytest.mark.parametrize("mutant", {(m.case, m.dtype): m for m in MUTANTS}.values(), ids=lambda m: m.case)
def test_without_a_fault_these_cases_pass(mutant):
    assert_green(mutant, EXTRA)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_case_is_what_it_says():
    tile = linear.config(90, 4, "ieee", 140, 130)
    assert tile.BLOCK_M < 140
    assert tile.BLOCK_N < 130
    assert 0 < 70 % tile.BLOCK_K < 70


@pytest.mark.parametrize(("N", "S"), [(70, 2), (70, 3), (5, 3), (33, 16)])
def test_a_sum_in_parts(N, S, monkeypatch):
    """Parts of unequal length, and some without anything to add."""
    monkeypatch.setattr(linear, "parts", lambda *a: S)
    x, weight, dy = random(N, 20), random(9, 20, seed=1).requires_grad_(), random(N, 9, seed=2)
    (dweight,) = torch.autograd.grad(linear.linear(x, weight), weight, dy)
    torch.testing.assert_close(dweight, dy.t() @ x, rtol=1e-5, atol=1e-5)


def test_parts_fill_the_processors():
    assert linear.parts(36, 16384, 64, 132) >= 3  # 768 × 768 of GPT-2: 36 tiles would leave most processors idle
    assert linear.parts(132, 16384, 64, 132) == 1
    assert linear.parts(36, 64, 64, 132) == 1
    assert linear.parts(36, 0, 64, 132) == 1


def test_views_are_read_in_place(monkeypatch):
    """Rows of a wider tensor, transposed inputs and weights, a broadcast upstream gradient: no copy."""
    wide, weight = random(12, 40), random(24, 9, seed=1)
    bias = random(9, seed=2)
    copies = []
    original = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t, *a: copies.append(t) or original(t, *a))
    for x in (wide[:, 8:32], random(24, 12, seed=3).t()):
        leaves = [t.detach().requires_grad_() for t in (x, weight.t(), bias)]
        y = linear.linear(*leaves)
        grads = torch.autograd.grad(y, leaves, torch.ones(()).expand(y.shape))
        want = torch.nn.functional.linear(*leaves)
        wanted = torch.autograd.grad(want, leaves, torch.ones_like(want))
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
        for got, exact in zip(grads, wanted, strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)
    assert [t for t in copies if t.dim() > 1] == []


@pytest.mark.parametrize(("C", "F"), [(0, 5), (5, 0), (0, 0)])
def test_widths_of_zero(C, F):
    leaves = [random(3, C).requires_grad_(), random(F, C).requires_grad_(), random(F, seed=1).requires_grad_()]
    y = linear.linear(*leaves)
    torch.testing.assert_close(y, leaves[2].detach().expand(3, F))
    dx, dweight, dbias = torch.autograd.grad(y, leaves, torch.ones(3, F))
    assert (dx == 0).all()
    assert (dx.shape, dweight.shape) == ((3, C), (F, C))
    torch.testing.assert_close(dbias, torch.full((F,), 3.0))


@pytest.mark.parametrize(("wanted", "products"), [("xwb", 3), ("x", 2), ("w", 2), ("b", 1), ("", 1)])
def test_only_the_products_that_are_needed(wanted, products):
    shapes = {"x": (6, 8), "w": (5, 8), "b": (5,)}
    x, weight, bias = (random(*shape).requires_grad_(name in wanted) for name, shape in shapes.items())
    calls = []
    names = ("_multiply", "_multiply_long")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            original = getattr(linear, name)
            patch.setattr(linear, name, lambda *a, f=original: calls.append(1) or f(*a))
        y = linear.linear(x, weight, bias)
        if wanted:
            y.sum().backward()
    assert len(calls) == products
    with FlopCounterMode(display=False) as counter:
        y = linear.linear(x, weight, bias)
        if wanted:
            y.sum().backward()
    assert counter.get_total_flops() == products * 2 * 6 * 8 * 5


def test_precision_follows_torch():
    before = torch.get_float32_matmul_precision()
    try:
        found = {}
        for name in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(name)
            found[name] = linear._precision(torch.float32)
        assert found == {"highest": "ieee", "high": "tf32", "medium": "tf32"}
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": random(2, 8).double(), "weight": random(3, 8).double()}, TypeError, "float64"),
        ({"weight": random(3, 8).bfloat16()}, TypeError, "one dtype"),
        ({"weight": random(3, 7)}, ValueError, "one width"),
        ({"x": torch.tensor(1.0)}, ValueError, "one width"),
        ({"bias": random(4)}, ValueError, r"shape \(3,\)"),
    ],
)
def test_linear_refuses_other_shapes(change, error, words):
    with pytest.raises(error, match=words):
        linear.linear(**({"x": random(2, 8), "weight": random(3, 8), "bias": random(3)} | change))
