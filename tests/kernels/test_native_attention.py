"""The native attention beyond the contract: tiles, instruction sets, threads, hostile values, planted faults."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from tritium.kernels import contract, ops
from tritium.kernels.attention import impl_native
from tritium.kernels.case import Case
from tritium.kernels.lib import native
from tritium.kernels.site import Machine, Site

ISAS = native.isas() or ("missing",)
FP32, BF16 = torch.float32, torch.bfloat16
attention = ops.attention.load("native").function


def tensors(B: int, Tq: int, Tk: int, H: int, G: int, D: int, seed: int = 0) -> list[Tensor]:
    """q, k, v and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, heads, D, generator=generator) for T, heads in ((Tq, H), (Tk, G), (Tk, G), (Tq, H))]


def run(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, dy: Tensor, **options: Any) -> list[Tensor]:
    """y, dq, dk, dv."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    y = function(*leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def case(name: str, B: int, Tq: int, Tk: int, H: int, G: int, D: int, **options: object) -> Case:
    return Case(name, {"B": B, "Tq": Tq, "Tk": Tk, "H": H, "G": G, "D": D}, options)


# sizes around a register block (8 or 4 rows; 4, 8 or 16 keys), a tile (64 queries, 256 keys), a chunk (512 keys) and a
# task (256 queries), and head widths that are no multiple of a vector
CASES = (
    case("a_row_more_than_a_task", 1, 257, 257, 2, 1, 24),
    case("several_chunks", 1, 70, 530, 1, 1, 16),
    case("several_chunks_full", 1, 9, 1030, 1, 1, 33, causal=False),
    case("wide", 1, 66, 200, 2, 2, 256),
    case("odd_width", 1, 65, 65, 1, 1, 7, softcap=3.0),
    case("narrow_window", 1, 300, 300, 1, 1, 16, window=3),
    case("window_over_chunks", 1, 300, 600, 1, 1, 8, window=280),
    case("documents_over_chunks", 1, 300, 600, 2, 1, 8, documents=True),
    case("dropout_over_chunks", 1, 40, 600, 2, 1, 8, dropout=0.2),
    # products that sum over an odd number of keys, of queries, of channels: the last has no neighbour
    case("odd_keys_full", 1, 9, 33, 2, 1, 17, causal=False),
    case("odd_everything", 1, 71, 71, 2, 1, 65),
    case("odd_window", 1, 75, 75, 1, 1, 31, window=5),
)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_holds_the_contract(isa, dtype):
    with native.use_isa(isa):
        for each in [*(c for c in ops.attention.cases.CASES if not c.large), *CASES]:
            report = contract.check(ops.attention, "native", each, dtype, variants=("plain",))
            assert report.ok, f"{isa} {report}"


def test_dot_products_of_bf16_leave_fp32_as_it_is():
    """Bit for bit, on the instruction sets of one vector width."""
    arguments = tensors(1, 70, 75, 4, 2, 20)
    results = []
    for isa in [isa for isa in ISAS if isa.startswith("v4")] or ISAS[:1]:
        with native.use_isa(isa):
            results.append(run(attention, *arguments))
            numbers = impl_native._numbers(*arguments[:3], None, None, 0, 0.0).buffer_info()[0]
            fp32, bf16 = (impl_native._scratch_size(dtype, numbers, False) for dtype in (0, 1))
            assert bf16 < fp32 if isa == "v4_bf16" else bf16 == fp32  # it packs pairs
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("isa", ISAS)
def test_exp2_is_within_its_bound(isa):
    elementary = native.Function("elementary", "ippl")

    def exp2(x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        elementary(3, x.data_ptr(), y.data_ptr(), x.numel())
        return y

    x = torch.cat([torch.linspace(-126, 127, 1_000_003), -torch.logspace(-30, 2, 20_001)])
    with native.use_isa(isa):
        exact = x.double().exp2()
        _, exponent = torch.frexp(exact)
        assert ((exp2(x) - exact).abs() / torch.exp2((exponent - 24).double())).max() <= 1.3
        ends = exp2(torch.tensor([0.0, -0.0, -1.0, -126.1, -1e30, -torch.inf, torch.nan]))
    assert ends[:6].tolist() == [1, 1, 0.5, 0, 0, 0]
    assert ends[6].isnan()


@pytest.mark.parametrize(("dtype", "most"), [(FP32, 4e-6), (BF16, 3 * 2**-8)], ids=["fp32", "bf16"])
def test_random_options_agree_with_the_reference(dtype, most):
    """Any two features meet at tile ends that no hand-picked case has."""
    draw = random.Random(0)
    for number in range(80):
        G, D = draw.choice((1, 2)), draw.choice((1, 7, 16, 64, 80, 130))
        Tq, Tk = draw.choice((1, 8, 65, 130, 257)), draw.choice((1, 5, 64, 300, 530))
        sizes = (draw.choice((1, 2)), Tq, draw.choice((Tq, Tk)), G * draw.choice((1, 2, 3)), G, D)
        options: dict[str, Any] = {
            "causal": draw.random() < 0.7,
            "window": draw.choice((0, 0, 1, 9, 100)),
            "softcap": draw.choice((0.0, 0.0, 5.0)),
            "dropout": draw.choice((0.0, 0.0, 0.3)),
            "scale": draw.choice((None, 0.2, -0.3, 0.0)),
            "seed": torch.tensor(draw.randrange(2**40)),
        }
        if draw.random() < 0.4:  # in no order, and past the last key
            generator = torch.Generator().manual_seed(number)
            options["seq_start"] = torch.randint(0, sizes[2] + 3, sizes[:2], generator=generator, dtype=torch.int32)
        arguments = [t.to(dtype) for t in tensors(*sizes, seed=number)]
        found = run(attention, *arguments, **options)
        exact = run(ops.attention.reference, *(t.double() for t in arguments), **options)
        scale = max(t.abs().max().item() for t in exact)
        for name, a, b in zip(("y", "dq", "dk", "dv"), found, exact, strict=True):
            assert (a - b).abs().max().item() <= most * scale, f"{number} {name} {sizes} {options}"


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("documents", [False, True], ids=["plain", "documents"])
def test_results_do_not_depend_on_the_number_of_threads(dtype, documents):
    """Bit for bit, also where a head is cut into blocks of queries and of keys because there are more threads than
    heads."""
    arguments = [t.to(dtype) for t in tensors(1, 400, 530, 4, 2, 16)]
    starts = torch.arange(400, dtype=torch.int32)[None] // 150 * 150 if documents else None
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(run(attention, *arguments, seq_start=starts))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_views_of_one_projection_are_read_in_place():
    B, T, H, G, D = 2, 70, 4, 2, 16
    q, k, v, dy = tensors(B, T, T, H, G, D)
    packed = torch.cat([t.flatten(2) for t in (q, k, v)], -1)
    parts = packed.split([H * D, G * D, G * D], -1)
    views = [t.unflatten(-1, (-1, D)) for t in parts]
    assert all(impl_native._unit(t) is t and not t.is_contiguous() for t in views)
    for a, b in zip(run(attention, *views, dy), run(attention, q, k, v, dy), strict=True):
        assert torch.equal(a, b) and a.is_contiguous()


# ----------------------------------------------------------------------------------------------------- hostile values


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_huge_scores_choose_one_key(dtype):
    q, k, v, dy = (t.to(dtype) for t in tensors(1, 40, 40, 1, 1, 16))
    q, k = 1e5 * q, 1e5 * k
    y, *gradients = run(attention, q, k, v, dy)
    exact = run(ops.attention.reference, *(t.double() for t in (q, k, v, dy)))
    torch.testing.assert_close(y.double(), exact[0], rtol=0, atol=1e-6)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("value", [1e30, torch.inf, -torch.inf, torch.nan])
def test_a_key_that_is_hidden_decides_nothing(value, dtype):
    """Keys of later blocks are not read; the scores of those on the diagonal are put aside before any arithmetic."""
    q, k, v, dy = (t.to(dtype) for t in tensors(1, 64, 64, 1, 1, 16))
    clean = run(attention, q, k, v, dy)
    k[:, 35] = value
    y, dq, _, dv = run(attention, q, k, v, dy)
    assert torch.equal(y[:, :35], clean[0][:, :35])
    assert torch.equal(dq[:, :32], clean[1][:, :32])  # 32 to 34 meet 0 · value in the reference too
    assert dv.isfinite().all() or value != 1e30


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_nan_shows_where_it_was_and_what_it_met(dtype):
    q, k, v, dy = (t.to(dtype) for t in tensors(1, 300, 300, 1, 1, 16))
    q[:, 100] = torch.nan
    y, dq, dk, dv = run(attention, q, k, v, dy)
    assert y.isnan().all(-1).flatten().nonzero().flatten().tolist() == [100]
    assert not y[:, :100].isnan().any() and not y[:, 101:].isnan().any()
    assert dq[:, 100].isnan().all() and not dq[:, 101:].isnan().any()
    assert dk[:, :101].isnan().all() and dv[:, :101].isnan().all()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["q", "k", "v", "dy"])
def test_what_is_not_finite_comes_through_in_bf16(which, value):
    """In the last row of an odd number, and the last channel: a product by pairs has zeros beside them. Where the
    reference's row is not finite, this one's is not; rows before it need not meet what they do not see."""
    arguments = [t.bfloat16() for t in tensors(1, 33, 33, 1, 1, 15)]
    arguments[which][:, 32, :, 14] = value
    found = run(attention, *arguments)
    exact = run(ops.attention.reference, *(t.double() for t in arguments))
    assert any(not t[:, 32].isfinite().all() for t in exact)
    for a, b in zip(found, exact, strict=True):
        assert torch.equal(a[:, 32].isfinite(), b[:, 32].isfinite())


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_query_that_sees_nothing_gives_zeros(dtype):
    arguments = [t.to(dtype) for t in tensors(1, 50, 20, 2, 1, 16)]
    y, dq, _, _ = run(attention, *arguments)
    assert not y[:, :30].any() and not dq[:, :30].any()
    assert y[:, 30:].any(-1).all() and dq[:, 31:].any(-1).all()
    nothing = run(attention, *arguments, seq_start=torch.full((1, 50), 20, dtype=torch.int32))
    assert not any(t.any() for t in nothing)


@pytest.mark.parametrize(("B", "Tq", "Tk"), [(0, 3, 3), (1, 0, 4), (1, 4, 0)])
def test_nothing_to_attend_with_or_to(B, Tq, Tk):
    found = run(attention, *tensors(B, Tq, Tk, 2, 1, 8))
    assert [t.shape for t in found] == [(B, Tq, 2, 8), (B, Tq, 2, 8), (B, Tk, 1, 8), (B, Tk, 1, 8)]
    assert not any(t.any() for t in found)


def test_scratch_does_not_grow_with_the_square_of_the_length():
    for backward, most_bytes in ((False, 2 << 20), (True, (2 << 20) + 16384 * 128 * 4)):
        q, k, v, _ = (torch.empty(1, 1, 1, 1).expand(1, 16384, 8, 128) for _ in range(4))
        numbers = impl_native._numbers(q, k, v, None, None, 0, 0.0)
        assert impl_native._scratch_size(0, numbers.buffer_info()[0], backward) * 4 <= most_bytes


# ------------------------------------------------------------------------------------------------- compile, refusals


def test_the_registered_op_passes_opcheck():
    q, k, v, _ = (t.requires_grad_() for t in tensors(1, 9, 12, 2, 1, 8))
    starts = torch.zeros(1, 9, dtype=torch.int32)
    for arguments in ((None, None, True, 0.3, 0, 0.0, 0.0), (starts, torch.tensor(5), True, 0.3, 4, 2.0, 0.1)):
        opcheck(torch.ops.tritium.attention_native.default, (q, k, v, *arguments))


def test_projection_and_attention_are_one_graph():
    torch._dynamo.reset()
    x, weight = torch.randn(2, 20, 12), torch.randn(48, 12)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        q, k, v = (x @ weight.t()).view(2, 20, 3, 2, 8).unbind(2)
        return attention(q, k, v).square().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        value = function(*leaves)
        results.append([value, *torch.autograd.grad(value, leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.ones(1, 4, 2, 8)}, ValueError, r"\(1, 4, 2, 8\) and \(1, 4, 1, 8\)"),
        ({"q": torch.ones(1, 4, 2, 6)}, ValueError, "H a multiple of G"),
        ({"v": torch.ones(1, 4, 1, 8).bfloat16()}, TypeError, "of one dtype; q is torch.float32 and v is torch.bf"),
        ({"q": torch.ones(1, 4, 2, 8).double()}, TypeError, "q is torch.float64 on cpu; choose reference"),
        ({"seq_start": torch.zeros(4, dtype=torch.int32)}, ValueError, r"\(B, Tq\) = \(1, 4\); it is torch.int32 of"),
        ({"seq_start": torch.zeros(1, 4)}, ValueError, "seq_start as integers"),
        ({"dropout": 1.0}, ValueError, r"in \[0, 1\), it is 1.0"),
        ({"dropout": 0.1}, ValueError, "needs a seed tensor"),
    ],
)
def test_it_refuses_what_it_would_misread(change, error, message):
    arguments = {"q": torch.ones(1, 4, 2, 8), "k": torch.ones(1, 4, 1, 8), "v": torch.ones(1, 4, 1, 8)} | change
    with pytest.raises(error, match=message):
        attention(**arguments)


def test_a_site_it_cannot_serve_gets_rule_value_and_remedy():
    cpu = Machine("cpu", "x86_64")
    for dtype in (FP32, BF16):
        assert impl_native.unsupported(Site("attention", cpu, dtype=dtype, shape={"D": 64})) is None
    assert "run on the CPU" in impl_native.unsupported(Site("attention", Machine("cuda", "sm_90")))
    assert "float64; choose reference" in impl_native.unsupported(Site("attention", cpu, dtype=torch.float64))


# ----------------------------------------------------------------------------------------------------- planted faults

# places in the arguments of the C++ functions, and in `numbers`
SEQ_START, NUMBERS, CAUSAL, SCALE, SOFTCAP, KEEP_SCALE, Y, LSE, DY = 4, 5, 6, 7, 8, 9, 10, 11, 12
TK, K_HEAD, V_TIME, WINDOW, SEED = 2, 11, 13, 17, 19


def argument(place: int, value: Callable[[Any], Any]) -> Callable[[list[Any], Any], None]:
    def fault(args: list[Any], numbers: Any) -> None:
        args[place] = value(args[place])

    return fault


def number(place: int, value: Callable[[int], int]) -> Callable[[list[Any], Any], None]:
    def fault(args: list[Any], numbers: Any) -> None:
        numbers[place] = value(numbers[place])

    return fault


FAULTS = {
    "a key less forward": ("_forward", number(TK, lambda n: n - 1), "tiny"),
    "a key less backward": ("_backward", number(TK, lambda n: n - 1), "tiny"),
    "not causal": ("_forward", argument(CAUSAL, lambda _: False), "odd"),
    "backward not causal": ("_backward", argument(CAUSAL, lambda _: False), "odd"),
    "scale backward": ("_backward", argument(SCALE, lambda scale: 1.02 * scale), "odd"),
    "scale forward": ("_forward", argument(SCALE, lambda scale: 1.02 * scale), "odd"),
    "first head for all": ("_forward", number(K_HEAD, lambda _: 0), "grouped"),
    "rows of another head": ("_backward", number(V_TIME, lambda stride: stride // 2), "grouped"),
    "documents forgotten": ("_backward", argument(SEQ_START, lambda _: None), "documents"),
    "a window one wider": ("_forward", number(WINDOW, lambda n: n + 1), "window"),
    "a window one narrower backward": ("_backward", number(WINDOW, lambda n: n - 1), "window"),
    "softcap backward": ("_backward", argument(SOFTCAP, lambda cap: 1.05 * cap), "softcap"),
    "another mask backward": ("_backward", number(SEED, lambda seed: seed ^ 1), "dropout"),
    "weights not rescaled": ("_forward", argument(KEEP_SCALE, lambda _: 1.0), "dropout"),
    "delta of another tensor": ("_backward", argument(Y, lambda _: None), "odd"),
    "lse of the next row": ("_backward", argument(LSE, lambda address: address + 4), "odd"),
}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_turns_the_contract_red(name, dtype, monkeypatch):
    function, plant, at = FAULTS[name]
    true = getattr(impl_native, function)
    made = []  # the numbers of the call under way
    build = impl_native._numbers
    monkeypatch.setattr(impl_native, "_numbers", lambda *args: made.append(build(*args)) or made[-1])

    def faulty(*args: Any) -> None:
        changed = list(args)
        if plant is FAULTS["delta of another tensor"][1]:
            changed[Y] = changed[DY]
        else:
            plant(changed, made[-1])
        true(*changed)

    each = next(c for c in ops.attention.cases.CASES if c.name == at)
    assert contract.check(ops.attention, "native", each, dtype, variants=("plain",)).ok
    monkeypatch.setattr(impl_native, function, faulty)
    assert contract.check(ops.attention, "native", each, dtype, variants=("plain",)).status == "failed"
