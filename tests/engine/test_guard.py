"""Bad steps as the device finds them: the statistics, what is an outlier and what is not, what a bad step changes."""

import math

import numpy as np
import pytest
import torch

from tritium.engine.config import Config, OptimConfig, RunConfig, TrainConfig
from tritium.engine.guard import FLOOR, GOOD, HORIZON, NOT_FINITE, OUTLIER, Guard
from tritium.engine.optim import AdamW

CPU = torch.device("cpu")


def judged(guard: Guard, norm: float, loss: float = 1.0) -> int:
    skip = guard.judge(torch.tensor(norm), torch.tensor(loss)).item()
    verdict = int(guard.verdict.item())
    assert skip == float(verdict != GOOD)
    return verdict


def noise(count: int, spread: float, seed: int = 0) -> np.ndarray:
    """Gradient norms as a training's: positive, skew."""
    return np.exp(spread * np.random.default_rng(seed).standard_normal(count))


def test_mean_and_variance_are_those_of_the_values_then_forget():
    guard, values = Guard(6.0, CPU), noise(HORIZON + 40, 0.3)
    losses = 3.0 + 0.1 * values
    for i in range(HORIZON):
        assert judged(guard, values[i], losses[i]) == GOOD
    seen = np.stack([losses[:HORIZON], values[:HORIZON]])
    np.testing.assert_allclose(guard.mean.numpy(), seen.mean(1), rtol=1e-5)
    np.testing.assert_allclose(guard.variance.numpy(), seen.var(1), rtol=1e-4)
    mean, variance = values[:HORIZON].mean(), values[:HORIZON].var()
    for i in range(HORIZON, HORIZON + 40):
        assert judged(guard, values[i], losses[i]) == GOOD
        change = values[i] - mean
        mean, variance = mean + change / HORIZON, (1 - 1 / HORIZON) * (variance + change**2 / HORIZON)
    assert guard.mean[1].item() == pytest.approx(mean, rel=1e-5)
    assert guard.variance[1].item() == pytest.approx(variance, rel=1e-4)
    assert guard.seen.item() == HORIZON + 40 and guard.skipped.item() == 0


@pytest.mark.parametrize("which", ["norm", "loss"])
def test_a_value_a_hundred_times_as_large_is_an_outlier_and_one_as_small_is_not(which):
    guard = Guard(6.0, CPU)
    for i, value in enumerate(noise(3 * HORIZON, 0.3)):
        if i == HORIZON - 1:  # too early to tell
            assert judged(Guard(6.0, CPU), 100.0) == GOOD
        if i in (HORIZON, 2 * HORIZON):
            one = {"norm": 100.0, "loss": 1.0} if which == "norm" else {"norm": 1.0, "loss": 100.0}
            assert judged(guard, **one) == OUTLIER and guard.streak.item() == 1
            assert judged(guard, **dict.fromkeys(one, 0.01)) == GOOD and guard.streak.item() == 0
        assert judged(guard, value) == GOOD, i
    assert guard.skipped.item() == 2


@pytest.mark.parametrize("spread", [0.0, 0.001, 0.1, 0.4])
@pytest.mark.parametrize("seed", range(5))
def test_noise_gives_no_alarm(spread, seed):
    """Norms that fall, rise and vary as a training's do: a factor of two over 300 steps either way."""
    guard = Guard(6.0, CPU)
    drift = np.concatenate([np.geomspace(8, 1, 300), np.geomspace(1, 2, 300), np.geomspace(2, 1, 300)])
    losses = np.geomspace(6, 3, 900) * (1 + 0.02 * np.random.default_rng(seed + 9).standard_normal(900))
    verdicts = [judged(guard, n, x) for n, x in zip(drift * noise(900, spread, seed), losses, strict=True)]
    assert set(verdicts) == {GOOD}


def test_little_noise_makes_no_outlier_of_little_more():
    guard = Guard(6.0, CPU)
    for _ in range(HORIZON):
        judged(guard, 1.0)
    assert guard.variance[1].item() == 0
    assert judged(guard, 1.0 + 0.9 * 6 * FLOOR) == GOOD
    assert judged(guard, 1.0 + 1.5 * 6 * FLOOR) == OUTLIER


def test_a_level_that_has_changed_for_good_is_accepted_after_a_while():
    """Or nothing would be learned any more: of skipped steps alone no statistics would ever be made."""
    guard = Guard(6.0, CPU)
    for value in noise(200, 0.1):
        judged(guard, value)
    verdicts = [judged(guard, 10.0 * value) for value in noise(100, 0.1, seed=1)]
    first = verdicts.index(GOOD)
    assert 10 <= first <= 60
    assert set(verdicts[first + 5 :]) == {GOOD}


@pytest.mark.parametrize("z", [0.0, 6.0])
@pytest.mark.parametrize(("norm", "loss"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, -math.inf)])
def test_what_is_not_finite_is_bad_from_the_first_step_and_leaves_no_trace_in_the_statistics(z, norm, loss):
    guard = Guard(z, CPU)
    assert judged(guard, norm, loss) == NOT_FINITE
    for value in noise(HORIZON + 1, 0.1):
        judged(guard, value)
    before = {name: t.clone() for name, t in guard.state_dict().items()}
    assert judged(guard, norm, loss) == NOT_FINITE
    assert judged(guard, norm, loss) == NOT_FINITE
    for name, tensor in guard.state_dict().items():
        if name not in ("skipped", "guard.streak"):
            assert torch.equal(tensor, before[name]), name
    assert guard.streak.item() == 2 and guard.skipped.item() == 3
    assert (guard.seen.item() > 0) == (z > 0)  # off: none are collected


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = torch.nn.Linear(5, 3)


def test_an_outlier_changes_no_weight_and_no_moment():
    net = Net()
    optimizer = AdamW(net, OptimConfig(skip_outliers=6.0), {})
    torch.manual_seed(1)

    def step(scale: float) -> None:
        (scale * net.a(torch.randn(64, 5)).square().sum()).backward()
        optimizer.step(torch.tensor(1e-4), torch.tensor(1 / 64), torch.tensor(1.0))
        optimizer.zero_grad()

    for _ in range(HORIZON):
        step(1.0)
    before = {k: v.clone() for k, v in {**optimizer.state_dict(), **optimizer.master_weights()}.items()}
    step(100.0)
    after = {**optimizer.state_dict(), **optimizer.master_weights()}
    assert after["skipped"].item() == 1 and optimizer.guard.verdict.item() == OUTLIER
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"skipped", "guard.streak", "guard.seen", "guard.mean", "guard.variance"}
    step(1.0)
    assert optimizer.guard.streak.item() == 0
    assert not torch.equal(before["a.weight"], after["a.weight"])


def test_the_host_reads_nothing():
    from tritium.engine import syncs

    guard = Guard(6.0, CPU)
    with syncs.forbidden() as seen:
        for _ in range(3):
            guard.judge(torch.ones(()), torch.ones(()))
    assert not seen


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"optim": OptimConfig(skip_outliers=-1.0)}, "optim.skip_outliers must be at least 0"),
        ({"train": TrainConfig(rollback_after=3), "run": RunConfig(save_every=0)}, "run.save_every=0 there is none"),
        ({"run": RunConfig(profile="4:3")}, "run.profile='4:3' must be FIRST:LAST"),
        ({"run": RunConfig(profile="0")}, "run.profile='0' must be FIRST:LAST"),
        ({"run": RunConfig(profile="3:x")}, "run.profile='3:x' must be FIRST:LAST"),
        ({"run": RunConfig(bad_steps=-1)}, "run.bad_steps must be at least 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changed, said):
    assert any(said in problem for problem in Config(**changed).problems())


def test_the_profiled_steps():
    assert Config(run=RunConfig(profile="10:13")).profiled == (10, 13)
    assert Config(run=RunConfig(profile="7")).profiled == (7, 7)
    assert Config().profiled is None
