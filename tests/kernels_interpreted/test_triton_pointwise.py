"""The Triton kernels of gelu, swiglu, geglu, relu2, rope and embedding: the contract, and what it does not ask."""

import math
from collections.abc import Iterator

import pytest
import torch

from tritium.kernels import contract, ops
from tritium.kernels.case import Case
from tritium.kernels.embedding import impl_triton as embedding
from tritium.kernels.geglu import impl_triton as geglu
from tritium.kernels.gelu import impl_triton as gelu
from tritium.kernels.lib import triton_pointwise as pointwise
from tritium.kernels.relu2 import impl_triton as relu2
from tritium.kernels.rope import impl_triton as rope
from tritium.kernels.site import Machine
from tritium.kernels.swiglu import impl_triton as swiglu

FP32, BF16, FP16 = DTYPES = torch.float32, torch.bfloat16, torch.float16
OPS = ("gelu", "swiglu", "geglu", "relu2", "rope", "embedding")
# where layouts, expanded and partial gradients are tried too; elsewhere they would repeat the same code
THOROUGH = {
    "gelu": {"scalar", "odd", "vector_exact", "three_axes", "no_rows"},
    "swiglu": {"scalar", "odd", "packed", "three_axes", "no_rows"},
    "geglu": {"packed_exact"},
    "relu2": {"three_axes"},
    "rope": {"odd", "partial", "packed_per_row", "no_batch", "nothing_turns"},
    "embedding": {"scalar", "odd", "two_axes", "no_rows"},
}


def small(name: str) -> list[Case]:
    return [c for c in ops.OPS[name].cases.CASES if not c.large]


def the(name: str, case: str) -> Case:
    (found,) = (c for c in small(name) if c.name == case)
    return found


def runs() -> Iterator[tuple[str, Case, torch.dtype]]:
    """Every case in fp32, and every second in one of the 16-bit types in turn."""
    for name in OPS:
        for number, case in enumerate(small(name)):
            yield name, case, FP32
            if number % 2:
                yield name, case, (BF16, FP16)[number // 2 % 2]


@pytest.mark.parametrize(("name", "case", "dtype"), list(runs()), ids=str)
def test_every_case_keeps_the_contract(name, case, dtype):
    variants = contract.VARIANTS if case.name in THOROUGH[name] else ("plain",)
    report = contract.check(ops.OPS[name], "triton", case, dtype, variants=variants)
    assert report.ok, report


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "case"), [(n, c) for n in OPS for c in small(n)], ids=str)
def test_full_every_case_and_variant_in_every_dtype(name, case, dtype):
    for seed in range(3):
        report = contract.check(ops.OPS[name], "triton", case, dtype, seed=seed)
        assert report.ok, report


COMPILED = {
    "gelu": "exact", "swiglu": "packed", "geglu": "packed_exact", "relu2": "odd", "rope": "packed_per_row",
    "embedding": "two_axes",
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_compiled_into_one_graph(name):
    case = the(name, COMPILED[name])
    report = contract.check(ops.OPS[name], "triton", case, FP32, compiled="aot_eager", variants=("plain",))
    assert report.ok, report


OPCHECK = {
    "gelu": (torch.randn(3, 9).requires_grad_(), "none"),
    "swiglu": tuple(t.detach().requires_grad_() for t in torch.randn(3, 10).chunk(2, -1)),
    "geglu": (torch.randn(2, 3, 5).requires_grad_(), torch.randn(2, 3, 5).requires_grad_(), "tanh"),
    "relu2": (torch.randn(5, 4).t().requires_grad_(),),
    "rope": (
        torch.randn(2, 3, 4, 8).requires_grad_(), torch.randn(2, 3, 2, 8).requires_grad_(), torch.randn(3, 2),
        torch.randn(3, 2),
    ),
    "embedding": (torch.tensor([[1, 0], [4, 1]]), torch.randn(5, 6).requires_grad_()),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    ops.OPS[name].load("triton")
    operator = getattr(torch.ops.tritium, f"{name}_triton").default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    assert set(torch.library.opcheck(operator, OPCHECK[name], test_utils=checks).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", OPS)
def test_nothing_is_refused_on_a_gpu(name):
    for arch in ("sm_80", "sm_90", "sm_100"):
        for case in ops.OPS[name].cases.CASES:
            for dtype in DTYPES:
                site = contract.site_of(ops.OPS[name], case, dtype, Machine("cuda", arch, packages={"triton": "3.6.0"}))
                assert ops.OPS[name].load("triton").unsupported(site) is None


# ---------------------------------------------------------------------------------------------------- read in place


class Launched:
    """In a kernel's place: keeps the arguments of its launches."""

    def __init__(self):
        self.arguments: list[tuple] = []

    def __call__(self, grid, constants, *arguments):
        self.arguments.append(arguments)

    def addresses(self) -> list[int]:
        return [a.data_ptr() for a in self.arguments.pop() if isinstance(a, torch.Tensor)]


def random(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def addresses(*tensors: torch.Tensor) -> list[int]:
    return [t.data_ptr() for t in tensors]


@pytest.mark.parametrize(("module", "rest"), [(swiglu, ()), (geglu, ("tanh",))], ids=["swiglu", "geglu"])
def test_halves_of_a_projection_are_read_in_place(module, rest, monkeypatch):
    forward, backward = Launched(), Launched()
    monkeypatch.setattr(pointwise, "_gated_forward_kernel", forward)
    monkeypatch.setattr(pointwise, "_gated_backward_kernel", backward)
    gate, up = random(2, 3, 2 * 40).chunk(2, dim=-1)
    dy = random(2, 3, 60)[..., 4:44]
    (y,) = module._launch_forward(gate, up, *rest)
    assert forward.addresses() == addresses(gate, up, y)
    gradients = module._launch_backward(dy, gate, up, *rest)
    assert backward.addresses() == addresses(dy, gate, up, *gradients)
    module._launch_forward(gate.mT, up.mT, *rest)
    assert not set(forward.addresses()) & set(addresses(gate, up)), "other layouts are copied, and this test sees it"


@pytest.mark.parametrize(("module", "rest"), [(gelu, ("none",)), (relu2, ())], ids=["gelu", "relu2"])
def test_rows_apart_are_read_in_place(module, rest, monkeypatch):
    forward, backward = Launched(), Launched()
    monkeypatch.setattr(pointwise, "_unary_forward_kernel", forward)
    monkeypatch.setattr(pointwise, "_unary_backward_kernel", backward)
    x, dy = random(3, 5, 64)[:, :, 8:40], random(3, 5, 64)[:, :, :32]
    (y,) = module._launch_forward(x, *rest)
    assert forward.addresses() == addresses(x, y)
    (dx,) = module._launch_backward(dy, x, *rest)
    assert backward.addresses() == addresses(dy, x, dx)


def test_rope_reads_a_packed_projection_in_place(monkeypatch):
    turn = Launched()
    monkeypatch.setattr(rope, "_turn_kernel", turn)
    B, T, H, G, D = 2, 3, 4, 2, 16
    q, k, _ = random(B, T, H + 2 * G, D).split((H, G, G), dim=2)
    cos, sin = random(T, D // 2), random(T, D // 2)
    outputs = rope._launch_forward(q, k, cos, sin)
    assert turn.addresses() == addresses(q, k, cos, sin, *outputs)
    dq = random(B, H, T, D).transpose(1, 2)  # as attention may give it
    gradients = rope._launch_backward(dq, k, cos, sin)
    assert turn.addresses() == addresses(dq, k, cos, sin, *gradients)
    every_second = random(B, T, H, 2 * D)[..., ::2]
    rope._launch_forward(every_second, k, cos, sin)
    assert turn.addresses()[0] != every_second.data_ptr(), "other layouts are copied, and this test sees it"


def test_only_the_operands_are_kept():
    """Backward computes the rest again: what autograd keeps is what was given, in the storage it came in."""
    packed = random(4, 2 * 24).requires_grad_()
    gate, up = packed.chunk(2, dim=-1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu.swiglu(gate, up)
        assert [t.untyped_storage().data_ptr() for t in kept] == [packed.untyped_storage().data_ptr()] * 2
        kept.clear()
        q = random(1, 3, 2, 8).requires_grad_()
        cos, sin = random(3, 4), random(3, 4)
        rope.rope(q, q, cos, sin)
        assert [t.data_ptr() for t in kept] == [cos.data_ptr(), sin.data_ptr()]


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")  # of the largest by log₂e
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("op", "rest"),
    [("gelu", ("tanh",)), ("gelu", ("none",)), ("swiglu", ()), ("geglu", ("tanh",)), ("geglu", ("none",))],
)
def test_every_finite_input_has_a_finite_gradient(op, rest, dtype):
    """To the ends of the dtype, where every intermediate result overflows."""
    largest = torch.finfo(dtype).max
    x = torch.tensor([largest, -largest, largest / 4, -largest / 4, 1e4, -1e4, 0.0], dtype=dtype).requires_grad_()
    one = torch.ones_like(x)
    y = ops.OPS[op].load("triton").function(*((x,) if op == "gelu" else (x, one)), *rest)
    (dx,) = torch.autograd.grad(y, x, one)
    zero = torch.tensor(0.0, dtype=dtype)
    half = torch.tensor(0.5, dtype=dtype)
    torch.testing.assert_close(y.detach(), torch.where(x > 0, x, zero).detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(dx, torch.where(x > 0, one, torch.where(x < 0, zero, half)), rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")  # the kernel's, before it chooses
def test_an_infinite_gradient_does_not_come_through_where_relu2_is_flat():
    dx = []
    for backend in ("triton", "reference"):
        x = torch.tensor([-1.0, 0.0, 2.0, math.nan, -math.inf]).requires_grad_()
        dx += torch.autograd.grad(ops.relu2.load(backend).function(x), x, torch.full((5,), math.inf))
    torch.testing.assert_close(dx[0], dx[1], rtol=0, atol=0, equal_nan=True)
    assert dx[0][:3].tolist() == [0.0, 0.0, math.inf]


@pytest.mark.parametrize("x", [
    torch.randn(()), torch.randn(1), torch.randn(1001), torch.randn(640), torch.randn(8192),
    torch.randn(1280)[::2], torch.randn(300)[1:], torch.randn(1).expand(256), torch.randn(9, 4).t()[1],
], ids=lambda x: f"{tuple(x.shape)}/{x.stride()}")  # fmt: skip
def test_vectors_of_any_length_and_stride(x):
    x = x.detach().requires_grad_()
    dy = torch.randn(x.shape)
    for name in ("gelu", "relu2", "swiglu"):
        op = ops.OPS[name]
        args = (x, x.detach().flip(0) if x.dim() else x.detach()) if name == "swiglu" else (x,)
        y, wanted = op.load("triton").function(*args), op.load("reference").function(*args)
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)
        (dx,), (wanted,) = (torch.autograd.grad(r, x, dy) for r in (y, wanted))
        torch.testing.assert_close(dx, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu_erf", "relu2"])
def test_nan_stays_nan(activation):
    x = torch.tensor([float("nan"), 1.0])
    assert pointwise.unary_forward(x, activation).isnan().tolist() == [True, False]
    assert pointwise.unary_backward(torch.ones(2), x, activation).isnan().tolist() == [True, False]
    assert pointwise.unary_backward(x, torch.ones(2), activation).isnan().tolist() == [True, False]


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_in_fp32_is_accurate_over_its_whole_range(approximate):
    x = torch.linspace(-9, 9, 1801)
    wide, leaf = x.double().requires_grad_(), x.clone().requires_grad_()
    exact = torch.nn.functional.gelu(wide, approximate=approximate)
    y = gelu.gelu(leaf, approximate)
    error = (y.double() - exact).abs().detach()
    assert (error <= 4 * 2**-24 * x.abs()).all()
    (dx,) = torch.autograd.grad(y.sum(), leaf)
    (slope,) = torch.autograd.grad(exact.sum(), wide)
    assert ((dx.double() - slope).abs() <= 8 * 2**-24).all()
    if approximate == "none":  # the tail that 1 + erf would lose: torch's own is 4 % off at -5
        true = (wide * 0.5 * torch.special.erfc(-wide * 0.5**0.5)).detach()
        tail = (x < -1) & (x > -8)
        assert ((y.double() - true).abs()[tail] <= 1e-4 * true.abs()[tail]).all()


# ---------------------------------------------------------------------------------------------------------- embedding


def test_an_id_outside_the_table_is_loud_and_reads_nothing():
    V, C = 5, 6
    memory = random(3 * V, C)
    weight = memory[V : 2 * V].clone().requires_grad_()
    ids = torch.tensor([0, V, -1, 2**40, -(2**40), 4, 2**32 + 1])
    y = embedding.embedding(ids, weight)
    outside = torch.tensor([False, True, True, True, True, False, True])
    assert y[outside].isnan().all()
    torch.testing.assert_close(y[~outside].detach(), weight.detach()[[0, 4]], rtol=0, atol=0)
    dy = random(7, C)
    (dweight,) = torch.autograd.grad(y, weight, dy)
    expected = torch.zeros(V, C)
    expected[0], expected[4] = dy[0], dy[5]
    torch.testing.assert_close(dweight, expected, rtol=0, atol=0)


def test_a_table_of_more_rows_than_16_bits_count(monkeypatch):
    """Its keys are int32: the same sums, to the last bit, as by int16."""
    ids = torch.randint(0, 40, (150,), generator=torch.Generator().manual_seed(0))
    dy = random(150, 9)
    (narrow,) = embedding._launch_backward(dy, ids, 40)
    sorted_in = []
    sort = torch.sort
    monkeypatch.setattr(torch, "sort", lambda keys, **options: sorted_in.append(keys.dtype) or sort(keys, **options))
    monkeypatch.setattr(embedding, "NARROW_V", 39)
    (wide,) = embedding._launch_backward(dy, ids, 40)
    assert sorted_in == [torch.int32]
    assert torch.equal(narrow, wide)
    exact = torch.zeros(40, 9, dtype=torch.float64).index_add(0, ids, dy.double())
    torch.testing.assert_close(wide.double(), exact, rtol=0, atol=1e-5)


def test_the_last_row_of_the_largest_narrow_table():
    """V = 65535 is the most that 16 bits allow: its last id's key is the last but one."""
    V = embedding.NARROW_V
    lowest, highest = -(2**15), 2**15 - 1
    assert V - 1 + lowest < highest
    keys, ids = torch.empty(3, dtype=torch.int16), torch.tensor([0, V - 1, V])
    embedding._make_keys[(1,)](ids, keys, 1, 3, V, lowest, highest, BLOCK_N=4)
    assert keys.tolist() == [lowest, highest - 1, highest]


def test_no_program_adds_many_rows_one_by_one():
    """However often an id is repeated: rows one by one up to 2·CHUNK, the rest by sums of CHUNK."""
    for N in (1, 100, 16384, 131072, 2**20):
        chunk = 2 ** embedding.log_chunk_of(N)
        assert 2 * chunk + N // chunk <= max(96, 5 * N**0.5), N
    assert 2 ** embedding.log_chunk_of(16384) == 32


def test_the_gradient_of_the_table_repeats_bit_for_bit():
    ids = torch.randint(0, 3, (140,), generator=torch.Generator().manual_seed(1))
    dy = random(140, 8, dtype=BF16)
    first, second = (embedding._launch_backward(dy, ids, 7)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert first.dtype == BF16
    assert not first[3:].any()


# ------------------------------------------------------------------------------------------------------------- errors


def test_bad_arguments_are_named():
    x = random(2, 4)
    with pytest.raises(ValueError, match="approximate must be 'tanh' or 'none', not 'erf'"):
        gelu.gelu(x, "erf")
    with pytest.raises(ValueError, match="swiglu takes gate and up of one shape and dtype"):
        swiglu.swiglu(x, random(2, 3))
    with pytest.raises(TypeError, match="float64"):
        relu2.relu2(x.double())
    with pytest.raises(ValueError, match="embedding takes ids in int64"):
        embedding.embedding(torch.tensor([1], dtype=torch.int32), x)
    q = random(1, 3, 2, 8)
    with pytest.raises(ValueError, match=r"cos and sin \(T, R/2\)"):
        rope.rope(q, q, random(2, 4), random(2, 4))
    with pytest.raises(ValueError, match=r"q \(B, T, H, D\) and k \(B, T, G, D\)"):
        rope.rope(q, random(1, 3, 2, 6), random(3, 2), random(3, 2))
