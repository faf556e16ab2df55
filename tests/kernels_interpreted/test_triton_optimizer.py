"""adamw and global_norm in Triton beyond the contract: tables, layouts, extremes, one launch, no synchronisation."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tritium.kernels.adamw import impl_triton as adamw
from tritium.kernels.adamw import reference
from tritium.kernels.global_norm import impl_triton as global_norm
from tritium.kernels.lib import triton_launch, triton_lists

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CHUNK = adamw.config().CHUNK


def random(*shape: int, seed: int = 0, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scalars(lr=0.01, step=1.0, grad_scale=1.0, skip=0.0) -> list[torch.Tensor]:
    return [torch.tensor(float(value)) for value in (lr, step, grad_scale, skip)]


def clones(lists):
    return [[t.clone(memory_format=torch.preserve_format) for t in ts] for ts in lists]


def state(params: list[torch.Tensor], copies: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """[params, copies, exp_avgs, exp_avg_sqs] with moments that are not zero."""
    return [
        params,
        copies,
        [random(*p.shape, seed=7) for p in params],
        [random(*p.shape, seed=8).abs() for p in params],
    ]


def step_of(function, lists, grads, numbers, **options) -> None:
    params, copies, exp_avgs, exp_avg_sqs = lists
    function(params, copies, grads, exp_avgs, exp_avg_sqs, *numbers, **options)


# ---------------------------------------------------------------------------------------------------------------- adamw


def unaligned(t: torch.Tensor) -> torch.Tensor:
    """The same values one element after a multiple of 16 bytes."""
    base = torch.empty(t.numel() + 16, dtype=t.dtype)
    offset = next(i for i in range(16) if (base.data_ptr() + i * t.element_size()) % 16 == t.element_size())
    return base[offset : offset + t.numel()].view(t.shape).copy_(t)


def transposed(t: torch.Tensor) -> torch.Tensor:
    return t.t().contiguous().t()


def test_dtypes_and_layouts_mixed_in_one_call():
    shapes = ((CHUNK,), (CHUNK + 3,), (0,), (5, 7), (2, CHUNK), (), (33,))
    params = [random(*s, seed=i) for i, s in enumerate(shapes)]
    copies = [p.to(dtype) for p, dtype in zip(params, (BF16, FP16, BF16, FP32, BF16, BF16, FP16), strict=True)]
    grads = [
        random(*s, seed=20 + i, dtype=dtype)
        for i, (s, dtype) in enumerate(zip(shapes, (FP16, BF16, FP32, BF16, BF16, FP32, FP16), strict=True))
    ]
    got, want = state(params, copies), clones(state(params, copies))
    grads[0], grads[3] = unaligned(grads[0]), transposed(grads[3])
    got[0][1], got[1][4], got[3][6] = unaligned(got[0][1]), unaligned(got[1][4]), unaligned(got[3][6])
    got[0][3], got[1][3], got[2][3] = (transposed(ts[3]) for ts in got[:3])
    for step in (1, 2):
        numbers = scalars(step=step, grad_scale=0.7)
        step_of(adamw.adamw, got, grads, numbers, weight_decay=0.1)
        step_of(reference.adamw, want, grads, numbers, weight_decay=0.1)
    for mine, theirs in zip(got, want, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.dtype == b.dtype
            ulp = torch.finfo(a.dtype).eps
            torch.testing.assert_close(a.float(), b.float(), rtol=2 * ulp, atol=2 * ulp)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what tl.where does not choose
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.95, 0.999, 0.999999])
@pytest.mark.parametrize("step", [1, 2, 7, 1000, 1_000_000])
def test_bias_correction_at_any_step(beta, step):
    """From zero moments and a gradient of one, the step is lr (1 - β1)/(1 - β1ᵗ) √((1 - β2ᵗ)/(1 - β2))."""
    for beta1, beta2 in ((beta, 0.5), (0.5, beta)):
        lists = [[torch.zeros(1)], [], [torch.zeros(1)], [torch.zeros(1)]]
        step_of(adamw.adamw, lists, [torch.ones(1)], scalars(1.0, step), beta1=beta1, beta2=beta2, eps=0.0)
        corrections = [-math.expm1(step * math.log(b)) if b else 1.0 for b in (beta1, beta2)]
        exact = (1 - beta1) / corrections[0] * math.sqrt(corrections[1] / (1 - beta2))
        assert -lists[0][0].item() == pytest.approx(exact, rel=1.5e-6)


def two_steps() -> tuple[float, float]:
    """The difference from the reference after a second step with gradients elsewhere, and after the first."""
    params = [random(40), random(9, seed=1)]
    got, want = state(params, []), clones(state(params, []))
    kept, differences = [], []
    for step in (1, 2):
        grads = [random(*p.shape, seed=step) for p in params]
        kept.append(grads)  # so that the second gradients cannot lie where the first did
        step_of(adamw.adamw, got, grads, scalars(step=step))
        step_of(reference.adamw, want, grads, scalars(step=step))
        differences.append(max((a - b).abs().max().item() for a, b in zip(got[0], want[0], strict=True)))
        for grad in grads:
            grad.fill_(math.nan)
    return differences[1], differences[0]


def test_gradients_may_lie_elsewhere_at_every_step(monkeypatch):
    assert max(two_steps()) < 1e-6
    # and this sees a table that is not renewed
    first = []
    make = triton_lists._addresses

    def stale(device, stream, addresses):
        first.append(make(device, stream, addresses))
        return first[0]

    monkeypatch.setattr(triton_lists, "_addresses", stale)
    second_step, first_step = two_steps()
    assert first_step < 1e-6
    assert not second_step < 1e-3


def test_tables_are_kept_while_nothing_moves(monkeypatch):
    uploads = []
    monkeypatch.setattr(triton_lists, "_upload", lambda host, device: uploads.append(1) or host.to(device))
    lists, grads = state([random(40)], []), [random(40, seed=2)]
    for step in (1, 2, 3):
        step_of(adamw.adamw, lists, grads, scalars(step=step))
    assert len(uploads) <= 3, "owners, layout and addresses, once"
    step_of(adamw.adamw, lists, [random(40, seed=3)], scalars(step=4))
    assert len(uploads) <= 4


def test_skip_keeps_every_bit():
    lists = state([random(40)], [random(40, seed=3).bfloat16()])
    for tensors in lists:
        tensors[0][3] = math.nan
        tensors[0][5] = -0.0
    before = clones(lists)
    step_of(adamw.adamw, lists, [torch.full((40,), math.inf)], scalars(math.nan, 0, math.nan, skip=2.0))
    for mine, old in zip(lists, before, strict=True):
        assert torch.equal(mine[0].view(torch.uint8), old[0].view(torch.uint8))


def test_one_launch_for_any_number_of_tensors(monkeypatch):
    launches = []
    monkeypatch.setattr(triton_launch.Kernel, "__call__", lambda self, grid, *rest: launches.append(grid))
    sizes = [1 + i % 50 * 300 for i in range(600)]
    lists = [[torch.zeros(n) for n in sizes] for _ in range(4)]
    step_of(adamw.adamw, [lists[0], [], lists[1], lists[2]], lists[3], scalars())
    assert launches == [(sum(-(-n // CHUNK) for n in sizes),)]
    global_norm.global_norm(lists[3])
    most = triton_launch.processors() * global_norm.config(90).programs_per_processor
    assert launches[1:] == [(most,)]


BEYOND = 2**32  # elements: 2³⁴ bytes of fp32


def far_table(tensors: list[torch.Tensor], chunk: int) -> triton_lists.Tables:
    """One chunk, which starts BEYOND elements after the addresses in the table and ends with the tensors."""
    n = tensors[0].numel()
    code = 0
    addresses = [t.data_ptr() - BEYOND * t.element_size() for t in tensors]
    layout = torch.tensor([BEYOND + n, -(BEYOND // chunk), code])
    return triton_lists.Tables(torch.zeros(1, dtype=torch.int32), layout, torch.tensor(addresses), 1, 1)


def test_offsets_beyond_32_bits(monkeypatch):
    monkeypatch.setattr(triton_lists, "tables", lambda lists, coded, chunk: far_table([ts[0] for ts in lists], chunk))
    for n in (CHUNK, 100):
        got, grads = state([random(n)], []), [random(n, seed=1)]
        want = clones(got)
        step_of(adamw.adamw, got, grads, scalars())
        step_of(reference.adamw, want, grads, scalars())
        torch.testing.assert_close(got[0][0], want[0][0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(global_norm.global_norm(grads), grads[0].norm(), rtol=1e-6, atol=0)


class NoSync(TorchDispatchMode):
    """Refuses everything that makes the host wait for the device."""

    SYNCS = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in self.SYNCS, f"{function} makes the host wait"
        return function(*args, **(kwargs or {}))


def test_the_host_waits_for_nothing():
    lists, grads = state([random(40), random(3)], [random(40).bfloat16(), random(3)]), [random(40), random(3).half()]
    with NoSync():
        params, copies, exp_avgs, exp_avg_sqs = lists
        adamw._launch(params, copies, grads, exp_avgs, exp_avg_sqs, *scalars(), 0.9, 0.95, 1e-8, 0.1)
        norm = global_norm._launch(grads)
        with pytest.raises(AssertionError, match="wait"):
            norm.item()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"params": [random(4).double()]}, TypeError, "float64"),
        ({"grads": [random(4).double()]}, TypeError, r"grads\[0\] is torch.float64"),
        ({"exp_avgs": [random(4).half()]}, TypeError, r"exp_avgs\[0\]"),
        ({"exp_avgs": [random(4).bfloat16()]}, TypeError, r"needs exp_avg_sqs in bfloat16"),
        ({"grads": [random(5)]}, ValueError, r"grads\[0\] has shape \(5,\)"),
        ({"copies": [random(4), random(4)]}, ValueError, "one of copies"),
        ({"lr": torch.tensor(0.1, dtype=torch.float64)}, ValueError, "lr on the device"),
        ({"skip": torch.zeros(2)}, ValueError, "skip on the device"),
    ],
)
def test_adamw_refuses_what_it_would_misread(change, error, words):
    names = ("params", "copies", "grads", "exp_avgs", "exp_avg_sqs")
    arguments = {n: [random(4)] for n in names}
    arguments |= dict(zip(("lr", "step", "grad_scale", "skip"), scalars(), strict=True))
    with pytest.raises(error, match=words):
        adamw.adamw(**(arguments | change))


# ---------------------------------------------------------------------------------------------------------- global_norm


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-19, 1e19, 1e30, 1e37])
def test_squares_beyond_fp32(scale):
    """To fp32's roundoff, which among the smallest numbers is 2⁻¹⁴⁹."""
    tensors = [random(50) * scale, random(3, 5, seed=1) * scale]
    exact = torch.linalg.vector_norm(torch.cat([t.flatten() for t in tensors]).double())
    torch.testing.assert_close(global_norm.global_norm(tensors).double(), exact, rtol=1e-6, atol=2**-149)


def test_tensors_of_very_different_sizes_and_dtypes():
    tensors = [random(70) * 1e-25, random(70, seed=1, dtype=FP16), random(70, seed=2, dtype=BF16) * 1e25, random(9)]
    exact = math.sqrt(sum(t.double().square().sum().item() for t in tensors))
    assert global_norm.global_norm(tensors).item() == pytest.approx(exact, rel=1e-6)
    assert global_norm.global_norm(tensors[:2]).item() == pytest.approx(tensors[1].double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_nan_and_infinity_are_seen(dtype):
    for n in (30, global_norm.config(90).CHUNK):
        tensors = [random(5, dtype=dtype), random(n, seed=1, dtype=dtype)]
        tensors[1][-1] = -math.inf
        assert global_norm.global_norm(tensors).item() == math.inf
        tensors[1][0] = math.nan
        assert global_norm.global_norm(tensors).isnan()


def test_layouts():
    base = random(9, 11)
    tensors = [base.t(), base[1:, 3:], base[0].expand(4, 11), unaligned(random(5000)), base[0, 0]]
    exact = math.sqrt(sum(t.double().square().sum().item() for t in tensors))
    assert global_norm.global_norm(tensors).item() == pytest.approx(exact, rel=1e-6)


def test_repeats_bit_for_bit_and_leaves_the_counter_as_it_was():
    tensors = [random(100_000), random(3)]
    first = global_norm.global_norm(tensors)
    for _ in range(3):
        assert torch.equal(global_norm.global_norm(tensors), first)
    tile = global_norm.config(90)
    counter = global_norm._workspace(tensors[0].device, 0, tile.programs_per_processor * triton_launch.processors())[1]
    assert counter.item() == 0


def test_global_norm_refuses_fp64():
    with pytest.raises(TypeError, match=r"tensors\[1\] is torch.float64"):
        global_norm.global_norm([random(3), random(3).double()])


def test_tables_belong_to_the_stream_that_wrote_them(monkeypatch):
    """Another stream may launch before the copy to the device is done."""
    tensors = [[torch.zeros(5), torch.zeros(7)]]
    made = []
    for stream in (1, 2, 1):
        monkeypatch.setattr(triton_lists, "stream_of", lambda device, stream=stream: stream)
        made.append(triton_lists.tables(tensors, coded=(0,), chunk=4))
    for part in ("owners", "layout", "addresses"):
        first, second, again = (getattr(table, part) for table in made)
        assert first is again
        assert first is not second
