"""Moments in 8 bits: the codes are those of torchao, rounding is right on average, what must not happen to a step."""

import pytest
import torch

from tritium.kernels import ops
from tritium.kernels.lib import dynamic_code, native, stochastic

BACKENDS = ["reference", *(["native"] if native.missing() is None else [])]
ONE = torch.ones(1)


def random(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def scalars(lr=0.01, step=1.0, grad_scale=1.0, skip=0.0) -> list[torch.Tensor]:
    return [torch.tensor(float(value)) for value in (lr, step, grad_scale, skip)]


@pytest.mark.parametrize("signed", [True, False])
def test_codes_stand_for_what_torchaos_do(signed):
    utils = pytest.importorskip("torchao.optim.quant_utils")
    theirs = torch.tensor(utils.create_dynamic_map(signed=signed))
    ours = dynamic_code.decode(torch.arange(256, dtype=torch.uint8), ONE, signed)
    torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=0)
    # and numbers get the codes that torchao gives them, but for zeros: a positive number without sign is not one
    x = random(40 * 256) * torch.logspace(-4, 2, 40).repeat_interleave(256) * torch.logspace(-8, 0, 256).repeat(40)
    x = x if signed else x.square()
    scaled, scales = utils.scale_tensor(x, 256)
    want = utils.quantize_8bit_with_qmap(scaled, theirs)
    codes, mine = dynamic_code.encode(x, signed)
    assert torch.equal(mine, scales)
    off = (codes.int() - want.int()).abs()
    if not signed:
        off[(want == 0) & (codes == 1)] = 0
        assert (codes[x > 0] > 0).all() and (want[x > 0] == 0).any()
    assert off.max() <= 1 and (off > 0).double().mean() < 1e-3, "the middle of two may round either way"


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_is_the_code_of_its_value(signed):
    codes = torch.arange(256, dtype=torch.uint8)
    values = dynamic_code.decode(codes, ONE, signed)
    assert (values.diff() > 0).all() and values[-1] == 1.0 and values[127 if signed else 0] == 0.0
    for scale in (1.0, 3e-20, 7e30):
        found, scales = dynamic_code.encode(values * scale, signed)
        assert torch.equal(found, codes) and scales[0].item() == pytest.approx(scale)
    found, scales = dynamic_code.encode(torch.zeros(300), signed)
    assert not scales.any() and not dynamic_code.decode(found, scales, signed).any()
    assert dynamic_code.encode(torch.tensor([1.0, float("nan")]), signed)[1].isnan().all(), "seen in the scale"


@pytest.mark.parametrize("signed", [True, False])
def test_rounding_is_right_on_average_wherever_a_number_lies(signed):
    """Inside decades, across their ends, below the first value."""
    n = 1 << 14
    bits = stochastic.bits(torch.tensor(3.0), 0, torch.empty(n)) & 0xFFFF
    for y in (0.5, 0.0999, 0.1003, 0.00999, 3.3e-5, 1.02e-6, 0.9999, 4e-7 if not signed else 3e-7):
        x = torch.full((n,), y)
        x[::256] = 1.0  # the scale
        codes, scales = dynamic_code.encode(x, signed, bits)
        found = dynamic_code.decode(codes, scales, signed)[torch.arange(n) % 256 != 0].double()
        values = found.unique()
        assert (len(values) == 2 and values[0] <= y <= values[1]) or len(values) == 1, (y, values)
        deviation = (values[-1] - values[0]).item() * 0.5 / n**0.5
        assert found.mean().item() == pytest.approx(y, abs=4.5 * deviation + 1e-7 * y), y


def second_moment_after(backend: str, steps: int, grad: torch.Tensor, beta2: float) -> torch.Tensor:
    """exp_avg_sq, begun at 1 (the last of each block stays there), after ``steps`` updates by one gradient."""
    update = ops.adamw_8bit.load(backend).function
    n, blocks = grad.numel(), dynamic_code.blocks(grad.numel())
    codes, scales = dynamic_code.encode(torch.ones(n), False)
    zeros = torch.full((n,), 127, dtype=torch.uint8)
    lists = [[torch.zeros(n)], [], [grad], [zeros], [codes], [torch.zeros(blocks)], [scales]]
    for step in range(1, steps + 1):
        update(*lists, *scalars(step=step), beta2=beta2)
    return dynamic_code.decode(lists[4][0], lists[6][0], False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_moment_in_8_bits_does_not_get_stuck(backend, monkeypatch):
    """One element in 256 keeps the scale at 1; the others move towards 0.5 by 0.001 of the rest a step, a seventh of a
    code's width at first: rounded to the nearest they never leave 1."""
    n, steps = 8192, 150
    grad = torch.full((n,), 0.5**0.5)
    grad[::256] = 1.0
    exact = 0.5 + 0.5 * 0.999**steps
    others = torch.arange(n) % 256 != 0
    assert second_moment_after(backend, steps, grad, 0.999)[others].mean().item() == pytest.approx(exact, abs=2e-3)
    if backend == "reference":
        encode = dynamic_code.encode
        monkeypatch.setattr(dynamic_code, "encode", lambda x, signed, random=None: encode(x, signed))
        assert second_moment_after(backend, steps, grad, 0.999)[others].mean().item() > exact + 0.03


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_second_moment_is_not_zero(backend):
    """Beside an element whose gradient is 10⁴ times as large: with a second moment of 0, the next step of an element
    whose gradient has become small is its first moment over almost nothing."""
    update = ops.adamw_8bit.load(backend).function
    zeros = [[torch.zeros(256)], [], [torch.full((256,), 1e-4)]]
    zeros[2][0][0] = 1.0
    zeros += [[torch.zeros(256, dtype=torch.uint8)] for _ in range(2)] + [[torch.zeros(1)] for _ in range(2)]
    update(*zeros, *scalars())
    before = zeros[0][0].clone()
    zeros[2][0].fill_(1e-9)
    update(*zeros, *scalars(step=2))
    moved = (zeros[0][0] - before).abs()
    assert dynamic_code.decode(zeros[4][0], zeros[6][0], False).min() > 0
    assert moved.max() < 0.03, "an lr of 0.01 moves no further than some 2 lr"


@pytest.mark.skipif("native" not in BACKENDS, reason="the native library is missing")
def test_backends_agree_on_nearly_every_code():
    """The same random bits: codes differ where the last bit of fp32 decides."""
    shapes = [(70_001,), (3, 5), (0,), (520, 64)]
    found = {}
    for backend in BACKENDS:
        params = [random(torch.Size(s).numel(), i).reshape(s) for i, s in enumerate(shapes)]
        moments = [[torch.zeros(s, dtype=torch.uint8) for s in shapes] for _ in range(2)]
        scales = [[torch.zeros(dynamic_code.blocks(torch.Size(s).numel())) for s in shapes] for _ in range(2)]
        for step in (1, 2, 3):
            grads = [random(torch.Size(s).numel(), 10 * step + i).reshape(s) for i, s in enumerate(shapes)]
            ops.adamw_8bit.load(backend).function(params, [], grads, *moments, *scales, *scalars(step=step))
        found[backend] = moments
    for mine, theirs in zip(found["native"], found["reference"], strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.numel() == 0 or (a != b).double().mean() < 2e-3


def test_what_it_would_misread_is_refused():
    p = torch.ones(3, 100)
    good = [[p], [], [p.clone()], [torch.zeros(3, 100, dtype=torch.uint8)], [torch.zeros(3, 100, dtype=torch.uint8)],
            [torch.zeros(2)], [torch.zeros(2)]]  # fmt: skip
    update = ops.adamw_8bit.load(BACKENDS[-1]).function
    if BACKENDS[-1] == "reference":
        pytest.skip("the native library is missing")
    for place, wrong, message in ((3, [p.clone()], "exp_avgs as codes .* in uint8"),
                                  (6, [torch.zeros(1)], "exp_avg_sq_scales contiguous, a scale for 256 elements"),
                                  (2, [], "one of grads for each of the 1 params")):  # fmt: skip
        lists = [*good[:place], wrong, *good[place + 1 :]]
        with pytest.raises(ValueError, match=message):
            update(*lists, *scalars())
    assert torch.equal(p, torch.ones(3, 100))
