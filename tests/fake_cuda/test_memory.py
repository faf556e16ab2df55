"""Peak memory of GPT-2 124M's training step on a fake GPU: the live storages, by recompute policy.

An allocator adds its rounding and fragments, cuBLAS its workspace, CUDA its context: what is counted here is what the
program asks for, inside our ops too. docs/memory.md shows the figures; it is written anew by

    python -P -m pytest tests/fake_cuda/test_memory.py --write-memory
"""

import datetime
import pathlib
import re
from unittest import mock

import pytest
import torch
from fake_gpu import DEVICE, B, Live, T, measure, present
from torch.utils.checkpoint import CheckpointPolicy

from tritium.engine import recompute
from tritium.engine.model import Block

GIB = 2**30
BY_HAND = "\n## Moments in fewer bits"  # where docs/memory.md goes on by hand
POLICIES = ("none", "full", "every", "selective")
DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "memory.md"
N, C, V, L = B * T, 768, 50304, 12

# (model, kernels, policy) → bytes kept by forward for backward, peak bytes of the step
EXPECTED = {
    ("gpt2", "triton", "none"): (2_614_558_724, 4_780_408_852),
    ("gpt2", "triton", "selective"): (1_858_011_140, 4_023_861_268),
    ("gpt2", "triton", "every"): (1_478_950_916, 3_644_801_044),
    ("gpt2", "triton", "full"): (343_343_108, 2_509_193_236),
    ("gpt2", "reference", "none"): (14_610_735_108, 22_861_856_792),
    ("gpt2", "reference", "selective"): (3_422_953_476, 11_674_075_160),
    ("gpt2", "reference", "every"): (8_261_869_572, 16_512_991_256),
    ("gpt2", "reference", "full"): (1_913_004_036, 10_164_125_720),
}
CHOICES = [("gpt2", "triton"), ("gpt2", "reference")]


def test_state_is_what_the_formula_says():
    """bf16 leaf, fp32 master and two moments for the blocks' GEMMs; fp32 leaf and moments for the rest."""
    narrow = L * (12 * C * C + (3 + 1 + 4 + 1) * C)
    wide = V * C + T * C + (2 * L + 1) * 2 * C
    numbers = 1 + 8  # of steps done, and the guard's
    assert measure("gpt2", "triton", "none").state == narrow * (2 + 4 + 8) + wide * (4 + 8) + numbers * 4


def test_kept_is_what_the_formula_says():
    """A block keeps 16 N·C in bf16: x, norm, q, k, v, y, x, norm, the MLP's 4 before and 4 after its activation; two
    fp32 statistics a row and norm, one a row and head. The head keeps its fp32 gradients."""
    block = 16 * N * C * 2 + 2 * 2 * N * 4 + N * 12 * 4
    end = N * C * 2 + 2 * N * 4 + N * C * 4 + V * C * 4 + 4
    assert measure("gpt2", "triton", "none").kept == L * block + end
    # full: a block's input; selective: also q, k, v, y with its statistics, and what proj, up and down computed
    assert measure("gpt2", "triton", "full").kept == L * N * C * 2 + end
    selective = (1 + 3 + 1 + 1 + 4 + 1) * N * C * 2 + N * 12 * 4
    assert measure("gpt2", "triton", "selective").kept == L * selective + end


def test_the_peak_is_what_the_formula_says():
    """It is reached inside the head's op: all that the blocks keep, the last norm's x, statistics and result, and the
    op's own: the weight in bf16, the logits of half of the rows, losses, and fp32 gradients of x and weight."""
    block = 16 * N * C * 2 + 2 * 2 * N * 4 + N * 12 * 4
    head = V * C * 2 + N // 2 * V * 2 + N * 4 + N * C * 4 + V * C * 4 + 4
    inputs = 2 * N * 8 + 2 * 4
    state = measure("gpt2", "triton", "none").state
    assert measure("gpt2", "triton", "none").peak == state + inputs + L * block + 2 * N * C * 2 + 2 * N * 4 + head


@pytest.mark.parametrize(("model", "kernels"), CHOICES)
def test_less_is_alive_the_more_is_computed_again(model, kernels):
    found = {policy: measure(model, kernels, policy) for policy in POLICIES}
    for policy in POLICIES:
        kept, peak = EXPECTED[model, kernels, policy]
        assert (found[policy].kept, found[policy].peak) == pytest.approx((kept, peak), rel=0.01), policy
        assert found[policy].peak > found[policy].state + found[policy].kept
    assert found["full"].peak < found["selective"].peak < found["none"].peak
    assert found["full"].kept < found["selective"].kept < found["none"].kept
    for field in ("kept", "peak"):  # every second block
        full, every, none = (getattr(found[policy], field) for policy in ("full", "every", "none"))
        assert every == (full + none) / 2


def document(date: str) -> str:
    """docs/memory.md."""
    lines = [
        f"""# Memory of a training step

GPT-2 124M, B = {B} rows of T = {T} tokens, bf16 with fp32 masters, one eager step on a GPU: forward, backward, clip,
update. The bytes of the storages that are alive, temporary ones inside our ops included, on tensors without data: no
GPU was used, and CUDA's context, the libraries' workspaces and the allocator's rounding come on top. Kernels: the
backend named, where an op has it, and else what `auto` chooses; the linear layers' GEMMs are torch's.
Written on {date} by

    python -P -m pytest tests/fake_cuda/test_memory.py --write-memory

The tests in that file hold the figures, and those of `triton` against formulas.

State (weights, masters, working copies, moments): {measure("gpt2", "triton", "none").state / GIB:.2f} GiB.

| kernels | recompute | kept for backward, GiB | peak of the step, GiB | forward + backward, TFLOP |
|---|---|---:|---:|---:|
"""
    ]
    for model, kernels in CHOICES:
        for policy in POLICIES:
            m = measure(model, kernels, policy)
            lines.append(
                f"| {kernels} | {policy} | {m.kept / GIB:.2f} | {m.peak / GIB:.2f} | {sum(m.flops) / 1e12:.2f} |\n"
            )
    return "".join(lines)


def test_the_document_shows_these_figures(request):
    text = DOCUMENT.read_text()
    if request.config.getoption("--write-memory", default=False):
        text = document(datetime.date.today().isoformat()) + text[text.index(BY_HAND) :]
        DOCUMENT.write_text(text)
    written = text[: text.index(BY_HAND)]
    (date,) = re.findall(r"^Written on ([0-9-]{10}) by$", written, re.M)
    assert written == document(date), "docs/memory.md is not of today's code: run this file with --write-memory"


# ------------------------------------------------------------------------------------------------------ planted faults


def changed(policy: str = "none") -> tuple[int, int]:
    """(kept, peak) measured anew."""
    found = measure.__wrapped__("gpt2", "triton", policy)
    return found.kept, found.peak


def test_a_policy_that_keeps_everything_is_seen():
    keep_all = mock.Mock(return_value=CheckpointPolicy.MUST_SAVE)
    with mock.patch.object(recompute, "keeping", return_value=keep_all):
        kept, peak = changed("selective")
    assert kept > 1.3 * EXPECTED["gpt2", "triton", "selective"][0]
    assert peak > 1.1 * EXPECTED["gpt2", "triton", "selective"][1]


def test_a_tensor_that_outlives_its_use_is_seen():
    leaked, forward = [], Block.forward

    def leaking(self, x, *rest):
        leaked.append(self.norm1(x.detach()))
        return forward(self, x, *rest)

    with mock.patch.object(Block, "forward", leaking):
        kept, peak = changed()
    expected = EXPECTED["gpt2", "triton", "none"]
    assert kept - expected[0] == pytest.approx(L * N * C * 2, rel=0.01)
    assert peak != pytest.approx(expected[1], rel=0.01)


def test_live_counts_storages_once_and_forgets_them():
    with present(), Live() as live:
        x = torch.empty(1000, device=DEVICE)
        y = x.view(10, 100)
        assert live.now == 4000
        z = torch.empty(500, dtype=torch.bfloat16, device=DEVICE)
        assert live.now == live.peak == 5000
        del x, z
        assert (live.now, live.peak) == (4000, 5000)
        del y
        assert (live.now, live.peak) == (0, 5000)
