"""The losses' Triton kernels beyond the contract: infinite logits and upstream gradients, refused options."""

import math

import pytest
import torch

from tritium.kernels import ops
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


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("V", [20, 5000])
def test_a_logit_of_plus_infinity_gives_what_the_reference_gives(options, V, reduction):
    """An infinite loss, or NaN where it is the target's; NaN in its place of the gradient, the others' finite."""
    logits, targets = rows(6, V, 4)
    logits[1, 7] = logits[2, 2] = logits[5, V - 1] = math.inf  # row 2's is its target
    logits[4, 4] = -math.inf
    options = {"vocab_size": V, "reduction": reduction, **options}
    found, want = (loss_and_gradient(name, logits, targets, **options) for name in ("triton", "reference"))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6, equal_nan=True)
    if len(options) == 2:
        assert want[1].isnan().sum() == 3
        assert (want[0].isinf().sum() == 2 and want[0][2].isnan()) if reduction == "none" else want[0].isnan()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("upstream", [math.inf, -math.inf, math.nan])
def test_an_upstream_gradient_that_is_no_number_reaches_what_counts_and_nothing_else(upstream, options, reduction):
    logits, targets = rows(6, 20, 4)
    options = {"vocab_size": 20, "reduction": reduction, **options}
    (_, found), (_, want) = (
        loss_and_gradient(name, logits, targets, upstream, **options) for name in ("triton", "reference")
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


@pytest.mark.parametrize("upstream", [math.inf, math.nan])
def test_an_infinite_upstream_gradient_leaves_ignored_rows_and_padding_of_the_head_at_zero(upstream):
    x, weight = torch.randn(6, 8), torch.randn(24, 8)
    targets = torch.tensor([1, -100, 5, -100, 2, 19])
    found = []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        loss = ops.linear_cross_entropy.load(backend).function(*leaves, targets, 20)
        found.append(torch.autograd.grad(loss, leaves, torch.tensor(upstream)))
    for got, want in zip(*found, strict=True):
        assert torch.equal(got.isfinite(), want.isfinite())
        assert (got[got.isfinite()] == 0).all()
    assert found[1][0].isfinite().sum() == 2 * 8
    assert found[1][1].isfinite().sum() == 4 * 8
