"""fp8 beyond the contract: scales, products, what is refused, planted faults, and torchao as a second opinion."""

import dataclasses
import math
from unittest import mock

import pytest
import torch
from torch import Tensor

from tritium.kernels import contract, ops
from tritium.kernels.lib import fp8
from tritium.kernels.op import Backend, Tuned, auto
from tritium.kernels.site import Machine, Site

BF16 = torch.bfloat16
OURS = ("fp8_tensorwise", "fp8_rowwise")
TORCHAO = ("torchao_tensorwise", "torchao_rowwise", "torchao_rowwise_with_gw_hp")
H100 = Machine("cuda", "sm_90", packages={"torchao": "0.18.0"})


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def cases(name: str) -> list:
    return [case for case in ops.OPS[name].cases.CASES if case.name.startswith("sixteens")]


# --------------------------------------------------------------------------------------------------------------- scales


@pytest.mark.parametrize("dtype", [fp8.E4M3, fp8.E5M2])
def test_a_scale_is_the_largest_power_of_two_that_fits(dtype):
    top = torch.finfo(dtype).max
    edges = [top * 2.0**k for k in (-60, -9, 0, 3, 60)]
    near = [math.nextafter(e, e * side) for e in edges for side in (0.0, 2.0)]
    largest = torch.tensor([*edges, *near, 2.0**-99, 1e-20, 1.0, 3.0, 3e38], dtype=torch.float32)
    largest = torch.cat([largest, torch.nextafter(largest, largest * 2), torch.rand(1000).exp()])
    scale, inverse = fp8.scales(largest, dtype)
    assert (torch.frexp(scale).mantissa == 0.5).all()
    assert (scale.double() * inverse.double() == 1).all()
    assert (largest.double() * scale.double() <= top).all()
    assert (largest.double() * 2 * scale.double() > top).all()


@pytest.mark.parametrize("rowwise", [False, True])
def test_zeros_stay_zeros_and_what_is_not_finite_shows(rowwise):
    x, weight = torch.zeros(4, 16, dtype=BF16), random(32, 16)
    y = fp8.linear(x, weight, None, rowwise, fp8.E5M2)
    assert torch.equal(y, torch.zeros(4, 32, dtype=BF16))
    for dtype in (fp8.E4M3, fp8.E5M2):
        scale, inverse = fp8.scales(torch.tensor([0.0, 1e-45, 1e-38, 1e-31]), dtype)
        assert (scale > 0).all() and (inverse > 0).all() and (scale * inverse == 1).all()
    for bad in (torch.inf, -torch.inf, torch.nan):
        x = random(4, 16)
        x[2, 3] = bad
        y = fp8.linear(x, weight, None, rowwise, fp8.E5M2)
        assert y[2].isnan().all()
        assert y[[0, 1, 3]].isfinite().all() == rowwise


def test_a_row_of_its_own_scale_keeps_small_rows():
    """What rowwise is for: beside a row of 2^20, tensorwise has nothing left of one of 2^-10."""
    x, weight = random(2, 64), random(32, 64, seed=1)
    x[0] *= 2.0**20
    x[1] *= 2.0**-10
    exact = x.double() @ weight.double().t()

    def error(rowwise: bool) -> float:
        y = fp8.linear(x, weight, None, rowwise, fp8.E5M2)
        return ((y.double() - exact)[1].norm() / exact[1].norm()).item()

    assert error(True) < 0.1
    assert error(False) == 1.0


# ------------------------------------------------------------------------------------------------------------- products


def operands(rowwise: bool, gradients: torch.dtype) -> dict[str, Tensor | torch.dtype | bool]:
    return {"a": random(24, 48), "b": random(48, 32, seed=1), "a_dtype": gradients, "b_dtype": fp8.E4M3,
            "rowwise": rowwise}  # fmt: skip


@pytest.mark.parametrize("gradients", [fp8.E4M3, fp8.E5M2])
@pytest.mark.parametrize("rowwise", [False, True])
def test_a_product_is_that_of_what_was_rounded(rowwise, gradients):
    """Against fp64: beside the rounding of the operands there is one rounding, to bf16."""
    given = operands(rowwise, gradients)
    a8, a_inverse = fp8.rounded(given["a"], 1 if rowwise else None, gradients)
    b8, b_inverse = fp8.rounded(given["b"], 0 if rowwise else None, fp8.E4M3)
    exact = (a8.double() * a_inverse.double()) @ (b8.double() * b_inverse.double())
    y = fp8.product(**given)
    assert ((y.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all()
    bias = random(32, seed=2)
    exact = exact + bias.double()
    assert ((fp8.product(**given, bias=bias).double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("rowwise", [False, True])
def test_the_gpus_way_gives_the_same_numbers(rowwise, fast):
    """torch._scaled_mm has a CPU kernel, for one scale a matrix; what a GPU would be given is checked on the way."""
    real = torch._scaled_mm
    calls = []

    def strict(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None = None, **options) -> Tensor:
        assert a.is_contiguous() and b.t().is_contiguous(), "cuBLAS wants both factors dense along the sum"
        assert a.shape[1] % 16 == 0 and b.shape[1] % 16 == 0
        assert a_scale.dtype == b_scale.dtype == torch.float32
        calls.append(options.get("use_fast_accum", False))
        if a_scale.dim() == 0:
            return real(a, b, a_scale, b_scale, bias, **options)
        assert (a_scale.shape, b_scale.shape) == ((a.shape[0], 1), (1, b.shape[1]))
        assert a_scale.is_contiguous() and b_scale.is_contiguous()
        one = torch.ones(())
        y = real(a, b, one, one, out_dtype=torch.float32) * a_scale * b_scale
        return (y if bias is None else y + bias).to(options["out_dtype"])

    given = operands(rowwise, fp8.E4M3)
    for bias in (None, random(32, seed=2)):
        for a in (given["a"], given["a"].t().contiguous().t()):
            want = fp8.product(**{**given, "a": a}, bias=bias)
            with (
                mock.patch.object(torch, "_scaled_mm", strict),
                mock.patch.object(fp8, "_emulated", fp8._on_tensor_cores),
            ):
                got = fp8.product(**{**given, "a": a}, bias=bias, fast=fast)
            torch.testing.assert_close(got, want, rtol=2.0**-7, atol=2.0**-7 if bias is not None else 1e-3)
    assert calls == [fast] * 4


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_layouts_and_rows_that_are_no_multiple_of_16(layout):
    x, weight, dy = random(2, 5, 32), random(48, 32, seed=1), random(2, 5, 48, seed=2)
    weight = weight if layout == "out_in" else weight.t().contiguous().t()
    exact = torch.einsum("btf,btc->fc", dy.double(), x.double())
    for backend in OURS:
        leaf = weight.detach().requires_grad_()
        y = ops.linear.load(backend).function(x, leaf)
        (gradient,) = torch.autograd.grad(y, leaf, dy)
        assert y.shape == (2, 5, 48)
        assert (gradient.double() - exact).norm() < 0.1 * exact.norm()


def test_the_heads_gradients_are_neither_longer_nor_shorter():
    """Rounding errors cancel over a large tensor, and a gradient × 1.02 would show. The logits are small: their own
    rounding moves the softmax."""
    case = dataclasses.replace(cases("linear_cross_entropy")[0], shape={"N": 256, "C": 128, "V": 500, "Vp": 512},
                               options={"spread": 0.3})  # fmt: skip
    arguments = ops.linear_cross_entropy.cases.inputs(case, BF16, "cpu", 0)
    wide = {n: v.detach().double().requires_grad_() if n in ("x", "weight") else v for n, v in arguments.items()}
    exact = torch.autograd.grad(ops.linear_cross_entropy.reference(**wide), [wide["x"], wide["weight"]])
    for backend in OURS:
        loss = ops.linear_cross_entropy.load(backend).function(**arguments)
        found = torch.autograd.grad(loss, [arguments["x"], arguments["weight"]])
        for g, e in zip(found, exact, strict=True):
            assert abs((g.double() * e).sum() / e.square().sum() - 1) < 0.005
            assert (g.double() - e).norm() < 0.2 * e.norm()
        assert found[1].dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("backend", OURS + TORCHAO)
@pytest.mark.parametrize("compiled", [False, "aot_eager"])
def test_linear_keeps_the_contract(backend, compiled):
    for case in cases("linear"):
        for seed in range(1 if compiled else 3):
            report = contract.check(ops.linear, backend, case, BF16, compiled=compiled, seed=seed)
            assert report.ok, report
    assert {"plain", "on the grid", "expanded"} <= {e.variant for e in report.errors} or case.shape["N"] == 0


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("compiled", [False, "aot_eager"])
def test_the_head_keeps_the_contract(backend, compiled):
    for case in cases("linear_cross_entropy"):
        for seed in range(1 if compiled else 3):
            report = contract.check(ops.linear_cross_entropy, backend, case, BF16, compiled=compiled, seed=seed)
            assert report.ok, report


@pytest.mark.full  # half a minute of the compiler's
def test_inductor_makes_the_same_of_it():
    x, weight, bias, dy = random(24, 48), random(32, 48, seed=1), random(32, seed=2), random(24, 32, seed=3)
    for backend in OURS:
        function = ops.linear.load(backend).function
        results = []
        for run in (function, torch.compile(lambda *a, f=function: f(*a), fullgraph=True)):
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            y = run(*leaves)
            results.append([y, *torch.autograd.grad(y, leaves, dy)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=2.0**-7, atol=2.0**-6)


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.02


def of_rounded(change):
    return {"rounded": lambda real: lambda x, dim, dtype: change(real, x, dim, dtype)}


def of_scales(change):
    return {"scales": lambda real: lambda largest, dtype: change(*real(largest, dtype))}


def of_product(change):
    return {"product": lambda real: lambda a, b, *rest, **more: real(*change(a, b), *rest, **more)}


def half_looked_at(x: Tensor, dim: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    part = x[: max(1, x.shape[0] // 2)] if dim != 1 else x[:, : x.shape[1] // 2]
    largest = part.abs().amax() if dim is None else part.abs().amax(dim, keepdim=True)
    scale, inverse = fp8.scales(largest, dtype)
    top = torch.finfo(dtype).max
    return (x * scale.to(x.dtype)).clamp(-top, top).to(dtype), inverse


# name → of fp8's functions and constants: what to put in the place of the real one
PATCHES = {
    "a scale is not taken back": of_scales(lambda scale, inverse: (scale, torch.ones_like(inverse))),
    "an inverse is twice what it is": of_scales(lambda scale, inverse: (scale, 2 * inverse)),
    "a scale is twice what fits": of_scales(lambda scale, inverse: (2 * scale, inverse / 2)),
    "there is no scale": of_scales(lambda scale, inverse: (torch.ones_like(scale), torch.ones_like(inverse))),
    "the largest number of half of it": of_rounded(lambda real, x, dim, dtype: half_looked_at(x, dim, dtype)),
    "the last sixteen of the sum": of_product(lambda a, b: (a[:, :-16], b[:-16])),
    "rounded to less": {"E4M3": lambda real: fp8.E5M2},
    "rows of padding that are not zero": {
        "F": lambda real: mock.Mock(wraps=real, pad=lambda t, sizes: real.pad(t, sizes, value=1.0))
    },
}


def transposed(x, weight, bias=None):
    return fp8.linear(x, weight.t() if weight.shape[0] == weight.shape[1] else weight, bias, True, fp8.E4M3)


def bias_dropped(x, weight, bias=None):
    return fp8.linear(x, weight, None, True, fp8.E4M3)


def bias_twice(x, weight, bias=None):
    y = fp8.linear(x, weight, bias, True, fp8.E4M3)
    return y if bias is None else y + bias


def gradient_of_x_longer(x, weight, bias=None):
    return fp8.linear(Scaled.apply(x), weight, bias, True, fp8.E4M3)


def gradient_of_weight_longer(x, weight, bias=None):
    return fp8.linear(x, Scaled.apply(weight), bias, True, fp8.E4M3)


WRONG = [transposed, bias_dropped, bias_twice, gradient_of_x_longer, gradient_of_weight_longer]


def red(backend: str | Backend) -> list[contract.Report]:
    reports = [contract.check(ops.linear, backend, case, BF16, variants=("plain",)) for case in cases("linear")]
    return [r for r in reports if r.status == "failed"]


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("fault", PATCHES)
def test_a_planted_fault_turns_the_contract_red(fault, name):
    assert not red(name)
    with mock.patch.multiple(fp8, **{n: f(getattr(fp8, n)) for n, f in PATCHES[fault].items()}):
        assert red(name)


@pytest.mark.parametrize("fault", WRONG, ids=lambda f: f.__name__)
def test_a_wrong_use_turns_the_contract_red(fault):
    module = ops.linear.load("fp8_rowwise").module
    assert red(Backend("linear", "planted", fault, module))


def test_the_looser_bound_alone_would_not_see_what_the_grid_does():
    """On operands as drawn, a gradient x 1.02 drowns in the rounding: it is the grid that shows it."""
    module = ops.linear.load("fp8_rowwise").module
    planted = Backend("linear", "planted", WRONG[-1], module)
    seen = {e.variant for r in red(planted) for e in r.errors if not e.ok}
    assert seen == {"on the grid"}


def test_without_the_declaration_the_bound_is_the_dtypes():
    backend = dataclasses.replace(ops.linear.load("fp8_rowwise"), module=ops.linear.load("reference").module)
    assert all(not contract.check(ops.linear, backend, case, BF16).ok for case in cases("linear")[:3])


# -------------------------------------------------------------------------------------------------------------- choices


@pytest.mark.parametrize("backend", OURS + TORCHAO)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"machine": Machine("cuda", "sm_80", packages=H100.packages)}, "8.9 or later, this is sm_80; choose"),
        ({"dtype": torch.float32}, "this site computes in float32; compute in bfloat16"),
        ({"dtype": torch.float16}, "this site computes in float16"),
        ({"shape": {"C": 768, "F": 50257}}, "multiples of 16, this site has F=50257; change the width"),
        ({"shape": {"C": 24, "F": 40}}, "C=24 and F=40"),
    ],
)
def test_what_fp8_cannot_do_is_refused(backend, changes, words):
    good = Site("linear", H100, dtype=BF16, shape={"C": 768, "F": 3072})
    judge = ops.linear.load(backend).unsupported
    assert judge(good) is None
    assert judge(good.replace(machine=dataclasses.replace(H100, arch="sm_89"))) is None
    assert words in judge(good.replace(**changes))


@pytest.mark.parametrize("backend", TORCHAO)
def test_without_torchao_its_backends_say_how_to_get_it(backend):
    site = Site("linear", Machine("cuda", "sm_90", packages={}), dtype=BF16, shape={"C": 64, "F": 64})
    reason = ops.linear.load(backend).unsupported(site)
    assert reason.startswith("needs the package torchao, which is not installed; pip install torchao")
    assert all(name in reason for name in OURS)
    assert ops.linear.load("fp8_rowwise").unsupported(site) is None


def test_auto_never_takes_fp8():
    for name in ("linear", "linear_cross_entropy"):
        op = ops.OPS[name]
        site = Site(name, H100, dtype=BF16, shape={"C": 64, "F": 64, "V": 64, "Vp": 64})
        for backend in op.backends():
            if op.load(backend).precision is None:
                continue
            picked, why = auto(op, site, [Tuned("sm_90", name, (backend, "reference"), "planted")])
            assert picked == "reference"
            assert f"not {backend}: it computes in fp8, which is chosen by name alone" in why


# -------------------------------------------------------------------------------------------------------------- torchao


def test_our_rounding_is_torchaos():
    """The same bits and scales, as far as its power of two is one: it takes a logarithm where ours takes the bits."""
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
    from torchao.float8.float8_training_tensor import LinearMMConfig

    for seed in range(20):
        x = random(24, 48, seed=seed) * 10.0 ** (seed - 10)
        for dtype in (fp8.E4M3, fp8.E5M2):
            for dim in (None, 0, 1):
                theirs = hp_tensor_to_float8_dynamic(
                    x, dtype, LinearMMConfig(), round_scales_to_power_of_2=True,
                    scaling_granularity=ScalingGranularity.TENSORWISE if dim is None else ScalingGranularity.AXISWISE,
                    axiswise_dim=None if dim is None else -1 if dim == 1 else 0,
                )  # fmt: skip
                ours, inverse = fp8.rounded(x, dim, dtype)
                assert torch.equal(theirs._data.view(torch.uint8), ours.view(torch.uint8))
                assert torch.equal(theirs._scale * inverse, torch.ones_like(inverse))


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_our_recipes_are_torchaos(recipe):
    x, weight, bias, dy = random(2, 24, 48), random(32, 48, seed=1), random(32, seed=2), random(2, 24, 32, seed=3)
    results = []
    for backend in (f"fp8_{recipe}", f"torchao_{recipe}"):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = ops.linear.load(backend).function(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for ours, theirs in zip(*results, strict=True):  # they round before they add the bias
        torch.testing.assert_close(ours, theirs, rtol=2.0**-7, atol=2.0**-6)
