"""The forecast is arithmetic on cases.py and on a GPU's peaks; goals name cases that exist and can be reached."""

import fnmatch

import pytest
import torch

from tritium.kernels import ops, peaks
from tritium.kernels.case import Goal

BF16 = torch.bfloat16
WITH_GOALS = [name for name, op in ops.OPS.items() if hasattr(op.cases, "GOALS")]


def case(op: str, name: str):
    (found,) = (c for c in ops.OPS[op].cases.CASES if c.name == name)
    return found


def test_a_norm_is_bound_by_what_it_moves():
    op, width = ops.OPS["rms_norm"], case("rms_norm", "width_768")
    ms, by = peaks.bound(op, width, BF16, "forward", peaks.H100)
    assert by == "memory"
    assert ms == pytest.approx(1e3 * (2 * 2 * 16384 * 768 + 2 * 768) / 3.0e12)
    both = peaks.bound(op, width, BF16, "forward+backward", peaks.H100)[0]
    assert both == pytest.approx(ms + peaks.bound(op, width, BF16, "backward", peaks.H100)[0])


def test_attention_is_bound_by_whatever_is_slowest():
    op, long = ops.OPS["attention"], case("attention", "d64_16k")
    ms, by = peaks.bound(op, long, BF16, "forward", peaks.H100)
    assert (by, ms) == ("tensor cores", pytest.approx(1e3 * op.cases.flops(long) / 798e12))
    # at the datasheet's peak the exponentials of D = 64 take as long as its products: four FLOPs a channel at 4096 a
    # clock, one exponential at 16 a clock
    pairs = op.cases.exponentials(long)
    assert pairs == 32 * 16384 * 16385 // 2
    assert pairs / peaks.H100.exponentials == pytest.approx(op.cases.flops(long) / 989.4e12, rel=2e-3)
    blackwell, by = peaks.bound(op, long, BF16, "forward", peaks.B200)
    assert by == "exponentials", "its tensor cores are twice as fast, its exponential units are not"
    assert blackwell == pytest.approx(1e3 * pairs / (16 * 148 * 1.856e9))


def test_the_units_of_goals():
    h100, flops, moved = peaks.H100, 798 * 10**9, 3 * 10**9
    assert peaks.goal_ms(Goal("*", "forward", 399, "TFLOP/s"), flops, moved, h100) == pytest.approx(2.0)
    assert peaks.goal_ms(Goal("*", "forward", 1.5, "TB/s"), flops, moved, h100) == pytest.approx(2.0)
    assert peaks.goal_ms(Goal("*", "forward", 0.5, "of copy"), flops, moved, h100) == pytest.approx(2.0)
    assert peaks.goal_ms(Goal("*", "forward", 0.5, "of GEMM"), flops, moved, h100) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="GB/s"):
        peaks.goal_ms(Goal("*", "forward", 1, "GB/s"), flops, moved, h100)


@pytest.mark.parametrize("name", WITH_GOALS)
def test_goals_are_of_large_cases_and_within_the_bound(name):
    op = ops.OPS[name]
    large = [c for c in op.cases.CASES if c.large]
    for goal in op.cases.GOALS:
        assert goal.what in peaks.kinds(op), goal
        assert any(fnmatch.fnmatch(c.name, goal.cases) and peaks.goal_of(op, c, goal.what) == goal for c in large), goal
    asked = [f for c in large for f in peaks.forecast(op, c) if f.goal is not None]
    assert asked
    for f in asked:
        assert 0.999 <= f.goal_over_bound < 4, f
        assert f.goal_ms == pytest.approx(f.goal_over_bound * f.bound_ms)


def test_the_goals_on_an_h100_are_there():
    goals = {(n, c.name, f.what): f.goal.rate for n in WITH_GOALS for c in ops.OPS[n].cases.CASES if c.large
             for f in peaks.forecast(ops.OPS[n], c) if f.goal}  # fmt: skip
    wanted = {
        ("attention", "d64_1k", "forward"): 310, ("attention", "d64_4k", "forward"): 430,
        ("attention", "d64_16k", "forward"): 485, ("attention", "d64_16k_full", "forward"): 510,
        ("attention", "d128_8k", "forward"): 690, ("attention", "d64_16k_full", "backward"): 480,
        ("attention", "d128_8k", "backward"): 545, ("layer_norm", "gpt2_124m", "forward"): 2.75,
        ("rms_norm", "width_4096", "forward"): 0.98, ("layer_norm", "gpt2_1558m", "backward"): 2.7,
        ("cross_entropy", "gpt2_16k", "forward"): 0.97, ("linear_cross_entropy", "llama3_8b", "forward+backward"): 740,
        ("linear_cross_entropy", "gpt2_124m", "forward+backward"): 1 / 1.12, ("swiglu", "gpt2_124m", "backward"): 2.85,
        ("rope", "llama_8b", "forward"): 2.8, ("adamw", "gpt2_124m", "update"): 2.85,
    }  # fmt: skip
    assert {key: goals.get(key) for key in wanted} == wanted


def test_another_gpu_has_a_forecast_and_no_goal():
    op, row = ops.OPS["swiglu"], case("swiglu", "llama_8b")
    for peak in (peaks.A100, peaks.H200, peaks.B200):
        assert peak.source
        found = peaks.forecast(op, row, peak)
        assert [f.what for f in found] == ["forward", "backward"]
        assert all(f.goal is None and f.goal_over_bound is None for f in found)
        assert found[0].bound_ms == pytest.approx(1e3 * op.cases.bytes(row, BF16) / peak.bandwidth)
