"""Planted faults in the norms' kernels. The four ops share them: each fault is looked for by one or two of the ops."""

import pytest
from mutation import Mutant, assert_green, assert_red

from tritium.kernels.case import Case

EXTRA = {"wide": Case("wide", {"N": 1, "C": 16385})}  # rows of several tiles, forward and backward
A, B = ("layer_norm", "add_rms_norm"), ("rms_norm", "add_layer_norm")  # between them, every part that an op can have
LAYER, RMS, ADD = ("layer_norm", "add_layer_norm"), ("rms_norm", "add_rms_norm"), ("add_layer_norm", "add_rms_norm")

FAULTS = [  # ops that must see it, fault, before, after, case
    (A, "last column dropped", "real = columns < C\n    mask =", "real = columns < C - 1\n    mask =", "odd"),
    (B, "eps forgotten", "tl.sum(centred * centred, 1) / C + eps", "tl.sum(centred * centred, 1) / C", "large_eps"),
    (A, "last rows dropped", "tl.cdiv(N, BLOCK_N), P", "N // BLOCK_N, P", "many_rows"),
    (B, "mean(gs) forgotten", "dx = g - normed * mean_gs", "dx = g", "odd"),
    (A, "gradient of weight times 1.02", "dweight += dy * normed", "dweight += 1.02 * dy * normed", "odd"),
    (B, "weight forgotten in g", "g = dy * weight", "g = dy", "odd"),
    (A, "a program's share lost", "(p < P)[:, None]", "(p < P - 1)[:, None]", "many_rows"),
    (B, "gradient of weight of the last rows only", "dweight += dy * normed", "dweight = dy * normed", "many_rows"),
    (A, "wide: squares of the last tile only", "squares += tl.sum(centred * centred, 0)",
     "squares = tl.sum(centred * centred, 0)", "wide"),
    (B, "wide: gs of the last tile only", "sums_gs += g * centred", "sums_gs = g * centred", "wide"),
    (B, "wide: last tile not written", "y.to(Y.dtype.element_ty), real)",
     "y.to(Y.dtype.element_ty), real & (first + BLOCK_C <= C))", "wide"),
    (LAYER, "mean not subtracted", "tl.where(real[None, :], centred - mean[:, None], 0.0)", "centred", "off_centre"),
    (LAYER, "padding in the variance", "tl.where(real[None, :], centred - mean[:, None], 0.0)",
     "centred - mean[:, None]", "odd"),
    (LAYER[:1], "bias forgotten", "if BIAS is not None:", "if BIAS is None:", "odd"),
    (LAYER[1:], "mean(g) forgotten", "dx -= mean_g", "dx -= 0.0 * mean_g", "odd"),
    (LAYER[:1], "gradient of bias of the last rows only", "dbias += dy", "dbias = dy", "many_rows"),
    (LAYER[:1], "wide: what lies between the tiles' means", "squares += further", "squares += 0.0 * further", "wide"),
    (LAYER[1:], "wide: mean of the last tile", "mean += further * share", "mean = tile_mean", "wide"),
    (RMS, "mean of squares of the padding", "centred * centred, 1) / C", "centred * centred, 1) / BLOCK_C", "odd"),
    (ADD, "residual forgotten", "s.to(tl.float32) + residual.to(tl.float32)", "s.to(tl.float32)", "odd"),
    (ADD, "ds forgotten", "dx += tl.load(DS +", "dx += 0.0 * tl.load(DS +", "odd"),
    (ADD[:1], "ds times r", "normed * mean_gs\n", "normed * mean_gs + tl.load(DS + row * stride_ds + columns[None, :], "
     "mask, other=0.0)\n", "odd"),
]  # fmt: skip
MUTANTS = [
    Mutant(op, fault, before, after, case, shared="tritium.kernels.lib.triton_norms")
    for ops, fault, before, after, case in FAULTS
    for op in ops
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_turns_the_contract_red(mutant, tmp_path):
    assert_red(mutant, tmp_path, EXTRA)


@pytest.mark.parametrize("mutant", {(m.op, m.case): m for m in MUTANTS}.values(), ids=lambda m: f"{m.op}: {m.case}")
def test_without_a_fault_these_cases_pass(mutant):
    assert_green(mutant, EXTRA)


def test_every_op_has_five_faults_and_more():
    for op in (*A, *B):
        assert sum(m.op == op for m in MUTANTS) > 5
