"""Planted faults in the attention kernels."""

import pytest
import torch
from mutation import Mutant, assert_green, assert_red

from tritium.kernels.case import Case


def attention(name: str, before: str, after: str, case: str = "more_queries", **options: object) -> Mutant:
    return Mutant("attention", name, before, after, case, **options)


def with_lse(name: str, before: str, after: str, case: str = "more_queries") -> Mutant:
    """A fault in attention's kernels that attention_lse must see."""
    return Mutant("attention_lse", name, before, after, case, shared="tritium.kernels.attention.impl_triton")


MUTANTS = [
    attention("last key dropped", "seen = j < Tk", "seen = j < Tk - 1", "cross"),
    attention("last key tile dropped", "last = tl.maximum(last, 0)\n    first = tl.minimum(tl.maximum(first, 0), last)",
              "last = tl.maximum(last, 0) // BLOCK_N * BLOCK_N\n    first = tl.minimum(tl.maximum(first, 0), last)",
              "cross"),
    attention("accumulator not rescaled", "y = y * rescale[:, None]", "y = y * 1.0", "head_80_long"),
    attention("sum not rescaled", "l = l * rescale + tl.sum(p, 1)", "l = l + tl.sum(p, 1)", "head_80_long"),
    attention("causal by one", "seen & (j <= i + past)", "seen & (j < i + past)"),
    attention("keys past the end", "seen = j < Tk", "seen = j < Tk + 1", "cross"),
    attention("window by one", "i + past - j < window", "i + past - j <= window", "window_more_keys"),
    attention("documents not separated", "seen & (j >= start)", "seen", "documents_full"),
    attention("query tile of a document skipped", "starts <= end, i + 1, 0", "starts < n0, i + 1, 0", "documents_full"),
    attention("queries that see no key of a tile walked without a mask", "tl.minimum(tail, tl.minimum(cut, last))",
              "tl.minimum(tail, cut)", "starts_anywhere_several_tiles"),
    attention("documents taken to follow one another", "tl.where((starts > n0) & (i < Tq), i, Tq)",
              "tl.where((starts > n0) & (i == Tq - 1), i, Tq)", "starts_anywhere_several_tiles"),
    attention("heads share the wrong keys", "K += b * stride_kb + (h // R) * stride_kh",
              "K += b * stride_kb + (h % (H // R)) * stride_kh", "two_groups"),
    attention("only one head of a group in dk", "in range(0, tiles * R)", "in range(0, tiles)", "two_groups"),
    attention("scale of dk forgotten", "dk * scale", "dk"),
    attention("gradient of q times 1.02", "dq * scale", "dq * (scale * 1.02)"),
    attention("gradient of q times 1.02 in bf16", "dq * scale", "dq * (scale * 1.02)", "several_tiles",
              dtype=torch.bfloat16),
    attention("delta forgotten", "ds = p * (dp - delta[None, :])", "ds = p * dp"),
    attention("lse in base e", "m + tl.log2(", "m + tl.log("),
    attention("softcap not differentiated", "ds = ds * (1 - tanh_s * tanh_s)", "ds = ds", "softcap_short"),
    attention("softcap ignored", "s = softcap * tanh(s * (factor / softcap))", "s = s * factor", "softcap_short"),
    attention("dropout not made up for", "1 / (1 - dropout)", "1.0", "dropout_short"),
    attention("dropout by another hash", "0x846CA68B", "0x846CA68D", "dropout_short"),
    attention("dropout missing in dv", "tl.where(kept, p * keep_scale, 0.0)", "p", "dropout_short"),
    attention("sign forgotten", "return -x", "return x", "negative_short"),
    attention("sign forgotten in the gradient of q", "dq * scale", "dq * tl.abs(scale)", "negative_short"),
    attention("sign forgotten in the gradient of k", "dk * scale", "dk * tl.abs(scale)", "negative_short"),
    attention("sign forgotten backward", "n0, Tk, stride_kt, BLOCK_N, D, BLOCK_D, True), SIGN)",
              "n0, Tk, stride_kt, BLOCK_N, D, BLOCK_D, True), 1)", "negative_short"),
    attention("scale zero taken for one", "return tl.zeros_like(x)", "return x", "zero_short"),
    attention("gradient at scale zero", "dk * scale", "dk * factor", "zero_short"),
    with_lse("gradient of the lse forgotten", "delta - dlse", "delta"),
    with_lse("gradient of the lse added", "delta - dlse", "delta + dlse"),
    with_lse("gradient of the lse times 1.02", "delta - dlse", "delta - dlse * 1.02"),
    with_lse("gradient of another head's lse", "h * stride_lh", "(h + 1) % H * stride_lh"),
    with_lse("lse returned in base 2", "lse * LN2", "lse"),
    with_lse("lse of a blind query", 'float("-inf"), lse * LN2', "0.0, lse * LN2"),
    with_lse("infinite lse of a blind query", 'float("-inf"), lse * LN2', "lse, lse * LN2"),
    with_lse("lse of the scores before their cap", "to_base_2 = LOG2E", "to_base_2 = factor", "softcap_short"),
]  # fmt: skip

# smaller than the op's own cases, for speed
EXTRA = {
    "head_80_long": Case("head_80_long", {"B": 1, "Tq": 3, "Tk": 100, "H": 1, "G": 1, "D": 80}, {"scale": 2.0}),
    "two_groups": Case("two_groups", {"B": 1, "Tq": 4, "Tk": 4, "H": 4, "G": 2, "D": 8}),
    "softcap_short": Case("softcap_short", {"B": 1, "Tq": 6, "Tk": 6, "H": 1, "G": 1, "D": 16}, {"softcap": 2.0}),
    "negative_short": Case("negative_short", {"B": 1, "Tq": 5, "Tk": 5, "H": 2, "G": 1, "D": 8}, {"scale": -0.7}),
    "zero_short": Case("zero_short", {"B": 1, "Tq": 5, "Tk": 5, "H": 1, "G": 1, "D": 8}, {"scale": 0.0}),
    "dropout_short": Case("dropout_short", {"B": 1, "Tq": 9, "Tk": 9, "H": 1, "G": 1, "D": 8}, {"dropout": 0.3}),
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_turns_the_contract_red(mutant, tmp_path):
    assert_red(mutant, tmp_path, EXTRA)


@pytest.mark.parametrize("mutant", {(m.op, m.case): m for m in MUTANTS}.values(), ids=lambda m: f"{m.op}: {m.case}")
def test_without_a_fault_these_cases_pass(mutant):
    assert_green(mutant, EXTRA)
