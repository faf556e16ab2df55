"""The losses' Triton kernels beyond the contract: infinite logits and upstream gradients, refused options."""

import math

import pytest
import torch

from tritium.kernels import contract, ops
from tritium.kernels.case import Case
from tritium.kernels.cross_entropy import impl_triton as cross_entropy
from tritium.kernels.linear_cross_entropy import impl_triton as linear_cross_entropy

OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 5.0},
    "ignored": {"ignore_index": 3},
}


def loss_and_gradient(backend: str, logits: torch.Tensor, targets: torch.Tensor, upstream=None, **options):
    leaf = logits.clone().requires_grad_()
    loss = ops.cross_entropy.load(backend).function(leaf, targets, **options)
    upstream = torch.ones_like(loss) if upstream is None else torch.full_like(loss, upstream)
    return loss.detach(), torch.autograd.grad(loss, leaf, upstream)[0]


def rows(N: int, V: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, V + padding), and targets of which every fourth is 3."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(N, V + padding, generator=generator), torch.arange(N) % 4


@pytest.mark.parametrize("backend", ["triton", "native"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("V", [20, 5000])
def test_a_logit_of_plus_infinity_gives_what_the_reference_gives(options, V, reduction, backend):
    """An infinite loss, or NaN where it is the target's; NaN in its place of the gradient, the others' finite."""
    logits, targets = rows(6, V, 4)
    logits[1, 7] = logits[2, 2] = logits[5, V - 1] = math.inf  # row 2's is its target
    logits[4, 4] = -math.inf
    options = {"vocab_size": V, "reduction": reduction, **options}
    found, want = (loss_and_gradient(name, logits, targets, **options) for name in (backend, "reference"))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6, equal_nan=True)
    if len(options) == 2:
        assert want[1].isnan().sum() == 3
        assert (want[0].isinf().sum() == 2 and want[0][2].isnan()) if reduction == "none" else want[0].isnan()


@pytest.mark.parametrize("backend", ["triton", "native"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("upstream", [math.inf, -math.inf, math.nan])
def test_an_upstream_gradient_that_is_no_number_reaches_what_counts_and_nothing_else(
    upstream, options, reduction, backend
):
    logits, targets = rows(6, 20, 4)
    options = {"vocab_size": 20, "reduction": reduction, **options}
    (_, found), (_, want) = (
        loss_and_gradient(name, logits, targets, upstream, **options) for name in (backend, "reference")
    )
    assert torch.equal(found.isfinite(), want.isfinite())
    assert torch.equal(found[want.isfinite()], want[want.isfinite()])
    assert (found[:, 20:] == 0).all()
    if options["reduction"] == "none" and not options.get("z_loss") and not options.get("label_smoothing"):
        assert torch.equal(found.isnan(), want.isnan())


def test_the_product_that_a_compiler_fuses_keeps_zeros_too():
    dlogits = torch.tensor([[0.5, 0.0, -0.25]])
    (scaled,) = cross_entropy._scaled(torch.tensor(math.inf), dlogits)
    assert scaled.tolist() == [[math.inf, 0.0, -math.inf]]


@pytest.mark.parametrize("backend", ["triton", "native"])
@pytest.mark.parametrize("upstream", [math.inf, math.nan])
def test_an_infinite_upstream_gradient_leaves_ignored_rows_and_padding_of_the_head_at_zero(upstream, backend):
    x, weight = torch.randn(6, 8), torch.randn(24, 8)
    targets = torch.tensor([1, -100, 5, -100, 2, 19])
    found = []
    for name in (backend, "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        loss = ops.linear_cross_entropy.load(name).function(*leaves, targets, 20)
        found.append(torch.autograd.grad(loss, leaves, torch.tensor(upstream)))
    for got, want in zip(*found, strict=True):
        assert torch.equal(got.isfinite(), want.isfinite())
        assert (got[got.isfinite()] == 0).all()
    assert found[1][0].isfinite().sum() == 2 * 8
    assert found[1][1].isfinite().sum() == 4 * 8


# ----------------------------------------------------------------------------------------- fp16's gradients with z_loss


@pytest.mark.parametrize("z_loss", [0.0, 1e-4, 1e-2, 1.0, 50.0])
@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_what_fp16_is_lifted_by_keeps_the_largest_gradient_in_its_range(softcap, z_loss):
    lifted = linear_cross_entropy.boost(50257, z_loss, softcap)
    lse = (softcap or 65504.0) + math.log(50257)
    assert lifted * (1 + 2 * z_loss * lse) <= 65504
    assert lifted == 1024 or 2 * lifted * (1 + 2 * z_loss * lse) > 65504
    assert math.frexp(lifted)[0] == 0.5
    if not z_loss or (z_loss, softcap) == (1e-4, 30.0):
        assert lifted == 1024


@pytest.mark.parametrize("z_loss", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("size", [300.0, 6e4])
def test_no_logits_of_fp16_overflow_the_gradients_of_the_head(size, z_loss):
    """Rows whose largest logit is ``size``, and whose lse is."""
    x, weight = torch.eye(4, 8).half(), torch.randn(16, 8)
    weight[:4, :4] = torch.eye(4) * size
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    upstream = torch.tensor(1 / (2 * z_loss * size + 1))  # so that the result is in fp16's range
    options = {"targets": torch.tensor([0, 5, 2, 7]), "vocab_size": 15, "z_loss": z_loss}
    found = torch.autograd.grad(linear_cross_entropy.linear_cross_entropy(*leaves, **options), leaves, upstream)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want = torch.autograd.grad(ops.linear_cross_entropy.reference(*wide, **options), wide, upstream.double())
    for got, exact in zip(found, want, strict=True):
        assert (got - exact).abs().max() < 4e-3 * exact.abs().max()


@pytest.mark.parametrize("name", ["large_z_loss", "large_z_loss_softcap"])
def test_a_large_z_loss_keeps_the_contract_in_fp16(name):
    (case,) = (c for c in ops.linear_cross_entropy.cases.CASES if c.name == name)
    for dtype in (torch.float16, torch.bfloat16):
        report = contract.check(ops.linear_cross_entropy, "triton", case, dtype)
        assert report.ok, report


# ------------------------------------------------------------------------------------------------------ refused options

SHAPES = {"N": 2, "C": 4, "V": 5, "Vp": 5}
WRONG = {
    **{("label_smoothing", value): r"a label_smoothing in \[0, 1\]" for value in (-0.1, 1.1, math.nan)},
    **{("z_loss", value): "a finite z_loss of at least 0" for value in (-1e-3, math.nan, math.inf)},
    **{("softcap", value): "a finite softcap of at least 0" for value in (-1.0, math.nan, math.inf)},
}


@pytest.mark.parametrize("rows", [2, 0])
@pytest.mark.parametrize("backend", ["reference", "triton", "native"])
@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize(("option", "value"), WRONG)
def test_an_option_out_of_its_range_is_refused(option, value, name, backend, rows):
    op = ops.OPS[name]
    arguments = op.cases.inputs(Case("wrong", {**SHAPES, "N": rows}, {option: value}), torch.float32, "cpu", 0)
    function = op.load(backend).function
    with pytest.raises(ValueError, match=f"{WRONG[option, value]}.*it is {value}: .*; 0 leaves"):
        function(**arguments)
    for edge in (0.0, 1.0):
        function(**{**arguments, option: edge})


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_reduced_loss_refuses_it_too(reduction):
    logits = torch.randn(2, 5, requires_grad=True)
    for option, value in WRONG:
        with pytest.raises(ValueError, match=WRONG[option, value]):
            cross_entropy.cross_entropy(logits, torch.tensor([1, 2]), 5, reduction=reduction, **{option: value})
