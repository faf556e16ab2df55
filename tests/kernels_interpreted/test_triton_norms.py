"""The four norms' Triton kernels beyond the contract: wide rows, many rows, one gradient, nothing copied or in vain."""

import math

import pytest
import torch

from tritium.kernels import contract, ops
from tritium.kernels.lib import triton_launch
from tritium.kernels.lib import triton_norms as norms
from tritium.kernels.site import Machine, Site

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NAMES = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
ADD = NAMES[2:]


@pytest.fixture(autouse=True)
def _choose_again():
    """Tests change what decides the tiles, which launchers remember."""
    remembered = (norms.config, norms._forward_plan, norms._backward_plan)
    for choice in remembered:
        choice.cache_clear()
    yield
    for choice in remembered:
        choice.cache_clear()


def random(*shape: int, seed: int = 0, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def function(name: str):
    return ops.OPS[name].load("triton").function


def arguments(name: str, *shape: int, dtype: torch.dtype = FP32) -> list[torch.Tensor]:
    """x, residual, weight and bias, those that the op has."""
    made = [random(*shape, seed=1, dtype=dtype)]
    made += [random(*shape, seed=2, dtype=dtype)] if name in ADD else []
    made += [random(shape[-1], seed=3, dtype=dtype)]
    return made + ([random(shape[-1], seed=4, dtype=dtype)] if "layer" in name else [])


def gradients(call, given: list[torch.Tensor], seed: int = 5) -> list[torch.Tensor]:
    leaves = [t.clone().requires_grad_() for t in given]
    found = call(*leaves)
    outputs = found if isinstance(found, tuple) else (found,)
    upstream = [random(*o.shape, seed=seed + i).to(o.dtype) for i, o in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


def assert_close_to_fp64(name: str, given: list[torch.Tensor], rtol: float = 2e-5, atol: float = 2e-5) -> None:
    got = gradients(function(name), given)
    exact = gradients(ops.OPS[name].reference, [t.double() for t in given])
    for value, true in zip(got, exact, strict=True):
        torch.testing.assert_close(value.double(), true, rtol=rtol, atol=atol)


# --------------------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("name", NAMES)
def test_many_blocks_of_rows_for_each_program(name):
    """More blocks of rows than programs: each walks several, and its registers add them up."""
    tile = norms.config(24, 4, add=name in ADD, backward=True)
    N = 2 * tile.BLOCK_N * tile.programs * triton_launch.processors() + 5
    assert_close_to_fp64(name, arguments(name, N, 24), rtol=1e-4, atol=1e-4)


CASES = ("odd", "three_axes", "everything", "no_rows", "vector")
WIDE = {
    "layer_norm": (*CASES, "no_bias", "wide_no_bias", "off_centre", "zero_rows", "large_eps_zero_rows"),
    "rms_norm": (*CASES, "no_weight", "wide_weight", "heads_no_weight", "zero_rows"),
    "add_layer_norm": (*CASES, "no_bias", "wide_weights", "off_centre"),
    "add_rms_norm": (*CASES, "no_weight_everything", "wide_weight"),
}


@pytest.mark.parametrize(
    ("name", "case", "dtype"),
    [
        (name, case, (FP32, BF16, FP16)[(i + j) % 3])
        for i, (name, cases) in enumerate(WIDE.items())
        for j, case in enumerate(cases)
    ],
)
def test_rows_of_several_tiles_keep_the_contract(name, case, dtype, monkeypatch):
    """A row too wide for one tile, made small: tiles of 32 columns forward and 16 backward."""
    monkeypatch.setattr(norms, "MAX_FORWARD", 32)
    monkeypatch.setattr(norms, "MAX_BACKWARD", 16)
    launched = []
    for kernel in ("_launch_forward", "_launch_forward_wide", "_launch_means_wide"):
        monkeypatch.setattr(norms, kernel, Watched(getattr(norms, kernel), launched))
    (found,) = (c for c in ops.OPS[name].cases.CASES if c.name == case)
    report = contract.check(ops.OPS[name], "triton", found, dtype)
    assert report.ok, report
    if found.shape.get("N", 1) and found.shape["C"] > 32:
        assert {k.jit.__name__ for k in launched} == {"_forward_wide", "_means_wide"}


class Watched:
    """A kernel that says when it is launched."""

    def __init__(self, kernel, launched):
        self.kernel, self.launched = kernel, launched

    def __call__(self, *args):
        self.launched.append(self.kernel)
        self.kernel(*args)


@pytest.mark.parametrize("name", NAMES)
def test_statistics_of_a_wide_row_whose_tiles_differ(name, monkeypatch):
    """Tiles far from each other, and one far from zero: sums of squares about 0, or about the first tile, would
    cancel."""
    monkeypatch.setattr(norms, "MAX_FORWARD", 32)
    given = arguments(name, 3, 150)
    given[0][0] += 300.0
    given[0][1, 32:64] += 1000.0
    given[0][2, :32] -= 2000.0
    assert_close_to_fp64(name, given, rtol=1e-4, atol=3e-4)


@pytest.mark.parametrize("C", [1, 7, 768, 1600, 8192, 8193, 16384, 16385, 70001, 2**20 + 1])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("add", [False, True])
def test_tiles_are_sound(C, itemsize, add):
    for backward in (False, True):
        tile = norms.config(C, itemsize, add=add, backward=backward)
        for size in (tile.BLOCK_N, tile.BLOCK_C, tile.num_warps):
            assert size == triton_launch.power_of_two(size)
        assert 4 <= tile.num_warps <= 16
        assert tile.BLOCK_N == 1 or tile.BLOCK_C >= C
        assert tile.BLOCK_N * tile.BLOCK_C / (32 * tile.num_warps) <= 32
        assert (tile.programs >= 1) == backward


@pytest.mark.parametrize(("P", "C", "BLOCK_N"), [(1100, 20, 512), (3, 70, 4), (1, 1, 1), (17, 300, 512)])
def test_all_shares_are_added(P, C, BLOCK_N):
    partial = random(2, P, C)
    dweight, dbias = torch.full((C,), math.nan), torch.full((C,), math.nan, dtype=BF16)
    constants = triton_launch.constants(C=C, BLOCK_N=BLOCK_N, BLOCK_C=16, num_warps=8)
    norms._launch_add_partials((-(-C // 16), 2), constants, partial, dweight, dbias, P)
    torch.testing.assert_close(dweight, partial[0].sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(dbias, partial[1].double().sum(0).float().to(BF16)) or C > 1
    torch.testing.assert_close(dbias.float(), partial[1].sum(0), rtol=1e-2, atol=1e-5)


# -------------------------------------------------------------------------------------------------- nothing is in vain


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_lie_apart_are_read_in_place(name, monkeypatch):
    N, C = 6, 40
    given = arguments(name, N, C)
    spread = [
        torch.cat([t, torch.full((N, 5), math.nan), t], 1)[:, 45:] if t.dim() > 1 else t for t in given
    ]  # a part of wider rows
    want = gradients(function(name), given)
    leaves = [t.requires_grad_() for t in spread]
    dy = torch.full((N, 2 * C), math.nan)
    copies, contiguous = [], torch.Tensor.contiguous
    monkeypatch.setattr(
        torch.Tensor, "contiguous", lambda t, *a, **k: copies.append(t.shape) or contiguous(t, *a, **k)
    )  # fmt: skip
    found = function(name)(*leaves)
    outputs = found if isinstance(found, tuple) else (found,)
    upstream = []
    for i, output in enumerate(outputs):
        wider = dy.clone()
        wider[:, C:] = random(*output.shape, seed=5 + i)
        upstream.append(wider[:, C:])
    got = [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]
    assert all(len(shape) == 1 for shape in copies), "only weight and bias may be copied"
    monkeypatch.undo()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    for t in spread:
        assert norms._rows(t, C)[0].data_ptr() == t.data_ptr() if t.dim() > 1 else True


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm"])
def test_without_a_weight_there_is_no_work_for_its_gradient(name, monkeypatch):
    launched, allocated = [], []
    monkeypatch.setattr(norms, "_launch_add_partials", Watched(norms._launch_add_partials, launched))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda t, size, **k: allocated.append(size) or new_empty(t, size, **k)
    )
    given = arguments(name, 5, 12)[:-1]
    leaves = [t.requires_grad_() for t in given]
    found = function(name)(*leaves, None)
    allocated.clear()
    outputs = found if isinstance(found, tuple) else (found,)
    torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
    assert launched == []
    assert [size for size in allocated if size != 0] == [(5, 12)], "the gradient, and no sums"


@pytest.mark.parametrize("name", ADD)
def test_both_summands_are_given_one_gradient(name):
    """One (N, C) tensor is written by backward, and handed to both."""
    leaves = [t.requires_grad_() for t in arguments(name, 7, 20)]
    y, s = function(name)(*leaves)
    dx, dresidual, *_ = torch.autograd.grad((y, s), leaves, (random(7, 20), random(7, 20, seed=9)))
    assert dx.data_ptr() == dresidual.data_ptr()
    assert torch.equal(dx, dresidual)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ADD)
def test_gradients_add_up_in_leaves_that_share_one(name, compiled):
    """Twice .backward(), and the same tensor as both summands: memory that two leaves held would double wrongly."""
    op, (x, residual, *affine) = ops.OPS[name], arguments(name, 4, 10)
    call = function(name)
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(lambda *a: function(name)(*a), fullgraph=True, backend="aot_eager")

    def run(call, summands):
        leaves = [t.clone().requires_grad_() for t in (*summands, *affine)]
        for _ in range(2):
            y, s = call(*(leaves[0], *leaves) if len(summands) == 1 else leaves)
            (y.square().sum() + (3 * s).sum()).backward()
        return [leaf.grad for leaf in leaves]

    for summands in ((x, residual), (x,)):
        for got, want in zip(run(call, summands), run(op.reference, summands), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use", [(True, False), (False, True)])
@pytest.mark.parametrize("name", ADD)
def test_an_output_that_the_loss_does_not_use(name, use):
    def run(call, given):
        leaves = [t.clone().requires_grad_() for t in given]
        outputs = [o for o, used in zip(call(*leaves), use, strict=True) if used]
        upstream = [random(*o.shape, seed=5).to(o.dtype) for o in outputs]
        found = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]

    given = arguments(name, 5, 18)
    for got, want in zip(run(function(name), given), run(ops.OPS[name].reference, given), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("name", ADD)
def test_the_sum_is_the_rounded_one_and_y_is_its_norm(name, dtype):
    x, residual, *affine = arguments(name, 6, 34, dtype=dtype)
    y, s = function(name)(x, residual, *affine)
    assert torch.equal(s, x + residual)
    assert torch.equal(y, function(name.removeprefix("add_"))(s, *affine))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_in_its_row(name, wide, monkeypatch):
    if wide:
        monkeypatch.setattr(norms, "MAX_FORWARD", 16)
        monkeypatch.setattr(norms, "MAX_BACKWARD", 16)
    given = arguments(name, 5, 40)
    given[0][2, 33] = math.nan
    got = gradients(function(name), given)
    y, dx = got[0], got[2 if name in ADD else 1]
    for value in (y, dx):
        assert value[2].isnan().all()
        assert value[[0, 1, 3, 4]].isfinite().all()


def test_a_constant_row_of_a_layer_norm_is_its_bias():
    bias = random(33)
    assert torch.equal(function("layer_norm")(torch.full((2, 33), 7.0), random(33, seed=1), bias), bias.expand(2, 33))


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("name", NAMES)
def test_other_shapes_and_dtypes_are_refused(name):
    given = arguments(name, 2, 8)
    at = 2 if name in ADD else 1

    def call(**changes):
        changed = [changes.get(str(i), t) for i, t in enumerate(given)]
        return function(name)(*changed)

    with pytest.raises(ValueError, match=f"{name}: weight must have shape \\(8,\\)"):
        call(**{str(at): random(7)})
    with pytest.raises(TypeError, match="float64"):
        call(**{"0": given[0].double()})
    with pytest.raises(ValueError, match="at least one element"):
        call(**{str(i): t[..., :0] for i, t in enumerate(given)})
    if "layer" in name:
        with pytest.raises(ValueError, match="bias must have shape"):
            call(**{str(at + 1): random(1)})
    if name in ADD:
        with pytest.raises(ValueError, match="residual must have x's shape and dtype"):
            call(**{"1": random(8)})
        with pytest.raises(ValueError, match="residual must have x's shape and dtype"):
            call(**{"1": given[1].bfloat16()})


@pytest.mark.parametrize("name", NAMES)
def test_no_width_is_refused(name):
    machine = Machine("cuda", "sm_80", packages={"triton": "3.6.0"})
    for C in (1, 768, 65537, 2**24):
        for dtype in (FP32, BF16, FP16):
            assert ops.OPS[name].load("triton").unsupported(Site(name, machine, dtype=dtype, shape={"C": C})) is None
