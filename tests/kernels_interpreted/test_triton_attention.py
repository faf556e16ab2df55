"""Attention's Triton kernels beyond the contract: any scale, views in place, large scores, keys merged by lse."""

import math

import pytest
import torch
from mutation import Mutant, mutated
from torch.utils._python_dispatch import TorchDispatchMode

from tritium.kernels import contract, ops
from tritium.kernels.attention import impl_triton as attention
from tritium.kernels.attention import reference
from tritium.kernels.attention_lse import impl_triton as attention_lse
from tritium.kernels.case import Case
from tritium.kernels.site import Machine

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
HALF_ULP = 2.0**-24


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(function, leaves, *upstream, **options) -> list[torch.Tensor]:
    """Outputs and gradients of fresh leaves with the same strides."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    outputs = function(*leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = torch.autograd.grad(outputs, leaves, upstream)
    return [*(o.detach() for o in outputs), *found]


# --------------------------------------------------------------------------------------------------------------- views


def packed(B: int, T: int, H: int, G: int, D: int) -> list[torch.Tensor]:
    """q, k, v as views of one projection (B, T, (H + 2G)·D), as the model makes them."""
    qkv = random(B, T, (H + 2 * G) * D)
    parts = qkv.split((H * D, G * D, G * D), dim=-1)
    return [part.unflatten(-1, (heads, D)) for part, heads in zip(parts, (H, G, G), strict=True)]


class Moved(TorchDispatchMode):
    """The aten operations that were called, but for allocations and views."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        if not (func.is_view or name.startswith("empty") or name in ("detach", "set_")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launched(monkeypatch):
    """Kernels are not run but asked for the tensors they are given."""
    given = []
    for name in ("_forward", "_delta", "_backward_keys", "_backward_queries"):
        monkeypatch.setattr(attention, f"{name}_kernel", lambda grid, constants, *args: given.append(args))
    return given


@pytest.mark.parametrize("with_lse", [False, True])
def test_views_of_one_projection_are_read_where_they_lie(launched, with_lse):
    q, k, v = packed(2, 9, 4, 2, 8)
    dy = random(2, 4, 9, 8).transpose(1, 2)
    natural, dlse = (torch.empty(2, 4, 9), torch.empty(9, 4, 2).permute(2, 1, 0)) if with_lse else (None, None)
    with Moved() as moved:
        y, lse = attention.forward(q, k, v, None, None, True, 0.3, 0, 0.0, 0.0, natural)
        attention.backward(dy, dlse, q, k, v, None, None, y, lse, True, 0.3, 0, 0.0, 0.0)
    assert moved.names == []
    assert len(launched) == 4
    for call in (launched[0], launched[2], launched[3]):
        for tensor, view in zip(call[:3], (q, k, v), strict=True):
            assert (tensor.data_ptr(), tensor.stride()) == (view.data_ptr(), view.stride())
    assert launched[2][3].data_ptr() == launched[3][3].data_ptr() == launched[1][1].data_ptr() == dy.data_ptr()
    gaps = q.mT.contiguous().mT
    with Moved() as moved:  # the watch itself: a last axis with gaps must be copied
        attention.forward(gaps, k, v, None, None, True, 0.3, 0, 0.0, 0.0)
    assert moved.names == ["clone"]


@pytest.mark.parametrize("name", ["attention", "attention_lse"])
def test_views_of_one_projection_give_what_copies_give(name):
    leaves = packed(2, 9, 4, 2, 8)
    dy = random(2, 4, 9, 8, seed=1).transpose(1, 2)
    upstream = (dy, random(9, 4, 2, seed=2).permute(2, 1, 0))[: 2 if name == "attention_lse" else 1]
    function = ops.OPS[name].load("triton").function
    found = gradients(function, leaves, *upstream, window=5)
    copies = gradients(function, [t.contiguous() for t in leaves], *(g.contiguous() for g in upstream), window=5)
    assert all(torch.equal(a, b) for a, b in zip(found, copies, strict=True))
    exact = gradients(ops.OPS[name].reference, leaves, *upstream, window=5)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


def test_time_steps_too_far_apart_for_32_bits_are_brought_together(launched):
    far = torch.empty_strided((1, 2, 1, 8), (0, 2**24, 8, 1), device="meta")
    near = torch.empty(1, 2, 1, 8, device="meta")
    attention.forward(far, near, near, None, None, True, 1.0, 0, 0.0, 0.0)
    assert launched[0][0].stride() == near.stride()
    assert launched[0][1] is near


# --------------------------------------------------------------------------------------------------------------- scale


def test_scale_zero_weighs_every_visible_key_alike():
    leaves = [random(1, 5, 1, 8, seed=i) for i in range(3)]
    y, dq, dk, dv = gradients(attention.attention, leaves, torch.ones(1, 5, 1, 8), scale=0.0)
    counts = torch.arange(1.0, 6.0)
    torch.testing.assert_close(y, leaves[2].cumsum(1) / counts[None, :, None, None])
    torch.testing.assert_close(dv[0, :, 0, 0], (1 / counts).flip(0).cumsum(0).flip(0))
    assert not dq.any()
    assert not dk.any()


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_a_negative_scale_is_the_positive_one_of_negated_queries(softcap):
    q, k, v, dy = (random(1, 7, 2, 8, seed=i) for i in range(4))
    y, dq, dk, dv = gradients(attention.attention, (q, k, v), dy, scale=-0.6, softcap=softcap)
    other = gradients(attention.attention, (-q, k, v), dy, scale=0.6, softcap=softcap)
    for found, want in zip((y, -dq, dk, dv), other, strict=True):
        assert torch.equal(found, want)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 2])
def test_no_scale_is_refused(scale):
    for arch in ("sm_80", "sm_90", "sm_100"):
        machine = Machine("cuda", arch, packages={"triton": "3.6.0"})
        for name in ("attention", "attention_lse"):
            case = Case("scaled", {"D": 64}, {"scale": scale})
            site = contract.site_of(ops.OPS[name], case, BF16, machine)
            assert ops.OPS[name].load("triton").unsupported(site) is None


# -------------------------------------------------------------------------------------------------------- large scores

HUGE = Case("huge", {"B": 1, "Tq": 20, "Tk": 20, "H": 2, "G": 2, "D": 16}, {"scale": 50.0})  # scores of some hundreds


@pytest.mark.parametrize(("dtype", "phase"), [(BF16, "train"), (FP16, "train"), (FP32, "eval")])
def test_scores_of_hundreds_keep_the_contract(dtype, phase):
    report = contract.check(ops.attention, "triton", HUGE, dtype, phase=phase, variants=("plain",))
    assert report.ok, report


def test_gradients_in_fp32_are_as_exact_as_the_saved_lse():
    """p is made again from an lse that fp32 rounds: by half an ulp of it, as in every kernel that saves an lse."""
    arguments = ops.attention.cases.inputs(HUGE, FP32, "cpu", 0)
    leaves, dy = [arguments[n] for n in "qkv"], random(1, 20, 2, 16, seed=9)
    found = gradients(attention.attention, leaves, dy, scale=50.0)
    exact = gradients(ops.attention.reference, [t.double() for t in leaves], dy.double(), scale=50.0)
    _, lse = ops.attention_lse.reference(*leaves, scale=50.0)
    assert lse.abs().max() > 300
    largest_q, largest_k, _ = (t.abs().max() for t in leaves)
    dp = torch.einsum("bihd,bjhd->bhij", dy, leaves[2]).abs().max()
    sizes = (50.0 * dp * largest_k, 50.0 * dp * largest_q, dy.abs().max())
    for got, want, size in zip(found[1:], exact[1:], sizes, strict=True):
        assert (got - want).abs().max() < 2 * HALF_ULP * lse.abs().max() * size


# ----------------------------------------------------------------------------------------------------------------- lse


def merged(attend, q, k, v, cut: int):
    """Causal attention in three pieces: early queries on early keys, late queries on early keys, all on late keys."""
    early, late = attend(q[:, :cut], k[:, :cut], v[:, :cut]), attend(q[:, cut:], k[:, :cut], v[:, :cut], causal=False)
    y1, lse1 = torch.cat((early[0], late[0]), 1), torch.cat((early[1], late[1]), 2)
    y2, lse2 = attend(q, k[:, cut:], v[:, cut:])  # the early queries see none of these keys
    lse = torch.logaddexp(lse1, lse2)
    weight1, weight2 = ((part - lse).exp().transpose(1, 2)[..., None] for part in (lse1, lse2))
    return weight1 * y1 + weight2 * y2, lse


def test_two_halves_of_the_keys_merged_by_their_lse_are_attention_over_all():
    q, k, v = random(2, 13, 4, 8), random(2, 13, 2, 8, seed=1), random(2, 13, 2, 8, seed=2)
    upstream = random(2, 13, 4, 8, seed=3), random(2, 4, 13, seed=4)
    whole = gradients(attention_lse.attention_lse, (q, k, v), *upstream)
    halves = gradients(lambda q, k, v: merged(attention_lse.attention_lse, q, k, v, 6), (q, k, v), *upstream)
    wide = [t.double() for t in (q, k, v)]
    exact = gradients(ops.attention_lse.reference, wide, *(g.double() for g in upstream))
    for a, b, c in zip(whole, halves, exact, strict=True):
        torch.testing.assert_close(a.double(), c, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(b.double(), c, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole[0], attention.attention(q, k, v), rtol=0, atol=0)


def test_an_output_that_the_loss_does_not_use():
    leaves = [random(1, 6, 2, 8, seed=i).requires_grad_() for i in range(3)]
    for index in (0, 1):
        found, want = (
            torch.autograd.grad(f(*leaves)[index].sum(), leaves, allow_unused=True, materialize_grads=True)
            for f in (attention_lse.attention_lse, ops.attention_lse.reference)
        )
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_whatever_comes_back_for_the_lse_of_a_blind_query_is_nothing(backend):
    q, k, v = random(1, 7, 1, 8), random(1, 3, 1, 8, seed=1), random(1, 3, 1, 8, seed=2)  # four queries see no key
    dy, dlse = random(1, 7, 1, 8, seed=3), random(1, 1, 7, seed=4)
    function = ops.attention_lse.load(backend).function
    clean = gradients(function, (q, k, v), dy, dlse)
    assert (clean[1][..., :4] == -torch.inf).all()
    assert clean[1][..., 4:].isfinite().all()
    dlse[..., :4] = torch.inf
    for a, b in zip(clean, gradients(function, (q, k, v), dy, dlse), strict=True):
        assert torch.equal(a, b)
    assert all(g.isfinite().all() for g in clean[2:])


# ---------------------------------------------------------------------------------------------------------------- cases


@pytest.mark.parametrize("case", [c for c in ops.attention.cases.CASES if not c.large], ids=str)
def test_zeros_are_asked_of_every_query_that_sees_no_key_and_every_key_that_none_sees(case):
    arguments = ops.attention.cases.inputs(case, FP32, "cpu")
    options = {n: arguments.get(n, d) for n, d in (("seq_start", None), ("causal", True), ("window", 0))}
    _, hidden = reference.masked_scores(arguments["q"], arguments["k"], scale=None, softcap=0.0, **options)
    B, Tq, Tk = (case.shape[letter] for letter in ("B", "Tq", "Tk"))
    seen = ~hidden[:, 0, 0].expand(B, Tq, Tk)
    zeros = ops.attention.cases.exact_zeros(case, arguments)
    for name, axis, tensor in (("output", 2, "q"), ("gradient of q", 2, "q"),
                               ("gradient of k", 1, "k"), ("gradient of v", 1, "v")):  # fmt: skip
        assert torch.equal(zeros[name], ~seen.any(axis)[:, :, None, None].expand(arguments[tensor].shape))


def test_starts_lie_before_the_keys_beyond_the_query_and_beyond_the_keys_in_no_order():
    (case,) = (c for c in ops.attention.cases.CASES if c.name == "starts_anywhere")
    start, i, T = ops.attention.cases.seq_start(case), torch.arange(case.shape["Tq"]), case.shape["Tk"]
    assert (start < 0).any()
    assert ((start > i) & (start < T)).any()
    assert (start[:, :-10].diff() < 0).any()
    assert (start > T).any()


@pytest.mark.parametrize("name", ["attention", "attention_lse"])
def test_cases_hold_every_two_circumstances_together(name):
    """Beside the options of the signature: grouped heads, and as many, more or fewer queries than keys."""

    def facts(case: Case) -> dict[str, object]:
        shape, given = case.shape, case.options
        scale = given.get("scale")
        return {
            "queries": (shape["Tq"] > shape["Tk"]) - (shape["Tq"] < shape["Tk"]), "grouped": shape["H"] > shape["G"],
            "causal": given.get("causal", True), "documents": bool(given.get("documents")),
            "window": bool(given.get("window")), "softcap": bool(given.get("softcap")),
            "scale": None if scale is None else (scale > 0) - (scale < 0), "dropout": bool(given.get("dropout")),
        }  # fmt: skip

    found = [facts(case) for case in ops.OPS[name].cases.CASES if not case.large]
    special = {
        "queries": (-1, 1), "grouped": (True,), "causal": (False,), "documents": (True,), "window": (True,),
        "softcap": (True,), "scale": (-1, 0), "dropout": (True,),
    }  # fmt: skip
    if name == "attention_lse":
        del special["dropout"]
    pairs = [
        {a: x, b: y} for a in special for b in special if a < b for x in special[a] for y in special[b]
    ]  # fmt: skip
    pairs.remove({"causal": False, "queries": 1})  # without a causal mask no query is blind
    lacking = [pair for pair in pairs if not any(pair.items() <= facts.items() for facts in found)]
    assert lacking == []


ENDS = {  # 40 queries: the last tile of 32 has rows that do not exist
    "causal": {}, "full": {"causal": False}, "window": {"window": 7}, "softcap": {"softcap": 3.0},
    "dropout": {"dropout": 0.2},
}  # fmt: skip


def gradients_with_a_key_of_minus_infinity(function, at: int, **options) -> list[torch.Tensor]:
    """y, dk, dv where key ``at`` has a -∞ that every query turns into a score of -∞. (dq is 0·∞ in the reference.)"""
    q, k, v, dy = (random(1, 40, 2, 8, seed=i) for i in range(4))
    q[..., 0] = q[..., 0].abs() + 0.1
    k[:, at, :, 0] = -torch.inf
    if options.get("dropout"):
        options["seed"] = torch.tensor(5)
    y, _, dk, dv = gradients(function, (q, k, v), dy, **options)
    return [y, dk, dv]


@pytest.mark.parametrize("at", [3, 39])
@pytest.mark.parametrize("options", ENDS.values(), ids=ENDS)
def test_keys_of_minus_infinity_weigh_nothing_and_are_not_seen_by_rows_past_the_end(options, at):
    want = gradients_with_a_key_of_minus_infinity(ops.attention.reference, at, **options)
    assert all(t.isfinite().all() for t in want)
    found = gradients_with_a_key_of_minus_infinity(attention.attention, at, **options)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("s = tl.where((i < Tq)[None, :], s, 0.0)", "s = s"),
        ("    tail = tl.maximum(tl.maximum(tail, 0) // BLOCK_M * BLOCK_M, whole)", "    pass"),
    ],
)
def test_without_the_mask_of_rows_past_the_end_such_a_keys_gradient_is_nan(before, after, tmp_path):
    mutant = Mutant("attention", f"rows past the end {after.strip()}", before, after, "")
    _, dk, dv = gradients_with_a_key_of_minus_infinity(mutated(mutant, tmp_path).function, 3, causal=False)
    assert dk[:, 3].isnan().any()
    assert dv[:, 3].isnan().any()
    assert not dv[:, 4:].isnan().any()


@pytest.mark.parametrize("window", [2**31 - 1, 2**31 - 4, 2**63 - 1])
def test_a_window_wider_than_any_row_is_none(window):
    q, k, v = (torch.randn(1, 6, 2, 8, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3))
    found = [
        (y, *torch.autograd.grad(y.square().sum(), (q, k, v)))
        for y in (attention.attention(q, k, v, window=w) for w in (0, window))
    ]
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_a_row_of_very_low_scores_sees_its_keys():
    q, v = torch.full((1, 3, 1, 8), 1e15), torch.randn(1, 3, 1, 8)
    y = attention.attention(q, -q, v, causal=False)
    torch.testing.assert_close(y, v.mean(1, keepdim=True).expand_as(y))


def test_long_strides_of_the_gradient_are_read_within_32_bits():
    """dy whose rows lie 8.5 million elements apart, as wide heads of many rows would: 256 rows of it pass 2³¹."""
    assert attention._delta_constants(8)["BLOCK_M"] <= attention.MAX_ROWS
    assert (
        max(max(t.BLOCK_M, t.BLOCK_N) for t in (*attention.TILES.values(), *attention.SMALLER.values()))
        <= attention.MAX_ROWS
    )
    base = torch.empty(2**25, dtype=torch.float16, device="meta")
    near, far = (base.as_strided((1, 2, 1, 8), (8, stride, 8, 1)) for stride in (2**24 - 1, 2**24))
    assert attention._dense(near) is near
    assert attention._dense(far) is not far


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_scale_that_is_no_number_is_refused(scale):
    q = torch.zeros(1, 2, 1, 8)
    with pytest.raises(ValueError, match="finite scale"):
        attention.attention(q, q, q, scale=scale)


@pytest.mark.parametrize("backend", ["reference", "triton", "native", "sdpa", "sdpa_flash", "flex"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        *(({"softcap": value}, "a finite softcap of at least 0") for value in (-1.0, math.nan, math.inf)),
        *(({"dropout": value}, r"a dropout in \[0, 1\)") for value in (-0.1, 1.0, 1.5, math.nan)),
    ],
)
def test_a_softcap_or_dropout_out_of_its_range_is_refused(options, words, backend):
    q = torch.zeros(1, 2, 1, 16)
    (value,) = options.values()
    names = (
        ["attention"]
        if "dropout" in options or backend not in ("reference", "triton")
        else ["attention", "attention_lse"]
    )
    for name in names:
        more = {"seed": torch.tensor(1)} if "dropout" in options else {}
        with pytest.raises(ValueError, match=f"{words}.*it is {value}: .*; 0 leaves it out"):
            ops.OPS[name].load(backend).function(q, q, q, **options, **more)


@pytest.mark.parametrize("op", ["attention", "attention_lse"])
@pytest.mark.parametrize("begins", [64, 65, 200])
def test_padding_whose_document_never_starts_sees_nothing_and_reaches_no_key(op, begins):
    """Queries from 32 on have a seq_start beyond all keys; their keys must get a gradient of zero to the bit, and the
    others that of the reference."""
    T, H = 64, 1
    q, k, v, dy = (torch.randn(1, T, H, 16, generator=torch.Generator().manual_seed(i)) for i in range(4))
    start = torch.zeros(1, T, dtype=torch.int32)
    start[:, 32:] = begins
    found = {}
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        y = ops.OPS[op].load(backend).function(*leaves, start)
        y = y[0] if op == "attention_lse" else y
        found[backend] = (y, *torch.autograd.grad(y, leaves, dy))
    for got, wanted in zip(found["triton"], found["reference"], strict=True):
        assert (got[:, 32:] == 0).all()
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
