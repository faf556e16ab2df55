"""Planted faults in the kernels of gelu, swiglu, geglu, relu2, rope and embedding."""

import pytest
import torch
from mutation import Mutant, assert_green, assert_red

BF16 = torch.bfloat16
SHARED = "tritium.kernels.lib.triton_pointwise"


def pointwise(op: str, name: str, before: str, after: str, case: str, dtype: torch.dtype = torch.float32) -> Mutant:
    return Mutant(op, name, before, after, case, dtype, SHARED)


MUTANTS = [
    # gelu
    pointwise("gelu", "last tile of columns dropped", "mask & (columns < F)",
              "mask & (columns < F // BLOCK_F * BLOCK_F)", "several_tiles"),
    pointwise("gelu", "last row dropped", "mask = rows < N\n", "mask = rows < N - 1\n", "odd"),
    pointwise("gelu", "cubic term", "0.044715 * z * z", "0.0449 * z * z", "odd"),
    pointwise("gelu", "cubic term of the slope", "0.26829", "0.0", "odd"),
    pointwise("gelu", "gradient times 1.02", "dx = dy * slope", "dx = dy * slope * 1.02", "three_axes"),
    pointwise("gelu", "density forgotten", "distribution + x * density", "distribution", "exact"),
    pointwise("gelu", "a coefficient of the distribution", "0.2901137143985035", "0.2901237143985035", "exact"),
    pointwise("gelu", "tails not saturated: ∞·0", "z = _saturate(x)", "z = x * 1e16", "extremes"),
    Mutant("gelu", "always by tanh", 'pointwise.gelu_activation("gelu", approximate)', '"gelu_tanh"', "exact"),
    Mutant("gelu", "backward always by tanh", "pointwise.GELU[approximate]", '"gelu_tanh"', "exact"),
    # relu2
    pointwise("relu2", "no rectification", "tl.where(x <= 0, 0.0, x)", "x", "odd"),
    pointwise("relu2", "not squared", "positive * positive, 2", "positive, 2", "odd"),
    pointwise("relu2", "slope without its 2", "2 * positive", "positive", "odd"),
    pointwise("relu2", "gradient without dy", "dx = dy * slope", "dx = slope", "many"),
    pointwise("relu2", "columns of the first tile only", "columns = tile * BLOCK_F", "columns = 0 * BLOCK_F",
              "several_tiles"),
    # swiglu
    pointwise("swiglu", "up read where gate is", "tl.load(UP + rows * stride_up", "tl.load(UP + rows * F", "packed"),
    pointwise("swiglu", "gate's rows taken for dense", "x.is_contiguous()", "x.shape[0] > 0", "packed"),
    pointwise("swiglu", "derivative of the sigmoid forgotten", "s + x * ds", "s", "odd"),
    pointwise("swiglu", "dup without the sigmoid", "(dy * value)", "(dy * gate)", "odd"),
    pointwise("swiglu", "dgate without up", "(dy * up * slope)", "(dy * slope)", "many"),
    pointwise("swiglu", "dgate times 1.02", "(dy * up * slope)", "(dy * up * slope * 1.02)", "many", BF16),
    pointwise("swiglu", "exponential overflows", "tl.exp2(tl.abs(z) * -LOG2E)", "tl.exp2(z * -LOG2E)", "extremes"),
    Mutant("swiglu", "gelu for silu", '"silu"', '"gelu_tanh"', "odd"),
    # geglu
    pointwise("geglu", "product with the gate", "(value * up)", "(value * gate)", "odd"),
    pointwise("geglu", "dup is dy·up", "(dy * value)", "(dy * up)", "packed"),
    pointwise("geglu", "dup times 1.02", "(dy * value)", "(dy * value * 1.02)", "exact", BF16),
    pointwise("geglu", "last rows dropped", "mask = rows < N\n", "mask = rows < N // BLOCK_N * BLOCK_N\n", "many"),
    pointwise("geglu", "density of another width", "e * ROOT_1_OVER_2PI", "e * e * ROOT_1_OVER_2PI", "packed_exact"),
    Mutant("geglu", "backward always by erf", "pointwise.GELU[approximate]", '"gelu_erf"', "odd"),
    # rope
    Mutant("rope", "turned the other way", "a * cos - b * sin", "a * cos + b * sin", "odd"),
    Mutant("rope", "backward turns forward", "_launch(dq, dk, cos, sin, True)", "_launch(dq, dk, cos, sin, False)",
              "grouped"),
    Mutant("rope", "positions of the first row for all", "b * stride_ab + t", "0 * stride_ab + t", "per_row"),
    Mutant("rope", "pairs are neighbours of D/2", "(columns[None, None, :] + HALF)",
           "(columns[None, None, :] + D // 2)", "partial"),
    Mutant("rope", "the rest is zero", "tl.store(Y + columns, tl.load(X + columns, mask), mask)",
           "tl.store(Y + columns, tl.load(X + columns, mask) * 0, mask)", "mostly_rest"),
    Mutant("rope", "last channel of the rest forgotten", "mask & (columns < D)", "mask & (columns < D - 1)",
              "odd_head"),
    Mutant("rope", "last heads forgotten", "mask & (heads < H)", "mask & (heads < H // BLOCK_H * BLOCK_H)",
              "many_heads"),
    Mutant("rope", "heads taken for dense", "*k.stride()[:3]", "*(k.shape[1] * k.shape[2] * k.shape[3], "
           "k.shape[2] * k.shape[3], k.shape[3])", "packed"),
    Mutant("rope", "last tokens forgotten", "real = tokens < N", "real = tokens < N // BLOCK_N * BLOCK_N",
              "many_tokens"),
    Mutant("rope", "cos in the compute dtype", "tl.load(COS + angle[:, None] + columns[None, :], known, other=0.0)",
           "tl.load(COS + angle[:, None] + columns[None, :], known, other=0.0).to(tl.float16)", "odd"),
    # embedding
    Mutant("embedding", "ids by one", "WEIGHT + ids[:, None] *", "WEIGHT + (ids[:, None] ^ 1) *", "two_axes"),
    Mutant("embedding", "last columns forgotten", "mask & (columns < C)", "mask & (columns < C // BLOCK_C * BLOCK_C)",
              "several_tiles"),
    Mutant("embedding", "gradient times 1.02", "total.to(DWEIGHT", "(total * 1.02).to(DWEIGHT", "odd"),
    Mutant("embedding", "first of a run only", "mask = at < last", "mask = at < tl.minimum(last, first + 1)",
           "repeated"),
    Mutant("embedding", "whole chunks forgotten", "total = _add_rows(total, SUMS, None, first, last,",
           "total = _add_rows(total, SUMS, None, first, first,", "one_id"),
    Mutant("embedding", "the first whole chunk forgotten", "total = _add_rows(total, SUMS, None, first, last,",
           "total = _add_rows(total, SUMS, None, first + 1, last,", "long_runs"),
    Mutant("embedding", "what follows the chunks forgotten", "DY, ORDER, tail, end,", "DY, ORDER, end, end,",
              "long_runs"),
    Mutant("embedding", "runs begin by one late", "low = tl.where(open_ & below, middle + 1, low)",
           "low = tl.where(open_ & (below | (middle == 0)), middle + 1, low)", "text"),
    Mutant("embedding", "summed in 16 bits", "total += tl.load(ROWS",
           "total = total.to(tl.float16).to(tl.float32) + tl.load(ROWS", "one_id"),
    Mutant("embedding", "the last row is never written", "mask = (v < V)[:, None]", "mask = (v < V - 1)[:, None]",
              "odd"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_turns_the_contract_red(mutant, tmp_path):
    assert_red(mutant, tmp_path)


# in fp32 test_triton_pointwise.py runs every case
@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.dtype != torch.float32], ids=str)
def test_without_a_fault_these_cases_pass(mutant):
    assert_green(mutant)
