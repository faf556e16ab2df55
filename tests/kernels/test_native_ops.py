"""What the native ops do beyond the contract: hostile values, bad arguments, memory, precision of their own design."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tritium.kernels import ops
from tritium.kernels.cross_entropy import impl_native as native_cross_entropy
from tritium.kernels.linear_cross_entropy import impl_native as native_linear

layer_norm = ops.layer_norm.load("native").function
cross_entropy = ops.cross_entropy.load("native").function
linear_cross_entropy = ops.linear_cross_entropy.load("native").function
adamw = ops.adamw.load("native").function
global_norm = ops.global_norm.load("native").function
gelu = ops.gelu.load("native").function


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slope(function, x: Tensor, direction: Tensor, h: float = 1e-2) -> float:
    """The directional derivative of a scalar function by central differences of fourth order."""
    with torch.no_grad():
        f = [function(x + k * h * direction).double().item() for k in (-2, -1, 1, 2)]
    return (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * h)


# ------------------------------------------------------------------------------------------------------------
# layer_norm


def test_layer_norm_gradients_are_the_slopes_of_its_own_forward():
    x, weight, bias, upstream = random(6, 19), random(19, seed=1), random(19, seed=2), random(6, 19, seed=3)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    grads = torch.autograd.grad(layer_norm(*leaves), leaves, upstream)
    for i, grad in enumerate(grads):
        direction = random(*grad.shape, seed=9 + i)

        def along(value, i=i):
            arguments = [x, weight, bias]
            arguments[i] = value
            return (layer_norm(*arguments).double() * upstream).sum()

        assert (grad * direction).sum().item() == pytest.approx(slope(along, [x, weight, bias][i], direction), rel=2e-3)


def test_layer_norm_keeps_its_variance_far_from_zero():
    x = random(4, 512) + 3000.0
    exact = torch.nn.functional.layer_norm(x.double(), (512,))
    # E[x²] - mean² in fp32 would be wrong in the first digit here
    assert (layer_norm(x, torch.ones(512)).double() - exact).abs().max() < 2e-3


def test_layer_norm_shows_nan_in_its_row_only():
    x = random(5, 40)
    x[2, 7] = torch.nan
    y = layer_norm(x, torch.ones(40), torch.zeros(40))
    assert y.isnan().any(1).tolist() == [False, False, True, False, False]
    assert y[2].isnan().all()


def test_layer_norm_of_a_constant_row_is_its_bias():
    bias = random(33)
    assert torch.equal(layer_norm(torch.full((2, 33), 7.0), random(33, seed=1), bias), bias.expand(2, 33))


LAYOUTS = {
    "every second row": lambda t: torch.stack([t, -t], 1).flatten(0, 1)[::2],
    "a slice of columns": lambda t: torch.cat([-t, t, -t], 1)[:, t.shape[1] : 2 * t.shape[1]],
    "transposed": lambda t: t.t().contiguous().t(),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("which", ["x", "upstream"])
def test_the_layout_of_an_argument_changes_no_bit(which, layout):
    x, weight, upstream, targets = random(6, 10), random(10), random(6, 10, seed=1), torch.arange(6)

    def results(x: Tensor, upstream: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        y, losses = layer_norm(x, weight), cross_entropy(x, targets, 9)
        return [y, losses, *torch.autograd.grad((y, losses), x, (upstream, upstream[:, 3]))]

    changed = {"x": x, "upstream": upstream} | {which: layout({"x": x, "upstream": upstream}[which])}
    assert not changed[which].is_contiguous() and torch.equal(changed[which], {"x": x, "upstream": upstream}[which])
    for a, b in zip(results(x, upstream), results(**changed), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.ones(5)}, ValueError, r"weight of shape \(8,\), the width of x; it is \(5,\)"),
        ({"bias": torch.ones(1, 8)}, ValueError, r"bias of shape \(8,\), the width of x; it is \(1, 8\)"),
        ({"x": torch.ones(2, 8).double()}, TypeError, "x is torch.float64 on cpu; choose reference"),
        ({"bias": torch.ones(8).half()}, TypeError, "bias is torch.float16"),
    ],
)
def test_layer_norm_refuses_what_it_would_misread(change, error, message):
    arguments = {"x": torch.ones(2, 8), "weight": torch.ones(8), "bias": torch.ones(8)} | change
    with pytest.raises(error, match=message):
        layer_norm(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_takes_weight_and_bias_of_different_dtypes(dtype):
    x, weight, bias = random(9, 24).to(dtype), random(24, seed=1), random(24, seed=2).bfloat16().requires_grad_()
    weight.requires_grad_()
    y = layer_norm(x, weight, bias)
    exact = torch.nn.functional.layer_norm(x.double(), (24,), weight.double(), bias.double())
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.02)
    y.sum().backward()
    assert bias.grad.dtype == torch.bfloat16 and torch.equal(bias.grad, torch.full((24,), 9.0).bfloat16())


# ----------------------------------------------------------------------------------------------------------
# cross_entropy


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.3, "z_loss": 1e-2}, {"softcap": 3.0}], ids=["plain", "regular", "softcap"]
)
def test_cross_entropy_gradients_are_the_slopes_of_its_own_forward(options):
    logits, targets, upstream = 2.0 * random(7, 45), torch.arange(7) * 6, random(7, seed=1)
    leaf = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(cross_entropy(leaf, targets, 43, **options), leaf, upstream)
    direction = random(7, 45, seed=2)
    along = lambda z: (cross_entropy(z, targets, 43, **options).double() * upstream).sum()  # noqa: E731
    assert (grad * direction).sum().item() == pytest.approx(slope(along, logits, direction), rel=2e-3)
    assert torch.equal(grad[:, 43:], torch.zeros(7, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 1023, 1024, 2047, 2999])
def test_cross_entropy_finds_the_largest_logit_wherever_it_is(place, dtype):
    logits = torch.zeros(2, 3008, dtype=dtype)
    logits[:, place], logits[:, 3000:] = 60.0, 200.0
    losses = cross_entropy(logits, torch.tensor([place, (place + 1) % 3000]), 3000)
    assert losses.tolist() == pytest.approx([0.0, 60.0], abs=1e-5)


def test_cross_entropy_with_impossible_tokens():
    """Logits of -inf, whole blocks of them included: finite loss, no gradient for them."""
    logits = random(3, 4000)
    logits[:, :2500] = -torch.inf
    logits[:, 3000::2] = -torch.inf
    targets = torch.tensor([2600, 2999, 3001])
    leaf = logits.clone().requires_grad_()
    losses = cross_entropy(leaf, targets, 4000)
    losses.sum().backward()
    reference = ops.cross_entropy.reference(logits.double(), targets, 4000)
    torch.testing.assert_close(losses.double(), reference, rtol=1e-6, atol=0)
    assert torch.equal(leaf.grad == 0, logits == -torch.inf)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_cross_entropy_shows_a_diverged_row_and_no_other(value):
    logits = random(3, 1500)
    logits[1, 1200] = value
    leaf = logits.clone().requires_grad_()
    losses = cross_entropy(leaf, torch.tensor([5, 5, 5]), 1500)
    losses.sum().backward()
    assert losses.isfinite().tolist() == [True, False, True]
    assert leaf.grad.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_in_place_is_forward_and_backward(dtype):
    logits, targets = random(9, 1100).to(dtype), torch.arange(9) * 100
    targets[4] = -7
    options = (1090, -7, 0.1, 1e-3, 12.0)
    leaf = logits.clone().requires_grad_()
    losses = cross_entropy(leaf, targets, *options)
    losses.sum().backward()
    found = native_cross_entropy.losses_in_place(logits, targets, options)
    assert torch.equal(found, losses)
    assert torch.equal(logits, leaf.grad)


@pytest.mark.parametrize("target", [-1, 50, 2**40, -(2**40)])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_target_that_is_no_token_is_named_and_never_read(target, backward):
    targets = torch.tensor([3, 49, target, 2])
    message = rf"token id in \[0, 50\) or ignore_index -100; row 2 has {target}, .*tokenizer"
    if backward:  # the targets were changed between the two
        leaf = random(4, 64).requires_grad_()
        good = torch.tensor([3, 49, 0, 2])
        losses = cross_entropy(leaf, good, 50)
        good.data[2] = target
        with pytest.raises(ValueError, match=message):
            losses.sum().backward()
    else:
        with pytest.raises(ValueError, match=message):
            cross_entropy(random(4, 64), targets, 50)
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(random(4, 8), random(64, 8), targets, 50, chunk=2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.ones(2, 3, 4)}, ValueError, r"logits \(N, V\) and targets \(N,\); got \(2, 3, 4\)"),
        ({"targets": torch.ones(5, dtype=torch.long)}, ValueError, r"got \(4, 6\) and \(5,\)"),
        ({"targets": torch.ones(4)}, TypeError, "integer targets"),
        ({"vocab_size": 7}, ValueError, "between 1 and the 6 columns of the logits, it is 7"),
        ({"vocab_size": 0}, ValueError, "it is 0"),
        ({"logits": torch.ones(4, 6).double()}, TypeError, "the logits are torch.float64 on cpu; choose reference"),
    ],
)
def test_cross_entropy_refuses_what_it_would_misread(change, error, message):
    arguments = {"logits": torch.ones(4, 6), "targets": torch.ones(4, dtype=torch.long), "vocab_size": 6} | change
    with pytest.raises(error, match=message):
        cross_entropy(**arguments)


# ----------------------------------------------------------------------------------------------------
# linear_cross_entropy


class Largest(TorchDispatchMode):
    """The most elements any tensor made inside the block has."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def test_linear_cross_entropy_never_holds_all_logits():
    x, weight, targets = random(256, 8), random(96, 8), torch.arange(256) % 90
    largest = {}
    for chunk in (0, 16):
        with Largest() as mode:
            native_linear._launch_forward(x, weight, targets, 90, -100, 0.0, 0.0, 0.0, chunk, True)
        largest[chunk] = mode.numel
    assert largest == {0: 256 * 96, 16: 256 * 8}  # all logits; dx, which is larger than a chunk of them


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_cross_entropy_does_not_depend_on_the_chunk(dtype):
    x, weight, targets = random(50, 16).to(dtype), random(40, 16, seed=1), torch.arange(50) % 33
    targets[7] = -100
    results = []
    for chunk in (0, 50, 49, 7, 1):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy(*leaves, targets, 33, chunk=chunk)
        results.append([loss, *torch.autograd.grad(2.0 * loss, leaves)])
    assert results[0][2].dtype == torch.float32
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            scale = b.abs().max().item()
            torch.testing.assert_close(a, b, rtol=0, atol=scale * (1e-6 if dtype == torch.float32 else 8e-3))


def test_linear_cross_entropy_of_no_rows():
    x, weight = torch.empty(0, 4).requires_grad_(), random(6, 4).requires_grad_()
    loss = linear_cross_entropy(x, weight, torch.empty(0, dtype=torch.long), 6)
    loss.backward()
    assert loss.item() == 0 and torch.equal(weight.grad, torch.zeros(6, 4)) and x.grad.shape == (0, 4)


@pytest.mark.parametrize(("with_grad", "gemms"), [(True, 3), (False, 1)])
def test_linear_cross_entropy_pays_gradient_gemms_only_when_asked(with_grad, gemms):
    x, weight, targets = random(30, 16).requires_grad_(), random(40, 16).requires_grad_(), torch.arange(30)
    with FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(x, weight, targets, 40, with_grad=with_grad)
        if with_grad:
            loss.backward()
    assert counter.get_total_flops() == gemms * 2 * 30 * 16 * 40


def test_linear_cross_entropy_without_grad_refuses_backward():
    x, weight = random(3, 4).requires_grad_(), random(6, 4)
    loss = linear_cross_entropy(x, weight, torch.arange(3), 6, with_grad=False)
    with pytest.raises(RuntimeError, match="with_grad=False.*call it with with_grad=True"):
        loss.backward()


def test_linear_cross_entropy_names_the_row_of_the_whole_batch():
    targets = torch.arange(20)
    targets[17] = 99
    with pytest.raises(ValueError, match="row 17 has 99"):
        linear_cross_entropy(random(20, 4), random(20, 4), targets, 20, chunk=6)


# ------------------------------------------------------------------------------------------------------------------
# adamw


def scalars(lr: float = 1e-2, step: float = 1.0, grad_scale: float = 1.0, skip: float = 0.0) -> list[Tensor]:
    return [torch.tensor(value) for value in (lr, step, grad_scale, skip)]


SHAPES = [(7, 5), (1,), (0,), (40_000,), (3, 1, 2), (65_537,)]


def test_adamw_follows_torchs():
    params = [random(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    theirs = [torch.nn.Parameter(p.double()) for p in params]
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    for step in range(1, 6):
        grads = [random(*shape, seed=100 * step + i) for i, shape in enumerate(SHAPES)]
        adamw(params, [], grads, *moments, *scalars(step=step), beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=0.1)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.double()
        optimizer.step()
    for ours, p in zip(params, theirs, strict=True):
        torch.testing.assert_close(ours.double(), p.detach(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("copy_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_adamw_writes_the_rounded_masters_into_the_copies(copy_dtype, grad_dtype):
    params = [random(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    copies = [torch.full_like(p, torch.nan, dtype=copy_dtype) for p in params]
    grads = [random(*shape, seed=9 + i).to(grad_dtype) for i, shape in enumerate(SHAPES)]
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    before = [p.clone() for p in params]
    adamw(params, copies, grads, *moments, *scalars())
    for p, copy, old in zip(params, copies, before, strict=True):
        assert torch.equal(copy, p.to(copy_dtype))
        assert p.numel() == 0 or not torch.equal(p, old)


def test_adamw_skips_without_a_trace():
    state = [[random(*shape, seed=i + 10 * k).abs() for i, shape in enumerate(SHAPES)] for k in range(4)]
    before = [[t.clone() for t in tensors] for tensors in state]
    grads = [torch.full(shape, torch.nan) for shape in SHAPES]
    params, copies, m, v = state
    adamw(params, copies, grads, m, v, *scalars(skip=1.0))
    assert all(torch.equal(a, b) for x, y in zip(state, before, strict=True) for a, b in zip(x, y, strict=True))


def test_adamw_updates_tensors_of_any_stride():
    base = [random(6, 10, seed=i) for i in range(5)]
    base[4] = base[4].square()
    dense, strided = [[t.clone() for t in base], [torch.empty(10, 12).t()[::2].copy_(t) for t in base]]
    assert not any(t.is_contiguous() for t in strided)
    for p, copy, g, m, v in (dense, strided):
        adamw([p], [copy], [g], [m], [v], *scalars())
    for a, b in zip(dense, strided, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(dense[0], base[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grads": []}, ValueError, "one of grads for each of the 1 params; there are 0"),
        ({"grads": [torch.ones(4, 3)]}, ValueError, r"grads\[0\] has shape \(4, 3\), its param \(3, 4\)"),
        ({"exp_avgs": [torch.ones(3, 4).half()]}, TypeError,
        r"exp_avgs in float32 or bfloat16 .*exp_avgs\[0\] is torch.float16"),
        ({"copies": [torch.ones(3, 4).half()]}, TypeError, r"copies in float32 or bfloat16 .*torch.float16"),
    ],
)  # fmt: skip
def test_adamw_refuses_what_it_would_misread(change, error, message):
    arguments = {name: [torch.ones(3, 4)] for name in ("params", "copies", "grads", "exp_avgs", "exp_avg_sqs")} | change
    with pytest.raises(error, match=message):
        adamw(*arguments.values(), *scalars())
    assert torch.equal(arguments["params"][0], torch.ones(3, 4))


# ------------------------------------------------------------------------------------------------------------
# global_norm


def test_global_norm_mixes_dtypes_and_layouts():
    tensors = [random(3, 4), random(7, seed=1).bfloat16(), random(50, 60, seed=2).t()[::2], random(70_003, seed=3)]
    flat = torch.cat([t.double().flatten() for t in tensors])
    assert global_norm(tensors).item() == pytest.approx(flat.norm().item(), rel=1e-7)


def test_global_norm_does_not_depend_on_the_threads():
    tensors = [random(200_001), random(65_536, seed=1), random(3, seed=2)]
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(global_norm(tensors).item())
    finally:
        torch.set_num_threads(before)
    assert len(set(found)) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 65_535, 65_536, 70_002])
def test_global_norm_shows_what_is_not_finite(bad: float, at: int):
    tensors = [random(5), random(70_003, seed=1)]
    tensors[1][at] = bad
    norm = global_norm(tensors)
    assert torch.isnan(norm) if bad != bad else torch.isinf(norm)


def test_global_norm_does_not_overflow_where_its_result_does_not():
    assert global_norm([torch.full((4,), 1e30)]).item() == pytest.approx(2e30, rel=1e-6)


def test_global_norm_refuses_other_dtypes():
    with pytest.raises(TypeError, match=r"tensors\[1\] is torch.float64 .*choose reference"):
        global_norm([random(2), random(2).double()])


def test_global_norm_compiles_on_parameters():
    tensors = [random(5).requires_grad_(), random(3, 2, seed=1).requires_grad_()]
    compiled = torch.compile(global_norm, backend="aot_eager", fullgraph=True)
    assert compiled(tensors).item() == pytest.approx(global_norm(tensors).item(), rel=1e-7)


# ------------------------------------------------------------------------------------------------------------
# what is traced instead of called


def test_a_gradient_of_the_heads_gradient_is_refused():
    x, weight = random(4, 8).requires_grad_(), random(16, 8, seed=1).requires_grad_()
    targets = torch.tensor([0, 3, 5, 15])
    with FlopCounterMode(display=False):  # the registered op
        (grad,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets, 16), weight, create_graph=True)
        with pytest.raises(RuntimeError, match="a gradient of its gradient was asked for"):
            grad.sum().backward()


# ----------------------------------------------------------------------------------------------------------- gelu


def test_gelu_gradients_are_the_slopes_of_its_own_forward():
    x, upstream, direction = random(400) * 3, random(400, seed=1), random(400, seed=2)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(gelu(leaf), leaf, upstream)

    def along(value):
        return (gelu(value).double() * upstream).sum()

    assert (grad * direction).sum().item() == pytest.approx(slope(along, x, direction), rel=2e-3)


def test_gelu_far_out_is_the_identity_or_zero():
    """Where the cubic, its square or the exponential leaves fp32 as well."""
    x = torch.tensor([1e2, 1e12, 1e13, 1e19, 1e30, 3e38, -1e2, -1e12, -1e13, -1e19, -1e30, -3e38], requires_grad=True)
    y = gelu(x)
    y.backward(torch.full_like(x, 2.0))
    assert torch.equal(y[:6], x[:6]) and not y[6:].any()
    assert x.grad.tolist() == [2.0] * 6 + [0.0] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_shows_nan_and_infinity_where_they_are(dtype):
    x = random(40).to(dtype)
    x[3], x[17] = torch.nan, torch.inf
    x.requires_grad_()
    y = gelu(x)
    y.sum().backward()
    assert y.isnan().nonzero().tolist() == [[3]] and y[17] == torch.inf
    assert x.grad[3].isnan() and set(x.grad.isnan().nonzero().flatten().tolist()) <= {3, 17}


def test_gelu_of_any_layout_and_alone_in_its_dtype():
    x = random(6, 10)
    for layout in LAYOUTS.values():
        a, b = x.clone().requires_grad_(), layout(x).detach().requires_grad_()
        ga, gb = (torch.autograd.grad(gelu(t), t, layout(random(6, 10, seed=5))) for t in (a, b))
        assert torch.equal(gelu(a), gelu(b)) and torch.equal(ga[0], gb[0])
    with pytest.raises(TypeError, match="x is torch.float64 on cpu; choose reference"):
        gelu(x.double())
