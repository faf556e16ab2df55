"""FLOPs of whole training steps, as torch counts them, against numbers worked out by hand.

N = 8·1024 tokens, L = 12 layers, C = 768, F the MLP's width, V = 50304 padded ids, T = 1024; a GEMM of n weights on a
token is 2n forward and 4n backward; attention's two GEMMs over a square are 4·T·C a token forward and twice that
backward, half of it over a causal triangle (our kernels compute that half; the reference computes and torch's formula
for flash counts all of it, and that formula 5/2 backward, for the scores that are computed again).

    gpt2    blocks L·12·C² = 84,934,656 weights          head C·V = 38,633,472 weights
    llama   blocks L·(C·64·(12 + 2·4) + C² + 3·C·2048) = 75,497,472 weights, the same head
"""

import pytest
import torch
from fake_gpu import MODELS, B, Executed, T, measure
from torch.utils.flop_counter import flop_registry

from tritium.engine import metrics, recompute
from tritium.kernels import ops

N = B * T
GEMM_OPS = ("attention", "attention_lse", "linear", "linear_cross_entropy")

# (model, kernels) → forward, backward
EXPECTED = {
    # 2·N·84,934,656 + 12·(4·N·T·C)/2 + 6·N·38,633,472: the head's gradients are ready when its forward ends
    ("gpt2", "triton"): (3_445_100_642_304, 3_092_376_453_120),
    ("gpt2", "reference"): (2_333_777_854_464, 4_667_555_708_928),
    ("gpt2", "sdpa_flash"): (3_599_719_464_960, 3_556_232_921_088),
    ("llama", "triton"): (3_290_481_819_648, 2_783_138_807_808),
    ("llama", "reference"): (2_179_159_031_808, 4_358_318_063_616),
}
# What full recomputing adds to backward: the blocks' forward, less the last projection, whose result nothing in
# backward needs. Both models have 56,623,104 weights left: 2·N·56,623,104, and attention over a square or half of it
AGAIN = {
    "triton": 1_082_331_758_592,
    "reference": 1_236_950_581_248,
}


def uncounted(functions) -> set[str]:
    """Custom ops among ``functions`` that contain GEMMs and have no formula: torch counts them as nothing."""
    return {
        str(function)
        for function in functions
        if function.namespace not in ("aten", "prims", "prim")
        and recompute.op_of(function) in GEMM_OPS
        and function._overloadpacket not in flop_registry
    }


@pytest.mark.parametrize(("model", "kernels"), EXPECTED)
def test_flops_are_the_hand_computed_literals(model, kernels):
    forward, backward = EXPECTED[model, kernels]
    plain = measure(model, kernels, "none")
    assert plain.flops == (forward, backward)
    missing = uncounted(plain.executed)
    assert not missing, f"no formula for {', '.join(missing)}: give differentiable() flops= and flops_backward="


@pytest.mark.parametrize(("model", "kernels"), [("gpt2", "triton"), ("gpt2", "reference"), ("llama", "triton")])
def test_full_recomputing_adds_a_forward_of_the_blocks(model, kernels):
    forward, backward = EXPECTED[model, kernels]
    assert measure(model, kernels, "full").flops == (forward, backward + AGAIN[kernels])


def test_a_custom_op_of_the_last_projection_is_computed_again_too():
    """torch's linear saves its input before it computes, where full recomputing may stop; a custom op saves after."""
    forward, backward = EXPECTED["gpt2", "triton"]
    last = 2 * N * 12 * 4 * 768 * 768 if "triton" in ops.linear.backends() else 0
    assert measure("gpt2", "all_triton", "full").flops == (forward, backward + AGAIN["triton"] + last)


def test_selective_recomputing_adds_no_gemm_that_it_keeps():
    """Attention and linear are kept: reference attention too, whose two GEMMs its own backward computes again."""
    for kernels, again in (("triton", 0), ("reference", 309_237_645_312)):
        forward, backward = EXPECTED["gpt2", kernels]
        assert measure("gpt2", kernels, "selective").flops == (forward, backward + again)


def test_flops_per_token_says_the_same():
    for kernels, convention in (("triton", "causal"), ("reference", "full")):
        for model in ("gpt2", "llama"):
            counted = metrics.flops_per_token(MODELS[model].model, T, convention)
            assert counted * N == sum(EXPECTED[model, kernels])


def test_a_gemm_without_a_formula_is_seen():
    @torch.library.custom_op("tritium::linear_without_formula", mutates_args=())
    def planted(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    with Executed() as executed:
        torch.ops.tritium.linear_without_formula(torch.eye(2))
    assert uncounted(executed.functions) == {"tritium.linear_without_formula.default"}


def test_other_work_is_seen():
    """One token row less, and the literals do not fit."""
    forward, backward = EXPECTED["gpt2", "triton"]
    found = measure("gpt2", "triton", "none", B - 1).flops
    assert found == (forward * (B - 1) // B, backward * (B - 1) // B) != (forward, backward)
