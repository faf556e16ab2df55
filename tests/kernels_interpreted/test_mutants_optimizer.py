"""Planted faults in the kernels over lists of tensors: adamw and global_norm."""

import pytest
import torch
from mutation import Mutant, assert_green, assert_red

LISTS = "tritium.kernels.lib.triton_lists"
MUTANTS = [
    Mutant("adamw", "last element dropped", "offsets < n", "offsets < n - 1", "odd"),
    Mutant("adamw", "v's bias not corrected", "1 / tl.sqrt(_one_minus_power(log_beta2, t))", "1.0", "one_element"),
    Mutant("adamw", "m's bias not corrected", "lr / _one_minus_power(log_beta1, t)", "lr", "one_element"),
    Mutant("adamw", "a wrong term in the series", "x / 2 * (1", "x / 3 * (1", "one_element"),
    Mutant("adamw", "decay without the learning rate", "1 - lr * weight_decay", "1 - weight_decay", "odd"),
    Mutant("adamw", "gradient not scaled", "FAST) * grad_scale", "FAST)", "clipped"),
    Mutant("adamw", "skip not heeded", "if tl.load(SKIP) == 0:", "if tl.load(SKIP) >= 0:", "skipped"),
    Mutant("adamw", "m forgets nothing", "rest1 * (g - m)", "rest1 * g", "odd"),
    Mutant("adamw", "v's update times 1.02", "rest2 * g * g", "rest2 * g * g * 1.02", "odd"),
    Mutant("adamw", "copy of the weights before the step", "lists.store_coded(COPY, codes >> 2, at, p,",
           "lists.store_coded(COPY, codes >> 2, at, lists.load(P, at, mask, tl.float32, FAST) + rate * m,", "odd",
           torch.bfloat16),
    Mutant("adamw", "chunks of later tensors misplaced", "(chunk - tl.load(LAYOUT + K + tensor))", "chunk", "odd",
           shared=LISTS),
    Mutant("adamw", "bf16 read as fp16", "elif code == 1:", "elif code == 2:", "odd", torch.bfloat16, shared=LISTS),
    Mutant("adamw", "v in bf16 as m", "cut_to_bf16(v, bits >> 16)", "cut_to_bf16(m, bits >> 16)", "bf16_moments"),
    Mutant("adamw_8bit", "last element dropped", "offsets < n, rows < n", "offsets < n - 1, rows < n", "odd"),
    Mutant("adamw_8bit", "the last block's scales not written", "rows < n\n", "rows + 256 < n\n", "odd"),
    Mutant("adamw_8bit", "negative codes one too high", "127 - tl.minimum(q, 127)", "128 - tl.minimum(q, 127)", "odd"),
    Mutant("adamw_8bit", "codes without signs read as with", "_decode(v, False)", "_decode(v, True)", "odd"),
    Mutant("adamw_8bit", "the top decade missed", "(y >= 1e-1)", "(y >= 2.0)", "several_tiles"),
    Mutant("adamw_8bit", "always the value below", "0.0000152587890625 * gap", "1.0 * gap + 1.0", "odd"),
    Mutant("adamw_8bit", "m's scale for v too", "_encode(v, v_scale", "_encode(v, m_scale", "odd"),
    Mutant("adamw_8bit", "m's update times 1.02", "rest1 * (g - m)", "rest1 * (g * 1.02 - m)", "odd"),
    Mutant("global_norm", "last element dropped", "offsets < left", "offsets < left - 1", "odd"),
    Mutant("global_norm", "later chunks never visited", "range(program, chunks, P)", "range(program, P, P)",
           "several_tiles"),
    Mutant("global_norm", "a program's share lost", "places < P", "places < P - 1", "several_tiles"),
    Mutant("global_norm", "a factor not taken back", "2 * (127 - exponent)", "2 * (126 - exponent)", "small"),
    Mutant("global_norm", "squares times 1.02", "scaled * scaled", "scaled * scaled * 1.02", "large_values"),
    Mutant("global_norm", "chunks of later tensors misplaced", "(chunk - tl.load(LAYOUT + K + tensor))", "chunk",
           "odd", shared=LISTS),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_turns_the_contract_red(mutant, tmp_path):
    assert_red(mutant, tmp_path)


@pytest.mark.parametrize("mutant", {(m.op, m.case): m for m in MUTANTS}.values(), ids=lambda m: f"{m.op} {m.case}")
def test_without_a_fault_these_cases_pass(mutant):
    assert_green(mutant)
