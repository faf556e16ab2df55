"""Cases: complete, deterministic, and their FLOPs and bytes right where something else can count them."""

import inspect

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tritium.kernels import contract, ops
from tritium.kernels.case import Case


def case(op: str, name: str) -> Case:
    return next(c for c in ops.OPS[op].cases.CASES if c.name == name)


def flat(value: object) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in flat(v)]
    return [value] if isinstance(value, Tensor) else []


@pytest.mark.parametrize("name", ops.OPS)
def test_cases_are_complete_and_named_once(name):
    op = ops.OPS[name]
    cases = op.cases
    assert cases.__doc__
    names = [c.name for c in cases.CASES]
    assert len(names) == len(set(names))
    assert any(c.large for c in cases.CASES)
    assert sum(not c.large for c in cases.CASES) >= 5
    for c in cases.CASES:
        for count in (cases.flops(c), cases.flops_backward(c), cases.bytes(c, torch.bfloat16)):
            assert isinstance(count, int)
            assert count >= 0
        if c.large and not op.has_gradient and not op.updates:
            assert cases.bytes(c, torch.bfloat16) > 1e6
            assert cases.bytes_backward(c, torch.bfloat16) == cases.flops_backward(c) == 0
        elif c.large and op.has_gradient:
            assert cases.bytes_backward(c, torch.bfloat16) >= cases.bytes(c, torch.bfloat16) > 1e6
            assert cases.bytes(c, torch.float32) > cases.bytes(c, torch.bfloat16)


@pytest.mark.parametrize("name", ops.OPS)
def test_inputs_fit_the_signature_and_follow_the_seed(name):
    op = ops.OPS[name]
    for c in op.cases.CASES:
        if c.large:
            continue
        first, again, other = (op.cases.inputs(c, torch.bfloat16, "cpu", seed) for seed in (0, 0, 1))
        op.signature.bind(**first)
        tensors = [flat(v) for v in (list(first.values()), list(again.values()), list(other.values()))]
        assert all(contract._same_bits(a, b) for a, b in zip(tensors[0], tensors[1], strict=True))
        if sum(t.numel() for t in tensors[0] if t.requires_grad or (op.updates and t.dim())) > 8:
            assert not all(contract._same_bits(a, b) for a, b in zip(tensors[0], tensors[2], strict=True))
        leaves = [v for v in first.values() if isinstance(v, Tensor) and v.requires_grad]
        assert bool(leaves) == (op.has_gradient and first.get("with_grad", True))
        for value in first.values():
            for tensor in flat(value):
                assert tensor.device.type == "cpu"


def counted(op: str, c: Case) -> tuple[int, int]:
    """FLOPs of the reference, forward and backward, by torch's counter, on shapes alone."""
    arguments = ops.OPS[op].cases.inputs(c, torch.float32, "cpu", 0)
    with FlopCounterMode(display=False) as forward:
        y = ops.OPS[op].reference(**arguments)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("name", ["odd", "no_bias", "three_axes"])
def test_linears_flops_are_those_torch_counts(name):
    c = case("linear", name)
    N = torch.Size(ops.linear.cases.leading(c)).numel()
    bias = N * c.shape["F"] if c.options.get("bias", True) else 0  # the counter sees GEMMs only
    forward, backward = counted("linear", c)
    assert ops.linear.cases.flops(c) - bias == forward
    assert ops.linear.cases.flops_backward(c) - bias == backward


def test_linear_cross_entropys_gemms_are_those_torch_counts():
    c = case("linear_cross_entropy", "odd")
    N, V = c.shape["N"], c.shape["V"]
    cases = ops.linear_cross_entropy.cases
    assert (cases.flops(c) - 5 * N * V, cases.flops_backward(c) - 4 * N * V) == counted("linear_cross_entropy", c)


def test_attentions_flops_count_the_visible_pairs():
    cases = ops.attention.cases
    c = case("attention", "full")  # everything is visible: torch counts the same, but for the backward's recomputation
    forward, backward = counted("attention", c)
    assert cases.flops(c) == forward
    assert cases.flops_backward(c) == backward * 5 // 4
    for c in cases.CASES:
        if c.large or not c.shape["B"]:
            continue
        # with v = 1 and scale 0 every visible key weighs the same, so the weights' squares count them
        arguments = cases.inputs(c, torch.float64, "cpu", 0)
        B, Tk, G, _ = arguments["k"].shape
        arguments["v"] = torch.eye(Tk, dtype=torch.float64)[None, :, None].expand(B, Tk, G, Tk)
        q = torch.zeros(*arguments["q"].shape[:3], Tk, dtype=torch.float64)
        k = torch.zeros(B, Tk, G, Tk, dtype=torch.float64)
        options = {n: v for n, v in arguments.items() if n not in ("q", "k", "v", "dropout", "seed")}
        weights = ops.attention.reference(q, k, arguments["v"], **options)
        assert cases.visible(c) == int((weights[:, :, 0] > 0).sum()), c


def test_gpt2_124m_against_literals():
    """One layer's attention at B=16, T=1024: 4 H D T(T+1)/2 B; the head's GEMM: 2 N C Vp."""
    c = case("attention", "gpt2_124m_1k")
    assert ops.attention.cases.flops(c) == 4 * 12 * 64 * (1024 * 1025 // 2) * 16 == 25_794_969_600
    assert ops.attention.cases.flops_backward(c) == 64_487_424_000
    assert ops.attention.cases.bytes(c, torch.bfloat16) == 4 * 16 * 1024 * 768 * 2
    c = case("linear_cross_entropy", "gpt2_124m")
    assert ops.linear_cross_entropy.cases.flops(c) == 2 * 8192 * 768 * 50304 + 5 * 8192 * 50257
    c = case("layer_norm", "gpt2_124m")
    assert ops.layer_norm.cases.bytes(c, torch.bfloat16) == 2 * 16384 * 768 * 2 + 2 * 768 * 2
    c = case("adamw", "gpt2_124m")
    assert ops.adamw.cases.bytes(c, torch.bfloat16) == 28 * sum(
        torch.Size(s).numel() for s in ops.adamw.cases.shapes(c)
    )  # fmt: skip


def test_the_shapes_that_matter_are_there():
    widths = {c.shape["C"] for c in ops.layer_norm.cases.CASES if c.large}
    assert {768, 1024, 1280, 1600} <= widths
    heads = {(c.shape["D"], c.shape["Tq"]) for c in ops.attention.cases.CASES if c.large}
    assert {(D, T) for D in (64, 128) for T in (1024, 4096, 16384)} <= heads
    assert any(c.shape["Vp"] == 50304 and c.large for c in ops.cross_entropy.cases.CASES)


def test_small_attention_cases_cover_every_option():
    cases = [c for c in ops.attention.cases.CASES if not c.large]
    named = {o for c in cases for o in c.options}
    parameters = set(inspect.signature(ops.attention.reference).parameters) - {"q", "k", "v", "seq_start", "seed"}
    assert parameters | {"documents"} == named
    assert any(c.shape["H"] > c.shape["G"] > 1 for c in cases)
    assert any(c.shape["Tq"] > c.shape["Tk"] for c in cases)
    assert any(1 < c.shape["Tq"] < c.shape["Tk"] for c in cases)
