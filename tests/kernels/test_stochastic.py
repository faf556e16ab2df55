"""Stochastic rounding by a counter: right on average, repeatable, alike in every backend; moments in bf16 that move."""

import pytest
import torch

from tritium.kernels import ops
from tritium.kernels.lib import native, stochastic
from tritium.kernels.op import KernelError

BACKENDS = ["reference", *(["native"] if native.missing() is None else [])]
BF16 = torch.bfloat16


def random(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def scalars(lr=0.01, step=1.0, grad_scale=1.0, skip=0.0) -> list[torch.Tensor]:
    return [torch.tensor(float(value)) for value in (lr, step, grad_scale, skip)]


def test_bits_are_those_of_the_definition():
    """By hand, in Python's integers."""

    def mix(x):
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    for step, tensor in ((1, 0), (7, 3), (1_000_000, 147)):
        found = stochastic.bits(torch.tensor(float(step)), tensor, torch.empty(5, 3)).flatten().tolist()
        stream = mix(mix((mix(step) + tensor) % 2**32))
        assert found == [mix(i ^ stream) for i in range(15)]


def test_bits_are_even_and_differ_by_step_and_tensor():
    like = torch.empty(1 << 16)
    seen = [stochastic.bits(torch.tensor(step), k, like) for step, k in ((1.0, 0), (2.0, 0), (1.0, 1))]
    for bits in seen:
        for part in (bits & 0xFFFF, bits >> 16):
            counts = torch.bincount(part >> 8, minlength=256).double()
            assert ((counts - 256).square() / 256).sum() < 340, "χ² of 255 degrees of freedom: 1 in 3000 is above"
    for a, b in ((0, 1), (0, 2)):
        both = torch.stack([(seen[a] & 0xFFFF).double(), (seen[b] & 0xFFFF).double()])
        assert abs(torch.corrcoef(both)[0, 1].item()) < 0.02
        assert (seen[a] == seen[b]).double().mean() < 1e-3


def test_rounding_is_right_on_average_and_exact_where_it_can_be():
    x = torch.tensor([1.0 + 2**-9, -(1.0 + 3 * 2**-10), 3e-39, 1.5, -0.0, float("inf"), -float("inf"), float("nan")])
    n = 1 << 14
    random_bits = stochastic.bits(torch.tensor(1.0), 0, torch.empty(n)) & 0xFFFF
    found = torch.stack([stochastic.to_bf16(v.expand(n).contiguous(), random_bits) for v in x])
    assert found.dtype == BF16
    mean = found[:3].double().mean(1)
    spacing = torch.tensor([2.0**-7, 2.0**-7, 2.0**-133], dtype=torch.float64)
    assert ((mean - x[:3].double()).abs() < spacing * 4 * 0.5 / n**0.5).all(), "four deviations"
    assert found[:3].double().std(1).gt(0).all()
    for i in (3, 4, 5, 6):
        assert torch.equal(found[i].float(), x[i].expand(n))
    assert found[7].isnan().all()


def moments_after(backend: str, steps: int, grad: torch.Tensor, beta2: float, first=1.0) -> torch.Tensor:
    """exp_avg_sq in bf16, begun at ``first``, after ``steps`` updates by the same gradient."""
    update = ops.adamw.load(backend).function
    n = grad.numel()
    lists = [[torch.zeros(n)], [], [grad], [torch.zeros(n, dtype=BF16)], [torch.full((n,), first, dtype=BF16)]]
    for step in range(1, steps + 1):
        update(*lists, *scalars(step=step), beta2=beta2)
    return lists[4][0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_a_second_moment_in_bf16_does_not_get_stuck(backend, beta2, monkeypatch):
    """From 1 towards 0.9 (a move of 1 - β2 of a tenth a step: below half a spacing of 2⁻⁸), the mean follows fp32."""
    n, steps = 4000, 60
    grad = torch.full((n,), 0.9**0.5)
    exact = 0.9 + 0.1 * beta2**steps
    found = moments_after(backend, steps, grad, beta2).double()
    assert found.mean().item() == pytest.approx(exact, abs=4 * 2**-8 / n**0.5 * 3)
    if backend == "reference":  # and this sees rounding to nearest
        monkeypatch.setattr(stochastic, "to_bf16", lambda x, random: x.to(BF16))
        stuck = moments_after(backend, steps, grad, beta2).double().mean().item()
        assert abs(stuck - exact) > 0.005, stuck


@pytest.mark.skipif("native" not in BACKENDS, reason="the native library is missing")
def test_native_rounds_to_the_references_bits():
    """Where both compute the same fp32: from zero moments with β1 = β2 = 0 they are g and g², whose square is exact in
    fp32 for g of 12 bits."""
    shapes = [(70_001,), (3, 5), (0,), (33_000,)]
    grads = [((random(torch.Size(s).numel(), i) * 512).round() / 512).reshape(s) for i, s in enumerate(shapes)]
    found = {}
    for backend in BACKENDS:
        lists = [[torch.zeros(s) for s in shapes] for _ in range(3)]
        moments = [[t.to(BF16) for t in ts] for ts in lists[1:]]
        ops.adamw.load(backend).function(
            lists[0], [], [g / 4 for g in grads], *moments, *scalars(step=9), beta1=0.0, beta2=0.0
        )
        found[backend] = moments
    for mine, theirs in zip(found["native"], found["reference"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert not torch.equal(found["native"][1][0], (grads[0] / 4).square().to(BF16)), "not to nearest"


def test_backends_with_fp32_moments_say_so():
    from tritium.kernels.op import CallSite, bind

    class Optimizer:
        def __init__(self):
            self.site = CallSite(ops.adamw, options={"copies": False, "moments": "bf16"})

        def call_sites(self):
            yield "optimizer", self.site

    with pytest.raises(KernelError, match="torch's fused AdamW keeps moments in fp32 and this site's are bf16; choose"):
        bind(Optimizer(), {"adamw": "torch_fused"})
    assert {row.backend for row in bind(Optimizer())} <= {"native", "reference"}
