"""Planted faults in the losses kernels."""

import pytest
import torch
from mutation import Mutant, assert_green, assert_red

MUTANTS = [
    Mutant("cross_entropy", "padding in lse", "mask = full + columns < V", "mask = full + columns < V + 1", "padded"),
    Mutant("cross_entropy", "last tile dropped", "if full < V:", "if full > V:", "several_tiles"),
    Mutant("cross_entropy", "sum not rescaled", "sums * tl.exp2((top - new_top) * LOG2E)", "sums", "several_tiles"),
    Mutant("cross_entropy", "ignored rows counted", "if target == ignore_index:", "if target == V + 7:",
           "ignore_index_in_range"),
    Mutant("cross_entropy", "padding's gradient not zero", "tl.where(real, dz, 0.0)", "tl.where(real, dz, 1e-3)",
           "padded"),
    Mutant("cross_entropy", "z_loss not differentiated", "2 * z_loss * lse, 0.0", "z_loss * lse, 0.0", "z_loss"),
    Mutant("cross_entropy", "smoothing over the padding", "dloss * (smoothing / V)", "dloss * (smoothing / Vp)",
           "smoothing"),
    Mutant("cross_entropy", "gradient times 1.02", "scale = dloss *", "scale = 1.02 * dloss *", "odd"),
    Mutant("cross_entropy", "softcap not differentiated", "dz *= 1 -", "dz *= 1 - 0 *", "softcap"),
    Mutant("cross_entropy", "in one pass: ignored rows keep what was there", "_row_zeros(DROW, Vp, BLOCK_V)\n    else:",
           "pass\n    else:", "mean"),
    Mutant("cross_entropy", "in one pass: the mean's count forgotten", "upstream = tl.load(UPSTREAM)",
           "upstream = 1.0 + 0 * tl.load(UPSTREAM)", "mean"),
    Mutant("cross_entropy", "in one pass: the mean over all rows", "share = 1 / counted_rows(targets, ignore_index)",
           "share = torch.tensor(1 / max(targets.numel(), 1))", "mean"),
    Mutant("cross_entropy", "in one pass: upstream gradient taken for one", "if factor != 1:", "if factor == 1:",
           "sum"),
    Mutant("cross_entropy", "in one pass: last block not scaled", "tl.cdiv(size, BLOCK), tl.num_programs(0)",
           "size // BLOCK, tl.num_programs(0)", "sum"),
    Mutant("cross_entropy", "-∞ taken for the row's maximum", "tl.full((), -3.4028234663852886e38, tl.float32)",
           'tl.full((), float("-inf"), tl.float32)', "first_tile_minus_infinity"),
    Mutant("linear_cross_entropy", "gradient of weight not accumulated", "if add:", "if False:", "chunks"),
    Mutant("linear_cross_entropy", "fp16 lifted as if there were no z_loss", "most = 1 + 2 * z_loss *",
           "most = 1 + 0 * z_loss *", "large_z_loss", torch.float16),
    Mutant("linear_cross_entropy", "fp16 lifted and let down by different factors",
           "lifted = boost(vocab_size, z_loss, softcap)", "lifted = boost(vocab_size, 0.0, softcap)",
           "large_z_loss_softcap", torch.float16),
    Mutant("linear_cross_entropy", "last chunk dropped", "in range(0, N, n):", "in range(0, N // n * n, n):", "chunks"),
    Mutant("linear_cross_entropy", "upstream gradient forgotten", "x * tl.load(FACTOR).to(tl.float32)", "x", "tiny"),
    Mutant("linear_cross_entropy", "upstream gradient in bf16", "factor, y, x.numel()",
           "factor.bfloat16(), y, x.numel()", "tiny"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_turns_the_contract_red(mutant, tmp_path):
    assert_red(mutant, tmp_path)


@pytest.mark.parametrize("mutant", {m.case: m for m in MUTANTS}.values(), ids=lambda m: m.case)
def test_without_a_fault_these_cases_pass(mutant):
    assert_green(mutant)
