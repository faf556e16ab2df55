"""What the contract does not ask of every backend: views in place, bad targets, nothing in vain, FLOPs, refusals."""

import contextlib
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tritium.kernels import ops
from tritium.kernels.attention import impl_triton as attention
from tritium.kernels.attention import reference as attention_reference
from tritium.kernels.cross_entropy import impl_triton as cross_entropy
from tritium.kernels.cross_entropy import reference as cross_entropy_reference
from tritium.kernels.lib import triton_launch
from tritium.kernels.linear_cross_entropy import impl_triton as linear_cross_entropy
from tritium.kernels.linear_cross_entropy import reference as linear_cross_entropy_reference
from tritium.kernels.site import Machine, Site


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ----------------------------------------------------------------------------------------------------------- attention


def test_dropout_keeps_the_very_weights_the_reference_keeps():
    """With v the identity, y holds the weights themselves: which are zero is the mask."""
    B, T, H = 2, 16, 2
    q, k = random(B, T, H, 16), random(B, T, H, 16, seed=1)
    v = torch.eye(T)[None, :, None, :].expand(B, T, H, T)
    seed = torch.tensor(2**40 + 987654321)
    options = {"causal": False, "dropout": 0.4, "seed": seed}
    weights = attention.attention(q, k, v, **options)
    kept = attention_reference.keep_mask(torch.Size((B, H, T, T)), 0.4, seed)
    assert torch.equal(weights.transpose(1, 2) != 0, kept)
    torch.testing.assert_close(weights, attention_reference.attention(q, k, v, **options), rtol=1e-5, atol=1e-6)


def test_queries_that_see_nothing_are_zero_and_have_no_gradient():
    q, k, v = (random(1, T, 1, 16, seed=T).requires_grad_() for T in (7, 3, 3))
    y = attention.attention(q, k, v)  # the last three queries are the positions 0, 1, 2; four come before any key
    assert (y[:, :4] == 0).all()
    assert (y[:, 4:] != 0).all()
    dq, dk, dv = torch.autograd.grad(y, (q, k, v), torch.ones_like(y))
    assert (dq[:, :4] == 0).all()
    assert all(g.isfinite().all() for g in (dq, dk, dv))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"dropout": 0.5}, ValueError, "seed"),
        ({"dropout": 1.0}, ValueError, r"\[0, 1\)"),
        ({"q": random(1, 4, 3, 16)}, ValueError, "multiple of G"),
        ({"k": random(1, 4, 2, 8)}, ValueError, "multiple of G"),
        ({"q": random(1, 4, 2, 16).double()}, TypeError, "float64"),
        ({"q": random(1, 4, 2, 16).half()}, TypeError, "one dtype"),
        ({n: random(1, 4, 2, 12) for n in "qkv"}, ValueError, "multiple of 8"),
        ({n: random(1, 4, 2, 264) for n in "qkv"}, ValueError, "up to 256"),
        ({"seq_start": torch.zeros(1, 3, dtype=torch.int32)}, ValueError, "seq_start"),
        ({"seq_start": torch.zeros(1, 4)}, TypeError, "seq_start in int32.* torch.float32"),
        ({n: random(4, 2, 16) for n in "qkv"}, ValueError, r"takes q \(B, Tq, H, D\)"),
    ],
)
def test_attention_refuses_what_it_cannot_do(change, error, words):
    arguments = {n: random(1, 4, 2, 16) for n in "qkv"} | change
    with pytest.raises(error, match=words):
        attention.attention(**arguments)


def flops_of(function, *args, backward: bool = True) -> int:
    with FlopCounterMode(display=False) as counter:
        y = function(*args)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


def test_attention_flops_of_the_model():
    """Two GEMMs forward and four backward over the visible pairs; recomputed scores are not the model's."""
    q = torch.randn(1, 32, 2, 16, requires_grad=True)
    pair = 2 * 2 * 16  # a multiply-add per head and element
    assert flops_of(attention.attention, q, q, q, None, False) == 6 * pair * 32 * 32
    assert flops_of(attention.attention, q, q, q, None, True) == 6 * pair * 32 * 32 // 2
    assert flops_of(attention.attention, q, q, q, None, True, None, 8) == 6 * pair * (8 * 8 // 2 + 24 * 8)
    with torch.no_grad():
        one = torch.randn(1, 1, 2, 16)
        decode = flops_of(attention.attention, one, q, q, backward=False)
    assert decode == 2 * pair * 31.5


# ------------------------------------------------------------------------------------------------------- cross_entropy


@pytest.mark.parametrize("target", [5, 7, 8, 2**40, -1, -(2**40)])
def test_a_target_out_of_range_is_loud_and_reads_nothing(target):
    logits = random(3, 8).requires_grad_()
    losses = cross_entropy.cross_entropy(logits, torch.tensor([1, target, 4]), vocab_size=5)
    assert losses[1].isnan()
    assert losses[[0, 2]].isfinite().all()
    (gradient,) = torch.autograd.grad(losses, logits, torch.ones(3))
    assert gradient[1, :5].isnan().all()
    assert gradient[[0, 2]].isfinite().all()
    assert (gradient[[0, 2], 5:] == 0).all()


def test_ignored_rows_are_not_read():
    logits = random(3, 8)
    logits[1] = math.nan
    logits.requires_grad_()
    losses = cross_entropy.cross_entropy(logits, torch.tensor([1, -100, 4]), vocab_size=8)
    (gradient,) = torch.autograd.grad(losses, logits, torch.ones(3))
    assert losses[1] == 0
    assert (gradient[1] == 0).all()
    assert losses.isfinite().all()


def test_cross_entropy_refuses_other_shapes():
    with pytest.raises(ValueError, match="vocab_size ≤ columns"):
        cross_entropy.cross_entropy(random(2, 8), torch.tensor([0, 1]), 9)
    with pytest.raises(ValueError, match="one int64 target a row"):
        cross_entropy.cross_entropy(random(2, 8), torch.tensor([0]), 8)
    with pytest.raises(ValueError, match="int32"):
        cross_entropy.cross_entropy(random(2, 8), torch.tensor([0, 1], dtype=torch.int32), 8)
    for reduction in ("none", "sum"):
        with pytest.raises(ValueError, match=r"takes logits \(N, Vp\), they are \(2, 3, 8\); flatten"):
            logits = random(2, 3, 8).requires_grad_()
            cross_entropy.cross_entropy(logits, torch.tensor([0, 1]), 8, reduction=reduction)


def test_a_negative_chunk_lets_the_head_choose():
    x, weight, targets = random(5, 8), random(16, 8, seed=1), torch.arange(5)
    losses = [linear_cross_entropy.linear_cross_entropy(x, weight, targets, 16, chunk=chunk) for chunk in (0, -1)]
    assert torch.equal(*losses)


def losses_case(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, int]:
    logits = random(6, 40, seed=3, dtype=dtype).requires_grad_()
    return logits, torch.tensor([1, -100, 4, 29, 0, -100]), 30


def launched(monkeypatch) -> list[str]:
    names = []
    call = triton_launch.Kernel.__call__
    monkeypatch.setattr(
        triton_launch.Kernel, "__call__", lambda self, *args: names.append(self.jit.fn.__name__) or call(self, *args)
    )
    return names


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("upstream", [1.0, 0.3, 0.0])
def test_a_reduced_loss_and_its_gradient_in_one_pass(reduction, upstream, monkeypatch):
    logits, targets, V = losses_case()
    before = logits.detach().clone()
    losses = cross_entropy.cross_entropy(logits, targets, V, label_smoothing=0.1)
    loss = losses.sum() / (4 if reduction == "mean" else 1)
    (want,) = torch.autograd.grad(loss, logits, torch.tensor(upstream))
    names = launched(monkeypatch)
    got = cross_entropy.cross_entropy(logits, targets, V, label_smoothing=0.1, reduction=reduction)
    assert names == ["_forward_backward"]
    torch.testing.assert_close(got, loss)
    (gradient,) = torch.autograd.grad(got, logits, torch.tensor(upstream))
    assert names == ["_forward_backward", "_scale"]
    torch.testing.assert_close(gradient, want, rtol=1e-6, atol=1e-8)
    assert torch.equal(logits, before), "the logits are the caller's"


def test_a_second_backward_of_a_kept_graph_is_an_error_and_scales_nothing_twice():
    logits, targets, V = losses_case()
    loss = cross_entropy.cross_entropy(logits, targets, V, reduction="sum")
    (first,) = torch.autograd.grad(loss, logits, torch.tensor(0.5), retain_graph=True)
    kept = first.clone()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits, torch.tensor(0.5))
    assert torch.equal(first, kept)


def test_no_gradient_of_the_gradient_of_a_reduced_loss():
    logits, targets, V = losses_case()
    loss = cross_entropy.cross_entropy(logits, targets, V, reduction="sum")
    (gradient,) = torch.autograd.grad(loss.square(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_gradient_handed_over_is_not_shared_between_two_uses():
    """Two losses of the same logits add up in them, whoever owns the buffers."""
    logits, targets, V = losses_case()
    total = sum(cross_entropy.cross_entropy(logits, targets, V, reduction="sum") * w for w in (1.0, 0.25))
    total.backward()
    (one,) = torch.autograd.grad(cross_entropy.cross_entropy(logits, targets, V, reduction="sum"), logits)
    torch.testing.assert_close(logits.grad, 1.25 * one)


def test_a_reduced_loss_without_gradients_writes_none(monkeypatch):
    logits, targets, V = losses_case()
    names = launched(monkeypatch)
    with torch.no_grad():
        cross_entropy.cross_entropy(logits, targets, V, reduction="sum")
    cross_entropy.cross_entropy(logits.detach(), targets, V, reduction="mean")
    assert names == ["_forward", "_forward"]


def test_small_gradients_of_an_fp16_mean_survive_until_the_loss_scale():
    logits = torch.zeros(8, 8, dtype=torch.float16)
    logits[:, 3] = -12.0  # a probability of 9e-7, an eighth of which fp16 has hardly any digits for
    logits.requires_grad_()
    targets, scale = torch.zeros(8, dtype=torch.int64), torch.tensor(2.0**12)
    loss = cross_entropy.cross_entropy(logits, targets, 8, reduction="mean")
    (gradient,) = torch.autograd.grad(loss, logits, scale)
    exact = scale / 8 * logits.detach().double().softmax(1)[:, 3]
    torch.testing.assert_close(gradient[:, 3].double(), exact, rtol=1e-3, atol=0)


def test_seen_by_a_mode_it_is_the_custom_op_with_the_same_numbers():
    for reduction in ("sum", "mean"):
        logits, targets, V = losses_case(torch.bfloat16)
        results = []
        for mode in (contextlib.nullcontext(), FlopCounterMode(display=False)):
            with mode:
                loss = cross_entropy.cross_entropy(logits, targets, V, z_loss=1e-3, reduction=reduction)
                results.append((loss, *torch.autograd.grad(loss, logits, torch.tensor(0.7))))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_an_unknown_reduction_is_refused(backend):
    logits, targets, V = losses_case()
    with pytest.raises(ValueError, match="'none', 'sum' or 'mean', not 'avg'"):
        ops.cross_entropy.load(backend).function(logits, targets, V, reduction="avg")


class NoSync(TorchDispatchMode):
    """Refuses everything that makes the host wait for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero"), f"{name} waits"
        return function(*args, **(kwargs or {}))


def test_the_host_waits_for_no_loss():
    logits, targets, V = losses_case()
    x, weight, all_targets = head()
    with NoSync(), torch.no_grad():
        _, dlogits = cross_entropy._launch_one_pass(logits, targets, V, -100, 0.1, 1e-3, 9.0, True)
        cross_entropy._launch_scale(dlogits, torch.tensor(0.5))
        options = (30, -100, 0.1, 1e-3, 9.0, 7)
        loss, dx, dweight = linear_cross_entropy._launch_forward(x, weight, all_targets, *options, True, True)
        linear_cross_entropy._launch_backward(loss, dx, dweight, torch.bfloat16, torch.float32, 1.0)
        with pytest.raises(AssertionError, match="waits"):
            loss.item()


@pytest.mark.parametrize("lowest", [-2e30, torch.finfo(torch.bfloat16).min, torch.finfo(torch.float32).min])
def test_rows_of_very_low_logits(lowest):
    """A row that a mask has filled: all classes are alike."""
    logits = torch.full((2, 5), lowest).requires_grad_()
    losses = cross_entropy.cross_entropy(logits, torch.tensor([1, 4]), 5)
    want = cross_entropy_reference.cross_entropy(logits, torch.tensor([1, 4]), 5)
    torch.testing.assert_close(losses, want)
    for got, exact in zip(*(torch.autograd.grad(x.sum(), logits) for x in (losses, want)), strict=True):
        torch.testing.assert_close(got, exact)


def test_a_loss_scale_saves_small_gradients_in_fp16():
    """Probabilities below fp16's smallest number, and an upstream gradient that lifts them: as much is left as there
    is without a reduction."""
    logits = (random(4, 600) * 5).half().requires_grad_()
    targets = torch.tensor([1, 2, 3, 4])

    def zeros(loss: torch.Tensor) -> int:
        (gradient,) = torch.autograd.grad(loss, logits, torch.full_like(loss, 8192.0))
        return int((gradient == 0).sum())

    for reduction in ("none", "sum", "mean"):
        least = zeros(cross_entropy_reference.cross_entropy(logits, targets, 600, reduction=reduction))
        assert zeros(cross_entropy.cross_entropy(logits, targets, 600, reduction=reduction)) <= least * 1.1
    x, weight = (random(4, 16) * 2).half().requires_grad_(), (random(600, 16, seed=1) * 2).requires_grad_()
    loss = linear_cross_entropy.linear_cross_entropy(x, weight, targets, 600)
    (dweight,) = torch.autograd.grad(loss, weight, torch.tensor(1.0))
    exact = linear_cross_entropy_reference.linear_cross_entropy(x.double(), weight.double(), targets, 600)
    (true,) = torch.autograd.grad(exact, weight)
    rows = true.abs().amax(1)
    small = (rows > 1e-9) & (rows < 3e-8)  # in fp16 all of these would be 0
    assert small.sum() > 5
    assert (dweight[small] != 0).any(1).float().mean() > 0.8


# ------------------------------------------------------------------------------------------------ linear_cross_entropy

N, C, VP = 24, 8, 32


def head(**requires: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, weight = random(N, C), random(VP, C, seed=1)
    targets = torch.arange(N) % 30
    return x.requires_grad_(requires.get("x", True)), weight.requires_grad_(requires.get("weight", True)), targets


@pytest.mark.parametrize(
    ("requires", "with_grad", "gemms"),
    [
        ({}, True, 3),
        ({"weight": False}, True, 2),
        ({"x": False}, True, 2),
        ({"x": False, "weight": False}, True, 1),
        ({}, False, 1),
    ],
)
def test_only_the_gemms_that_are_asked_for(requires, with_grad, gemms, monkeypatch):
    x, weight, targets = head(**requires)
    found = []
    for name in ("mm", "addmm"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, original=original, **k: found.append(1) or original(*a, **k))
    loss = linear_cross_entropy.linear_cross_entropy(x, weight, targets, 30, with_grad=with_grad)
    assert len(found) == gemms
    assert loss.requires_grad == (gemms > 1)
    if loss.requires_grad:
        loss.backward()
    assert len(found) == gemms, "nothing is recomputed in backward"
    monkeypatch.undo()
    with FlopCounterMode(display=False) as counter:
        counted = linear_cross_entropy.linear_cross_entropy(x, weight, targets, 30, with_grad=with_grad)
        if counted.requires_grad:
            counted.backward()
    assert counter.get_total_flops() == gemms * 2 * N * C * VP
    assert torch.equal(loss.detach(), counted.detach())


def test_no_gradient_gemms_without_grad_mode():
    x, weight, targets = head()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear_cross_entropy.linear_cross_entropy(x, weight, targets, 30)
    assert counter.get_total_flops() == 2 * N * C * VP


def test_the_upstream_gradient_is_not_rounded_to_the_compute_dtype():
    """1/3 in bf16 is 0.13 % off; a mean over tokens would carry that into every gradient."""
    x, weight, targets = head()
    weight32 = weight.detach().clone().requires_grad_()
    loss = linear_cross_entropy.linear_cross_entropy(x.detach().bfloat16(), weight32, targets, 30)
    (one,) = torch.autograd.grad(loss, weight32, retain_graph=True)
    (third,) = torch.autograd.grad(loss, weight32, torch.tensor(1 / 3))
    assert weight32.dtype == third.dtype == torch.float32
    torch.testing.assert_close(third * 3, one, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk", [24, 5])
def test_the_weights_gradient_is_never_rounded_to_the_compute_dtype(dtype, chunk):
    """It is the fp32 product of what the kernel wrote in 16 bits, summed over the chunks in fp32."""
    x, weight, targets = head()
    x = x.detach().to(dtype)
    loss = linear_cross_entropy.linear_cross_entropy(x, weight, targets, 30, chunk=chunk)
    (dweight,) = torch.autograd.grad(loss, weight)
    logits = torch.mm(x, weight.detach().to(dtype).t())
    cross_entropy.losses_and_gradient_in_place(logits, targets, torch.empty(N), 30, -100, 0.0, 0.0, 0.0)
    exact = logits.double().t() @ x.double()
    assert dweight.dtype == torch.float32
    torch.testing.assert_close(dweight.double(), exact, rtol=1e-5, atol=1e-6)
    assert (dweight.to(dtype).float() != dweight)[:30].float().mean() > 0.9


@pytest.mark.parametrize("chunk", [1, 7, 24, 1000])
def test_the_chunk_does_not_change_the_result(chunk):
    x, weight, targets = head()
    whole = linear_cross_entropy.linear_cross_entropy(x, weight, targets, 30)
    parts = linear_cross_entropy.linear_cross_entropy(x, weight, targets, 30, chunk=chunk)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-5)
    for a, b in zip(torch.autograd.grad(whole, (x, weight)), torch.autograd.grad(parts, (x, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_chunks_hold_their_bytes_and_are_even():
    rows = linear_cross_entropy.chunk_rows(16384, 50304, 2)
    assert rows % 128 == 0
    assert rows * 50304 * 2 <= linear_cross_entropy.CHUNK_BYTES + 128 * 50304 * 2
    assert -(-16384 // rows) == 4
    assert linear_cross_entropy.chunk_rows(0, 50304, 2) == 128


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("name", ops.OPS)
def test_reasons(name):
    backend = ops.OPS[name].load("triton")
    packages = {"triton": "3.6.0"}

    def reason(device, arch, dtype=torch.bfloat16, packages=packages, **rest):
        machine = Machine(device, arch, interpreted=rest.pop("interpreted", False), packages=packages)
        return backend.unsupported(Site(name, machine, dtype=dtype, **rest))

    assert reason("cuda", "sm_90") is None
    assert reason("cuda", "sm_100", shape={"D": 128, "C": 768}) is None
    assert reason("cpu", "x86_64", interpreted=True) is None
    assert "GPU" in reason("cpu", "x86_64")
    assert "8.0" in reason("cuda", "sm_75")
    assert "pip install triton" in reason("cuda", "sm_90", packages={})
    assert "float64" in reason("cuda", "sm_90", dtype=torch.float64)
    if name.startswith("attention"):
        assert "multiple of 8" in reason("cuda", "sm_90", shape={"D": 20})
