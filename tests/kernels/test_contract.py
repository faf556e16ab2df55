"""The contract over every backend this machine can run, and the contract itself: planted faults must turn it red."""

import contextlib
import ctypes
import dataclasses
import re
import types

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tritium.kernels import autograd, contract, ops
from tritium.kernels.autograd import differentiable
from tritium.kernels.case import Case
from tritium.kernels.op import Backend, Op
from tritium.kernels.site import Machine

FP32, BF16 = torch.float32, torch.bfloat16
# what a CPU can run without Triton's interpreter, by the facts and not by what backends say: no refusals here
RUNS = {
    "attention": {"sdpa", "sdpa_flash"},
    "adamw": {"torch_fused"},
}
# torch traces FlexAttention anew for every shape, a second each
SAMPLE = {("attention", "flex"): ("grouped", "more_queries", "documents_window_softcap")}


def small(op: Op, backend: str = "") -> list[Case]:
    names = SAMPLE.get((op.name, backend))
    return [c for c in op.cases.CASES if (not c.large if names is None else c.name in names)]


def discovered() -> list[tuple[str, str]]:
    return [(name, backend) for name, op in ops.OPS.items() for backend in op.backends()]


@pytest.mark.parametrize(("name", "backend"), discovered(), ids=lambda v: v)
def test_every_backend_keeps_the_contract_or_says_why_not(name, backend):
    op = ops.OPS[name]
    variants = ("plain",) if (name, backend) in SAMPLE else contract.VARIANTS
    reports = contract.check_all(op, backend, (FP32, BF16), cases=small(op, backend), variants=variants)
    assert not [str(r) for r in reports if r.status == "failed"]
    for report in reports:
        assert report.ok or (report.refused and len(report.reason) > 20), report
    if backend == "reference":
        assert all(r.ok for r in reports)
    if backend in RUNS.get(name, ()) or backend == "reference":
        assert {r.dtype for r in reports if r.ok} == {FP32, BF16}
        assert sum(r.ok for r in reports) > len(reports) / 2


@pytest.mark.parametrize("name", ops.OPS)
def test_other_seeds_keep_the_bounds_too(name):
    """The bounds must hold for any inputs: a bound that only some keep is a coin."""
    op = ops.OPS[name]
    for backend in ["reference", *RUNS.get(name, ())]:
        for seed in range(1, 4):
            reports = contract.check_all(op, backend, (FP32, BF16), seed=seed, cases=small(op)[seed::3])
            assert not [str(r) for r in reports if r.status == "failed"]


@pytest.mark.parametrize(
    ("name", "backend", "case"),
    [(n, "reference", -1) for n in ("rms_norm", "rope", "cross_entropy", "linear_cross_entropy", "swiglu", "adamw")]
    + [("attention", "sdpa", 8), ("attention", "sdpa_flash", 2), ("adamw", "torch_fused", 3)],
)
def test_compiled_full_graph_keeps_the_contract(name, backend, case):
    op = ops.OPS[name]
    report = contract.check(op, backend, small(op)[case], FP32, compiled="aot_eager")
    assert report.ok, report
    assert report.compiled


@pytest.mark.parametrize(("name", "backend"), [("attention", "sdpa_flash"), ("adamw", "torch_fused")])
def test_inductor_keeps_the_contract(name, backend):
    op = ops.OPS[name]
    report = contract.check(op, backend, small(op)[3], FP32, compiled=True)
    assert report.ok, report


def test_few_elements_have_wider_floors():
    def bounds(count: int) -> tuple[float, float]:
        exact = torch.ones(count, dtype=torch.float64)
        found = contract._compare(ops.relu2, "plain", "output", exact.float(), exact, exact.float(), FP32, 0.0)
        return found.max_bound, found.rms_bound

    few, many = bounds(contract.FEW), bounds(contract.FEW + 1)
    assert few == pytest.approx(tuple(contract.FEW_FACTOR * b for b in many))
    assert many == pytest.approx(tuple(f * contract.unit_roundoff(FP32) for f in contract.FLOORS[FP32]))


def test_equal_infinities_agree_and_lend_their_size_to_no_bound():
    """attention_lse gives -∞ for a query that sees no key."""
    exact = torch.tensor([-torch.inf, 2.0], dtype=torch.float64)

    def compared(*values: float) -> contract.Compared:
        got = torch.tensor(values)
        return contract._compare(ops.attention_lse, "plain", "output 1", got, exact, exact.float(), FP32, 2.0)

    assert compared(-torch.inf, 2.0).ok
    assert compared(-torch.inf, 2.0).max_error == 0.0
    assert compared(-torch.inf, 2.0).max_bound < 2e-5
    for values in ((-torch.inf, 2.01), (torch.inf, 2.0), (-1e38, 2.0), (torch.nan, 2.0), (-torch.inf, -torch.inf)):
        assert not compared(*values).ok


# ------------------------------------------------------------------------------------------------------- planted faults


def planted(function, **attributes) -> Backend:
    module = types.SimpleNamespace(**attributes)
    return Backend(function.__name__, "planted", function, module)


class Scaled(torch.autograd.Function):
    """Identity forward, the gradient times a factor backward."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


class Leaky(torch.autograd.Function):
    """Identity forward; the last gradient is what the allocation held."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        made = torch.empty_like(grad, memory_format=torch.contiguous_format)
        made.view(-1)[:-1] = grad.reshape(-1)[:-1]
        return made


class Rude(torch.autograd.Function):
    """Writes into the upstream gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.mul_(1.0) if grad.numel() < 2 else grad.copy_(grad.flip(0)).flip(0)


class Dense(torch.autograd.Function):
    """Reads the upstream gradient as if it were contiguous."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.as_strided(grad, grad.shape, torch.empty(grad.shape).stride(), grad.storage_offset()).clone()


def layer_norm(x, weight, bias=None, eps=1e-5):
    return ops.layer_norm.reference(x, weight, bias, eps)


def last_column_dropped(x, weight, bias=None, eps=1e-5):
    return F.pad(layer_norm(x, weight, bias, eps)[..., :-1], (0, 1))


def statistics_without_last_column(x, weight, bias=None, eps=1e-5):
    mean, var = x[..., :-1].mean(-1, keepdim=True), x[..., :-1].var(-1, unbiased=False, keepdim=True)
    y = (x - mean) * torch.rsqrt(var + eps) * weight
    return (y if bias is None else y + bias).to(x.dtype)


def unbiased(x, weight, bias=None, eps=1e-5):
    y = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + eps) * weight
    return (y if bias is None else y + bias).to(x.dtype)


def gradient_of_x_scaled(x, weight, bias=None, eps=1e-5):
    return layer_norm(Scaled.apply(x, 1.02), weight, bias, eps)


def gradient_of_weight_scaled(x, weight, bias=None, eps=1e-5):
    return layer_norm(x, Scaled.apply(weight, 1.02), bias, eps)


def gradient_of_bias_lost(x, weight, bias=None, eps=1e-5):
    return layer_norm(x, weight, None if bias is None else bias.detach(), eps)


def input_changed(x, weight, bias=None, eps=1e-5):
    y = layer_norm(x, weight, bias, eps)
    x.data.view(-1)[:1] += 0.5
    return y


def rounded_to_bf16(x, weight, bias=None, eps=1e-5):
    return layer_norm(x, weight, bias, eps).to(BF16).to(x.dtype)


def computed_in_bf16(x, weight, bias=None, eps=1e-5):
    return layer_norm(x.to(BF16), weight.to(BF16), None if bias is None else bias.to(BF16), eps).to(x.dtype)


def uninitialised_output(x, weight, bias=None, eps=1e-5):
    y = layer_norm(x, weight, bias, eps)
    made = torch.empty(y.shape, dtype=y.dtype)
    made.view(-1)[:-1] = y.detach().reshape(-1)[:-1]
    return y + (made - y.detach())


def uninitialised_gradient(x, weight, bias=None, eps=1e-5):
    return layer_norm(Leaky.apply(x), weight, bias, eps)


def gap_written(x, weight, bias=None, eps=1e-5):
    if not x.is_contiguous():  # a store past the end of a row
        offset = x.storage_offset() + (x.shape[-1] if x.stride(-1) == 1 else 1)
        torch.as_strided(x.detach(), (1,), (1,), offset).fill_(0)
    return layer_norm(x, weight, bias, eps)


def upstream_changed(x, weight, bias=None, eps=1e-5):
    return Rude.apply(layer_norm(x, weight, bias, eps))


def upstream_taken_as_contiguous(x, weight, bias=None, eps=1e-5):
    return Dense.apply(layer_norm(x, weight, bias, eps))


def input_taken_as_contiguous(x, weight, bias=None, eps=1e-5):
    return layer_norm(
        torch.as_strided(x, x.shape, torch.empty(x.shape).stride(), x.storage_offset()), weight, bias, eps
    )


def eps_outside_root(x, weight, bias=None, eps=1e-5):
    y = (x - x.mean(-1, keepdim=True)) / (x.std(-1, unbiased=False, keepdim=True) + eps) * weight
    return (y if bias is None else y + bias).to(x.dtype)


def other_dtype(x, weight, bias=None, eps=1e-5):
    return layer_norm(x, weight, bias, eps).to(torch.float64)


def other_shape(x, weight, bias=None, eps=1e-5):
    return layer_norm(x, weight, bias, eps)[None]


def a_tuple(x, weight, bias=None, eps=1e-5):
    return layer_norm(x, weight, bias, eps), x


def nothing(x, weight, bias=None, eps=1e-5):
    return None


def raises(x, weight, bias=None, eps=1e-5):
    raise RuntimeError("no such launch")


def no_gradient(x, weight, bias=None, eps=1e-5):
    return layer_norm(x, weight, bias, eps).detach()


def grad_mode_only(x, weight, bias=None, eps=1e-5):
    return layer_norm(x, weight, bias, eps) * (1.0 if torch.is_grad_enabled() else 1.01)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (last_column_dropped, "plain output"),
        (statistics_without_last_column, "plain output"),
        (unbiased, "plain output"),
        (gradient_of_x_scaled, "gradient of x"),
        (gradient_of_weight_scaled, "gradient of weight"),
        (gradient_of_bias_lost, "no output requires grad although bias does.*plain gradient of bias"),
        (input_changed, "changes its argument x"),
        (gap_written, "changes its argument x, or the memory between its elements"),
        (uninitialised_output, r"plain output: max error nan"),
        (uninitialised_gradient, r"plain gradient of x: max error nan"),
        (upstream_changed, "changes the upstream gradient of output 0"),
        (upstream_taken_as_contiguous, "gradient of x|as_strided|out of bounds"),
        (input_taken_as_contiguous, "strided"),
        (other_dtype, r"is torch.float64 on cpu where the reference gives"),
        (other_shape, r"returns shapes \[\(1, 7, 33\)\] where the reference returns \[\(7, 33\)\]"),
        (a_tuple, "returns shapes"),
        (nothing, "returns NoneType; an op returns tensors"),
        (raises, r"raised RuntimeError: no such launch"),
        (no_gradient, "no output requires grad although x, weight, bias does"),
        (grad_mode_only, "no_grad output"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_planted_fault_turns_layer_norm_red(fault, words, dtype):
    case = next(c for c in ops.layer_norm.cases.CASES if c.name == "odd")
    report = contract.check(ops.layer_norm, planted(fault), case, dtype)
    assert report.status == "failed"
    assert re.search(words, report.reason), report.reason


@pytest.mark.parametrize(
    ("fault", "case"), [(rounded_to_bf16, "odd"), (computed_in_bf16, "odd"), (eps_outside_root, "large_eps")]
)
def test_lost_precision_turns_fp32_red(fault, case):
    case = next(c for c in ops.layer_norm.cases.CASES if c.name == case)
    assert contract.check(ops.layer_norm, planted(fault), case, FP32).status == "failed"


def test_what_is_right_is_green():
    for case in small(ops.layer_norm):
        for dtype in (FP32, BF16):
            report = contract.check(ops.layer_norm, planted(layer_norm, DETERMINISTIC=True), case, dtype)
            assert report.ok, report


def test_a_claim_of_determinism_is_held_to_the_bit():
    def noisy(x, weight, bias=None, eps=1e-5):
        return layer_norm(x, weight, bias, eps) * (1 + 1e-7 * torch.randint(0, 2, ()).float())

    case = small(ops.layer_norm)[3]
    torch.manual_seed(0)
    results = [contract.check(ops.layer_norm, planted(noisy, DETERMINISTIC=True), case, FP32) for _ in range(8)]
    assert any("says DETERMINISTIC = True" in r.reason for r in results)
    assert contract.check(ops.layer_norm, planted(noisy), case, FP32).ok  # no claim, and within the bound


KEPT: dict[object, torch.Tensor] = {}


def kept(value: torch.Tensor) -> torch.Tensor:
    """A copy of ``value`` in the one place there is for tensors of its shape and dtype."""
    return KEPT.setdefault((value.shape, value.dtype), torch.empty(value.shape, dtype=value.dtype)).copy_(value)


class SavesInOnePlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.kept = kept(x.detach())
        return x.clamp(min=0).square()

    @staticmethod
    def backward(ctx, dy):
        return 2 * ctx.kept.clamp(min=0) * dy


class SavesForAutogradInOnePlace(torch.autograd.Function):
    """Whose memory autograd sees to: it raises where a saved tensor has changed."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(kept(x.detach()))
        return x.clamp(min=0).square()

    @staticmethod
    def backward(ctx, dy):
        return 2 * ctx.saved_tensors[0].clamp(min=0) * dy


class ReturnsOnePlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return kept(x.detach().clamp(min=0).square())

    @staticmethod
    def backward(ctx, dy):
        return 2 * ctx.saved_tensors[0].clamp(min=0) * dy


@pytest.mark.parametrize("fault", [SavesInOnePlace, SavesForAutogradInOnePlace, ReturnsOnePlace])
def test_memory_that_two_calls_share_turns_red(fault):
    """In a model of two layers the second call comes before the first one's backward."""
    case = next(c for c in small(ops.relu2) if c.name == "odd")
    report = contract.check(ops.relu2, planted(lambda x: fault.apply(x)), case, FP32)
    assert "another call between this one's forward and backward" in report.reason, report


def test_a_fault_of_strides_is_blamed_on_no_other_call():
    case = next(c for c in small(ops.layer_norm) if c.name == "odd")
    report = contract.check(ops.layer_norm, planted(input_taken_as_contiguous), case, FP32)
    assert report.status == "failed"
    assert "another call" not in report.reason


FAKES = {  # of a result like x: what is told of it where it is a lie
    "dtype": lambda x: (x.new_empty(x.shape, dtype=torch.float64),),
    "strides": lambda x: (x.new_empty(x.shape[::-1]).t(),),
    "strides of x": lambda x: (torch.empty_like(x),),
    "truth": lambda x: (x.new_empty(x.shape),),
}


@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("told", FAKES)
def test_a_fake_that_lies_turns_compiled_red(told, place):
    def forward(x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x.contiguous().clamp(min=0).square(),)

    def backward(dy: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (2 * (x.clamp(min=0) * dy).contiguous(),)

    fakes = {"forward": FAKES["truth"], "backward": lambda dy, x: FAKES["truth"](x)}
    fakes[place] = FAKES[told] if place == "forward" else lambda dy, x: FAKES[told](x)
    name = f"relu2_fake_{place}_{told.replace(' ', '_')}"
    relu2 = differentiable(
        name, forward=forward, backward=backward, fake_forward=fakes["forward"], fake_backward=fakes["backward"],
        save=lambda args, results: (args[0],), gradients=(0,),
    )  # fmt: skip
    case = next(c for c in small(ops.relu2) if c.name == "odd")
    assert contract.check(ops.relu2, planted(lambda x: relu2(x)), case, FP32).ok
    report = contract.check(ops.relu2, planted(lambda x: relu2(x)), case, FP32, compiled="aot_eager")
    assert report.ok == (told == "truth"), report
    if told != "truth":
        assert re.search(rf"the fake of tritium\.{name}(_backward)?\.default says torch.float", report.reason), report


def test_a_graph_break_turns_compiled_red():
    def broken(x, weight, bias=None, eps=1e-5):
        return layer_norm(x, weight, bias, eps) * (2.0 if x.sum().item() > 1e30 else 1.0)

    case = small(ops.layer_norm)[3]
    assert contract.check(ops.layer_norm, planted(broken), case, FP32).ok
    report = contract.check(ops.layer_norm, planted(broken), case, FP32, compiled="aot_eager")
    assert report.status == "failed"
    assert "raised" in report.reason


# (what is wrong, op, fault); each must be red on at least one small case in either dtype
def _attention_faults():
    reference = ops.attention.reference

    def keys_dropped(q, k, v, seq_start=None, **o):
        return reference(q, k[:, :-1], v[:, :-1], seq_start, **{**o, "causal": False})

    def top_left(q, k, v, seq_start=None, **o):
        if not o.get("causal", True) or q.shape[1] == k.shape[1]:
            return reference(q, k, v, seq_start, **o)
        T = q.shape[1]
        return reference(q, k[:, :T], v[:, :T], seq_start, **o)

    def wrong_group(q, k, v, seq_start=None, **o):
        R = q.shape[2] // k.shape[2]
        return reference(q, k.repeat(1, 1, R, 1), v.repeat(1, 1, R, 1), seq_start, **o)

    def no_rescale(q, k, v, seq_start=None, **o):  # the online softmax forgets to rescale what it has
        half = k.shape[1] // 2
        if q.shape[1] != k.shape[1] or half == 0 or seq_start is not None or o:
            return reference(q, k, v, seq_start, **o)
        R = q.shape[2] // k.shape[2]
        s = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(R, 2)) * q.shape[-1] ** -0.5
        s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -1e30)
        first, second = s[..., :half], s[..., half:]
        m1 = first.max(-1, keepdim=True).values
        m2 = torch.maximum(m1, second.max(-1, keepdim=True).values)
        p = torch.cat([(first - m1).exp(), (second - m2).exp()], -1)
        return torch.einsum("bhij,bjhd->bihd", p / p.sum(-1, keepdim=True), v.repeat_interleave(R, 2)).to(q.dtype)

    def documents_ignored(q, k, v, seq_start=None, **o):
        return reference(q, k, v, None, **o)

    def window_off_by_one(q, k, v, seq_start=None, **o):
        return reference(q, k, v, seq_start, **{**o, "window": o.get("window", 0) + bool(o.get("window"))})

    def softcap_ignored(q, k, v, seq_start=None, **o):
        return reference(q, k, v, seq_start, **{**o, "softcap": 0.0})

    def scale_ignored(q, k, v, seq_start=None, **o):
        return reference(q, k, v, seq_start, **{**o, "scale": None})

    def another_mask(q, k, v, seq_start=None, seed=None, **o):
        return reference(q, k, v, seq_start, seed=None if seed is None else seed + 1, **o)

    def blind_rows_average(q, k, v, seq_start=None, **o):
        y = reference(q, k, v, seq_start, **o)
        rows = max(q.shape[1] - k.shape[1], 0) if o.get("causal", True) else 0
        return torch.cat([y[:, :rows] + v.mean(), y[:, rows:]], 1)

    def gradient_of_k_scaled(q, k, v, seq_start=None, **o):
        return reference(q, Scaled.apply(k, 1.02), v, seq_start, **o)

    return [f for n, f in locals().items() if isinstance(f, types.FunctionType) and n != "reference"]


def _cross_entropy_faults():
    reference = ops.cross_entropy.reference

    def padding_counted(logits, targets, vocab_size, *a, **o):
        return reference(logits, targets, logits.shape[1], *a, **o)

    def last_class_dropped(logits, targets, vocab_size, *a, **o):
        return reference(logits, targets.clamp(max=max(vocab_size - 2, 0)), max(vocab_size - 1, 1), *a, **o)

    def padding_gradient(logits, targets, vocab_size, *a, **o):
        return reference(logits, targets, vocab_size, *a, **o) + 1e-9 * logits[:, vocab_size:].sum(-1)

    def ignored_counted(logits, targets, vocab_size, ignore_index=-100, *a, **o):
        return reference(logits, targets.clamp(min=0), vocab_size, -12345, *a, **o)

    def z_loss_ignored(logits, targets, vocab_size, *a, **o):
        return reference(logits, targets, vocab_size, *a, **{**o, "z_loss": 0.0})

    def smoothing_over_padding(logits, targets, vocab_size, *a, **o):
        e = o.get("label_smoothing", 0.0) * vocab_size / logits.shape[1]
        return reference(logits, targets, vocab_size, *a, **{**o, "label_smoothing": e})

    def softcap_gradient_lost(logits, targets, vocab_size, *a, **o):
        c = o.get("softcap", 0.0)
        capped = logits + (c * torch.tanh(logits / c) - logits).detach() if c else logits
        return reference(capped, targets, vocab_size, *a, **{**o, "softcap": 0.0})

    def no_maximum(logits, targets, vocab_size, *a, **o):
        z = logits[:, :vocab_size].float()
        lse = z.exp().sum(-1).log()
        return reference(logits, targets, vocab_size, *a, **o) + (lse - torch.logsumexp(z, -1)).nan_to_num(posinf=1.0)

    return [f for n, f in locals().items() if isinstance(f, types.FunctionType) and n != "reference"]


def _other_faults():
    def rms_norm(x, weight=None, eps=1e-5):
        return ops.rms_norm.reference(x, weight, eps * 2)

    def relu2(x):
        return F.leaky_relu(x, 1e-3).square()

    def gelu(x, approximate="tanh"):
        return x * torch.sigmoid(1.702 * x)

    def swiglu(gate, up):
        return F.silu(up) * gate

    def rope(q, k, cos, sin):
        return ops.rope.reference(q, k, cos, -sin)

    def embedding(ids, weight):  # a gradient where no id points
        return F.embedding(ids, weight) + 1e-9 * weight.sum()

    def linear(x, weight, bias=None):
        return F.linear(x, weight)

    def add_layer_norm(x, residual, weight, bias=None, eps=1e-5):
        y, s = ops.add_layer_norm.reference(x, residual, weight, bias, eps)
        return y, s.detach() + 0 * x  # the gradient that arrives along the residual is lost

    def linear_cross_entropy(x, weight, targets, vocab_size, *a, chunk=0, **o):
        return ops.linear_cross_entropy.reference(Scaled.apply(x, 1.02), weight, targets, vocab_size, *a, **o)

    return list(locals().items())


FAULTS = (
    [("attention", f) for f in _attention_faults()]
    + [("cross_entropy", f) for f in _cross_entropy_faults()]
    + _other_faults()
)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=[f"{n}-{f.__name__}" for n, f in FAULTS])
def test_a_planted_fault_turns_its_op_red(name, fault, dtype):
    op = ops.OPS[name]
    red = []
    for case in small(op):
        report = contract.check(op, planted(fault), case, dtype, variants=("plain",))
        if report.status == "failed":
            red.append(report)
            break
    assert red


# --------------------------------------------------------------------------------------------- watched, as a GPU's host


class Reads(RuntimeError):
    """What a watcher raises."""


@contextlib.contextmanager
def no_reads():
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default:
                raise Reads("the host reads")
            return function(*args, **(kwargs or {}))

    with Watch():
        yield


class ReadsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return dy + 0 * dy.isnan().sum().item()


def reads_forward(x, *a, **o):
    return ops.gelu.reference(x + 0 * x.detach().isnan().sum().item(), *a, **o)


def reads_backward(x, *a, **o):
    return ops.gelu.reference(ReadsInBackward.apply(x), *a, **o)


@pytest.mark.parametrize("fault", [reads_forward, reads_backward])
def test_a_watched_backend_whose_host_reads_is_red(fault):
    def gelu(x, approximate="tanh"):
        return fault(x, approximate)

    case = small(ops.gelu)[3]
    assert contract.check(ops.gelu, planted(gelu), case).ok
    report = contract.check(ops.gelu, planted(gelu), case, watch=no_reads)
    assert report.status == "failed" and "raised Reads: the host reads" in report.reason
    (report,) = contract.check_all(ops.gelu, planted(gelu), (FP32,), cases=[case], watch=no_reads)
    assert report.status == "failed"
    alone = planted(gelu, unsupported=lambda site: None if site.device == "cpu" else "for CPUs; choose reference")
    assert contract.check(ops.gelu, alone, case, watch=no_reads).ok, "for CPUs alone: its host reads what is its own"
    assert contract.check(ops.gelu, "reference", case, watch=no_reads).ok


class WritesBeyond(torch.autograd.Function):
    """relu2 that sets four bytes to 0 beside what it allocates, forward or backward."""

    @staticmethod
    def allocate(values, offset):
        made = torch.empty_like(values).copy_(values)
        if offset is not None:
            ctypes.memset(made.data_ptr() + (made.nbytes if offset == "after" else -4), 0, 4)
        return made

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.save_for_backward(x)
        ctx.offset = backward
        return WritesBeyond.allocate(x.clamp(min=0).square(), forward)

    @staticmethod
    def backward(ctx, dy):
        return WritesBeyond.allocate(2 * ctx.saved_tensors[0].clamp(min=0) * dy, ctx.offset), None, None


@pytest.mark.parametrize(
    ("forward", "backward"), [("after", None), ("before", None), (None, "after"), (None, "before"), (None, None)]
)
def test_a_write_outside_what_was_allocated_is_red(forward, backward):
    case = next(c for c in small(ops.relu2) if c.name == "odd")
    fault = planted(lambda x: WritesBeyond.apply(x, forward, backward))
    report = contract.check(ops.relu2, fault, case, FP32, watch=contextlib.nullcontext)
    where = forward or backward
    assert report.ok if where is None else f"writes {where} the memory of a tensor" in report.reason, report
    assert autograd.watching == 0


def test_a_watched_update_whose_host_reads_is_red():
    case = small(ops.adamw)[3]
    reads = planted(adamw_but(skip=lambda a: torch.tensor(float(a["skip"].item()))))
    assert contract.check(ops.adamw, reads, case).ok
    assert "raised Reads" in contract.check(ops.adamw, reads, case, watch=no_reads).reason
    assert contract.check(ops.adamw, "reference", case, watch=no_reads).ok


# ----------------------------------------------------------------------------------------------------------- update ops


def adamw_but(**changes):
    """The reference's update with some arguments replaced by functions of all of them."""

    def adamw(params, copies, grads, exp_avgs, exp_avg_sqs, lr, step, grad_scale, skip, **options):
        arguments = dict(
            params=params, copies=copies, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, lr=lr, step=step,
            grad_scale=grad_scale, skip=skip, **options,
        )  # fmt: skip
        ops.adamw.reference(**{**arguments, **{n: f(arguments) for n, f in changes.items()}})

    return adamw


UPDATE_FAULTS = {
    "skip ignored": adamw_but(skip=lambda a: torch.zeros(())),
    "always skipped": adamw_but(skip=lambda a: torch.ones(())),
    "only skip = 1": adamw_but(skip=lambda a: (a["skip"] == 1).float()),
    "scale ignored": adamw_but(grad_scale=lambda a: torch.ones(())),
    "step off by one": adamw_but(step=lambda a: a["step"] + 1),
    "copies stale": adamw_but(copies=lambda a: []),
    "betas swapped": adamw_but(beta1=lambda a: a.get("beta2", 0.95), beta2=lambda a: a.get("beta1", 0.9)),
    "decay lost": adamw_but(weight_decay=lambda a: 0.0),
    "decay coupled": adamw_but(
        grads=lambda a: [
            g + a.get("weight_decay", 0.0) * p.to(g.dtype) for g, p in zip(a["grads"], a["params"], strict=True)
        ],
        weight_decay=lambda a: 0.0,
    ),
    "eps lost": adamw_but(eps=lambda a: 0.1),
    "moment not kept": adamw_but(exp_avgs=lambda a: [m.clone() for m in a["exp_avgs"]]),
    "gradient changed": adamw_but(grads=lambda a: [g.mul_(0.5) for g in a["grads"]]),
    "learning rate changed": adamw_but(lr=lambda a: a["lr"].mul_(1.0).add_(1e-6)),
    "last element dropped": adamw_but(
        grads=lambda a: [
            torch.where(torch.arange(g.numel()).reshape(g.shape) == g.numel() - 1, 0, g) for g in a["grads"]
        ]
    ),
}


@pytest.mark.parametrize("fault", UPDATE_FAULTS)
def test_a_planted_fault_turns_the_update_red(fault):
    reports = [contract.check(ops.adamw, planted(UPDATE_FAULTS[fault]), case, BF16) for case in small(ops.adamw)]
    assert [r for r in reports if r.status == "failed"]
    if fault in ("gradient changed", "learning rate changed"):
        assert any("which it only reads" in r.reason for r in reports)


def test_a_right_update_is_green_and_a_result_is_not_allowed():
    for case in small(ops.adamw):
        report = contract.check(ops.adamw, planted(adamw_but(), DETERMINISTIC=True), case, BF16)
        assert report.ok, report

    def returns(params, copies, grads, exp_avgs, exp_avg_sqs, *rest, **options):
        ops.adamw.reference(params, copies, grads, exp_avgs, exp_avg_sqs, *rest, **options)
        return params

    assert "an update op returns None" in contract.check(ops.adamw, planted(returns), small(ops.adamw)[3], FP32).reason


# -------------------------------------------------------------------------------------------------------------- reports


def test_a_refused_case_is_never_passed():
    case = small(ops.layer_norm)[3]
    backend = planted(
        layer_norm, unsupported=lambda site: f"C={site.shape['C']} is not a multiple of 8; choose reference"
    )
    report = contract.check(ops.layer_norm, backend, case, FP32)
    assert (report.ok, report.refused, report.status) == (False, True, "refused")
    assert report.reason == "C=33 is not a multiple of 8; choose reference"
    assert "C=33 is not a multiple of 8" in str(report)


def test_the_site_a_backend_judges_is_the_cases():
    seen = []
    case = Case("mine", {"N": 2, "C": 8}, {"bias": False})
    backend = planted(layer_norm, unsupported=lambda site: seen.append(site))
    machine = Machine("cuda", "sm_90", packages={})
    contract.check(ops.layer_norm, backend, case, BF16, compiled="aot_eager", machine=machine)
    (site,) = seen
    assert (site.op, site.dtype, site.phase, site.compiled) == ("layer_norm", BF16, "train", True)
    assert (site.machine, site.shape, site.options) == (machine, {"N": 2, "C": 8}, {"bias": False})


def test_a_case_refused_for_training_is_tried_forward_only():
    backend = planted(
        layer_norm, unsupported=lambda site: "no backward here; choose reference" if site.needs_grad else None
    )
    reports = contract.check_all(ops.layer_norm, backend, (FP32,), cases=small(ops.layer_norm)[:3])
    assert [(r.phase, r.status) for r in reports] == [("train", "refused"), ("eval", "passed")] * 3
    wrong = planted(last_column_dropped, unsupported=backend.module.unsupported)
    reports = contract.check_all(ops.layer_norm, wrong, (FP32,), cases=small(ops.layer_norm)[3:4])
    assert [(r.phase, r.status) for r in reports] == [("train", "refused"), ("eval", "failed")]


def test_prepare_is_run_on_seq_start():
    def attention(q, k, v, seq_start=None, **options):
        assert seq_start is None or isinstance(seq_start, tuple)
        return ops.attention.reference(q, k, v, seq_start[0] if seq_start else None, **options)

    cases = [c for c in small(ops.attention) if c.name in ("documents", "tiny")]
    for case in cases:
        assert contract.check(ops.attention, planted(attention, prepare=lambda s: (s,)), case, FP32).ok
    assert contract.check(ops.attention, planted(attention), cases[1], FP32).status == "failed"


def test_reports_read_well():
    cases = small(ops.layer_norm)[3:5]
    refusing = planted(
        layer_norm, unsupported=lambda site: None if site.option("bias", True) else "needs a bias; set one"
    )
    reports = contract.check_all(ops.layer_norm, refusing, (FP32,), cases=cases)
    reports += contract.check_all(
        ops.layer_norm, dataclasses.replace(planted(unbiased), name="wrong"), (FP32,), cases=cases
    )
    text = contract.format_reports(reports)
    assert "failed  layer_norm.wrong  odd  float32 cpu train eager: plain output: max error" in text
    assert "refused layer_norm.planted  1 of 3 cases (no_bias): needs a bias; set one" in text or "1 of" in text
    assert "passed  layer_norm.planted  1 cases, worst 0." in text
    assert "passed  layer_norm.wrong  0 cases" in text


def test_checking_leaves_torchs_settings_as_they_were():
    def settings() -> tuple:
        fill = torch.utils.deterministic.fill_uninitialized_memory
        return torch.are_deterministic_algorithms_enabled(), fill, torch.get_float32_matmul_precision()

    before = settings()
    contract.check(ops.layer_norm, planted(raises), small(ops.layer_norm)[3], FP32)
    contract.check(ops.layer_norm, "reference", small(ops.layer_norm)[3], FP32)
    assert settings() == before


def test_inputs_with_gaps_and_their_copies_hold_nan_between_the_values():
    x = torch.arange(12.0).reshape(3, 4).requires_grad_()
    for kind in range(3):
        view = contract._strided(x, kind)
        assert torch.equal(view, x)
        assert view.requires_grad
        assert not view.is_contiguous()
        leaf = contract._leaf(view)
        assert leaf.stride() == view.stride()
        assert leaf.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()
        assert contract._same_bits(leaf, view)


def test_same_bits_tells_nan_apart_from_numbers_and_minus_zero_from_zero():
    nan = torch.tensor([float("nan"), 1.0])
    assert contract._same_bits(nan, nan.clone())
    assert not contract._same_bits(nan, torch.tensor([0.0, 1.0]))
    assert not contract._same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert contract._same_bits([nan, [torch.tensor([1])]], [nan.clone(), [torch.tensor([1])]])
    assert not contract._same_bits([nan], [nan, nan])
