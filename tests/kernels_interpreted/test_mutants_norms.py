"""Planted faults in the norms kernels."""

import pytest
from mutation import Mutant, assert_green, assert_red

MUTANTS = [
    Mutant("layer_norm", "mean not subtracted", "tl.where(real, x - mean[:, None], 0.0)", "tl.where(real, x, 0.0)",
           "odd"),
    Mutant("layer_norm", "padding in the variance", "tl.where(real, x - mean[:, None], 0.0)", "x - mean[:, None]",
           "odd"),
    Mutant("layer_norm", "eps forgotten", "/ C + eps)", "/ C)", "large_eps"),
    Mutant("layer_norm", "bias forgotten", "if BIAS is not None:", "if BIAS is None:", "odd"),
    Mutant("layer_norm", "last rows dropped", "tl.cdiv(N, BLOCK_N), P)", "N // BLOCK_N, P)", "many_rows"),
    Mutant("layer_norm", "mean(g·x̂) forgotten", "- xhat * mean_gx", "", "odd"),
    Mutant("layer_norm", "gradient of weight times 1.02", "dweight += tl.sum(dy * xhat, 0)",
           "dweight += tl.sum(dy * xhat, 0) * 1.02", "odd"),
    Mutant("layer_norm", "a program's share lost", "(p < P)[:, None]", "(p < P - 1)[:, None]", "many_rows"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_turns_the_contract_red(mutant, tmp_path):
    assert_red(mutant, tmp_path)


@pytest.mark.parametrize("mutant", {m.case: m for m in MUTANTS}.values(), ids=lambda m: m.case)
def test_without_a_fault_these_cases_pass(mutant):
    assert_green(mutant)
