import itertools

import pytest

from tritium.engine.config import OptimConfig
from tritium.engine.schedule import learning_rate


def rates(steps, **options):
    config = OptimConfig(lr=1.0, min_lr_fraction=0.1, **options)
    return [learning_rate(s, steps, config) for s in range(steps)]


def test_cosine_warms_up_linearly_and_ends_near_the_floor():
    r = rates(100, warmup_steps=10)
    assert r[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert r[10] == pytest.approx(1.0)
    assert r[55] == pytest.approx(0.55)  # half way down
    assert 0.1 < r[99] < 0.101
    assert all(a >= b for a, b in itertools.pairwise(r[10:]))


def test_wsd_is_stable_then_decays_linearly():
    r = rates(100, warmup_steps=5, schedule="wsd", decay_fraction=0.2)
    assert r[5:81] == pytest.approx([1.0] * 76)
    assert r[90] == pytest.approx(0.1 + 0.9 * 0.5)
    assert r[99] == pytest.approx(0.1 + 0.9 * 0.05)


def test_constant_stays_and_no_warmup_starts_at_the_peak():
    assert rates(5, warmup_steps=0, schedule="constant") == [1.0] * 5
    assert rates(5, warmup_steps=0)[0] == 1.0


def test_rates_beyond_the_last_step_stay_at_the_floor():
    config = OptimConfig(lr=1.0, min_lr_fraction=0.1, warmup_steps=1)
    assert learning_rate(500, 100, config) == pytest.approx(0.1)
