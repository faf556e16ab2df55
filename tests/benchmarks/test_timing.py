"""The statistics of benchmarks/timing.py on synthetic timings whose truth is known."""

import time

import numpy
import pytest

from tritium.benchmarks import timing

ROUNDS = 12


class Machine:
    """Synthetic timings: a clock that drifts and jumps, and log-normal noise on every run."""

    def __init__(self, seed, noise=0.01, drift_per_run=0.0, jump_at=None):
        self.random = numpy.random.default_rng(seed)
        self.noise, self.drift, self.jump_at = noise, drift_per_run, jump_at
        self.runs = 0

    def arm(self, ms):
        def run():
            self.runs += 1
            slow = 1.0 + self.drift * self.runs
            if self.jump_at is not None and self.runs > self.jump_at:
                slow *= 1.25
            return float(ms * slow * numpy.exp(self.noise * self.random.normal()))

        return run


def compare(machine, a_ms, b_ms, rounds=ROUNDS):
    samples = timing.interleave({"a": machine.arm(a_ms), "b": machine.arm(b_ms)}, rounds)
    return timing.speedup(samples["a"], samples["b"])


def test_a_planted_three_percent_is_found():
    found = [compare(Machine(seed), 100.0, 103.0) for seed in range(200)]
    assert sum(f.low > 1.0 for f in found) >= 198
    assert abs(numpy.median([f.median for f in found]) - 1.03) < 0.002


def test_nothing_is_found_in_noise_and_the_interval_covers():
    found = [compare(Machine(seed), 100.0, 100.0) for seed in range(1000, 1600)]
    covered = sum(f.low <= 1.0 <= f.high for f in found) / len(found)
    assert 0.91 <= covered <= 0.985  # nominal 0.95; 600 trials have a standard error of 0.009


@pytest.mark.parametrize("rounds", [8, 16])
@pytest.mark.parametrize("disturbed", [False, True])
def test_the_interval_covers_a_true_ratio_at_its_nominal_rate(rounds, disturbed):
    """Also where every tenth run is disturbed from outside and takes up to twice as long."""

    class Busy(Machine):
        def arm(self, ms):
            run = super().arm(ms)
            return lambda: run() * (1.0 + (self.random.random() if self.random.random() < 0.1 else 0.0))

    kind = Busy if disturbed else Machine
    found = [compare(kind(seed), 100.0, 103.0, rounds) for seed in range(3000, 3160)]
    covered = sum(f.low <= 1.03 <= f.high for f in found) / len(found)
    assert 0.9 <= covered <= 0.995  # nominal 0.95; 160 trials have a standard error of 0.017


@pytest.mark.parametrize("rounds", [2, 3, 4, 6, 8])
def test_the_interval_of_few_rounds_is_as_wide_as_it_has_to_be(rounds):
    """Two numbers have the truth between them every second time: the interval must reach beyond its samples."""
    found = [compare(Machine(seed), 100.0, 103.0, rounds) for seed in range(5000, 5400)]
    covered = sum(f.low <= 1.03 <= f.high for f in found) / len(found)
    assert 0.88 <= covered <= 0.99  # nominal 0.95; 400 trials have a standard error of 0.011


def test_the_interval_of_positive_values_stays_positive():
    two = timing.bootstrap_median_of_positive([100.0, 110.0])
    assert 0.0 < two.low < 100.0
    assert two.high > 110.0
    assert two.median == pytest.approx((100.0 * 110.0) ** 0.5)
    with pytest.raises(ValueError, match="positive"):
        timing.bootstrap_median_of_positive([1.0, 0.0])


@pytest.mark.parametrize("trouble", [{"drift_per_run": 0.02}, {"jump_at": 25}])
def test_drift_and_a_jump_do_not_favour_an_arm(trouble):
    """The machine becomes 2 × slower by and by, or 1.25 × at once; timing one arm after the other would be fooled."""
    found = [compare(Machine(seed, **trouble), 100.0, 100.0) for seed in range(200)]
    assert abs(numpy.median([f.median for f in found]) - 1.0) < 0.003
    assert sum(f.low <= 1.0 <= f.high for f in found) >= 180
    one_after_the_other = Machine(0, **trouble)
    a, b = ([arm() for _ in range(24)] for arm in (one_after_the_other.arm(100.0), one_after_the_other.arm(100.0)))
    assert numpy.median(b) / numpy.median(a) > 1.2


def test_rounds_are_palindromes_whose_order_turns():
    ran = []
    arms = {name: (lambda name=name: float(ran.append(name) or 1.0)) for name in "abc"}
    timing.interleave(arms, 3)
    assert "".join(ran) == "abccba" + "bcaacb" + "cabbac"


def test_the_interval_is_reproducible_and_narrows_with_rounds():
    few, again, many = (compare(Machine(5), 100.0, 110.0, rounds) for rounds in (6, 6, 96))
    assert few == again
    assert many.high - many.low < few.high - few.low
    assert few.low <= few.median <= few.high


def test_unpaired_or_single_rounds_are_refused():
    a, b = timing.Samples(((1.0, 1.0),) * 3), timing.Samples(((1.0, 1.0),) * 4)
    with pytest.raises(ValueError, match="paired"):
        timing.speedup(a, b)
    with pytest.raises(ValueError, match="at least two"):
        timing.bootstrap_median([1.0])
    with pytest.raises(ValueError, match="at least two finite"):
        timing.bootstrap_median([1.0, float("nan")])
    with pytest.raises(ValueError, match="at least one arm"):
        timing.interleave({}, 3)


def test_warm_up_ends_when_stable_and_says_when_it_was_not():
    falling = iter([900.0, 400.0, 200.0, 150.0, 120.0, 105.0] + [100.0] * 50)
    settled = timing.warm_up(lambda: next(falling))
    assert settled.stable
    assert 8 <= settled.runs <= 12
    doubling = iter(2.0**i for i in range(50))
    restless = timing.warm_up(lambda: next(doubling), limit_runs=20)
    assert not restless.stable
    assert restless.runs == 20


def test_the_wall_clock_synchronises_before_both_readings():
    events = []
    clock = timing.WallClock(synchronize=lambda: events.append("sync"))
    start = time.perf_counter()
    (ms,) = clock.times_ms([lambda: (events.append("call"), time.sleep(0.02))])
    around_ms = 1e3 * (time.perf_counter() - start)
    assert events == ["sync", "call", "sync"]
    assert 20.0 <= ms <= around_ms  # no fixed upper bound: a busy machine may oversleep by any amount


def test_inputs_rotate():
    seen = []
    call = timing.rotate(seen.append, [(1,), (2,), (3,)])
    timing.timed(call, timing.WallClock(), inner=7)()
    assert seen == [1, 2, 3, 1, 2, 3, 1]


def test_noise_is_the_difference_of_an_arm_with_itself():
    arm = Machine(3, noise=0.02).arm(50.0)
    samples = timing.interleave({"a": arm}, 400)["a"]
    # |difference of two N(0, 0.02²)| has the median 0.6745 · √2 · 0.02
    assert timing.noise(samples) == pytest.approx(0.6745 * 2**0.5 * 0.02, rel=0.15)
