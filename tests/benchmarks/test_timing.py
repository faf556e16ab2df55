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


class Restarted:
    """Arms whose every process is faster or slower than their truth for as long as it lives."""

    def __init__(self, seed, deviation=0.02, fast_or_slow=False):
        self.machine, self.deviation, self.fast_or_slow = Machine(seed), deviation, fast_or_slow

    def process(self, ms):
        drawn = self.machine.random.choice((-1.0, 1.0)) if self.fast_or_slow else self.machine.random.normal()
        return self.machine.arm(ms * numpy.exp(self.deviation * drawn))

    def times(self, restarts, rounds, **ms):
        """The timings of every arm in ``restarts`` processes of ``rounds`` rounds."""
        parts = [timing.interleave({n: self.process(x) for n, x in ms.items()}, rounds) for _ in range(restarts)]
        return {name: timing.joined([part[name] for part in parts]) for name in ms}


def covered(found, truth):
    return sum(f.low <= truth <= f.high for f in found) / len(found)


@pytest.mark.parametrize("fast_or_slow", [False, True])
@pytest.mark.parametrize("restarts", [2, 3, 5, 8])
def test_the_interval_over_restarts_covers_a_true_ratio_where_processes_differ(restarts, fast_or_slow):
    """Two processes of one program differ by 2.8 % here, more than their rounds do."""
    found = []
    for seed in range(7000, 7400):
        taken = Restarted(seed, fast_or_slow=fast_or_slow).times(restarts, 4, a=100.0, b=120.0)
        found.append(timing.speedup(taken["a"], taken["b"]))
    assert 0.92 <= covered(found, 1.2) <= 0.985  # nominal 0.95; 400 trials have a standard error of 0.011
    assert abs(numpy.median([f.median for f in found]) - 1.2) < 0.006


def test_an_interval_of_one_process_or_of_all_rounds_as_if_they_were_of_one_does_not_cover_it():
    single, pooled = [], []
    for seed in range(7000, 7060):
        one, five = (Restarted(seed).times(*shape, a=100.0, b=120.0) for shape in ((1, 10), (5, 4)))
        single.append(timing.speedup(one["a"], one["b"]))
        pooled.append(timing.speedup(*(timing.Samples(five[name].rounds) for name in "ab")))
    assert covered(single, 1.2) < 0.6
    assert covered(pooled, 1.2) < 0.85


def test_a_difference_is_found_over_restarts_and_none_in_processes_that_differ():
    found = [Restarted(seed).times(5, 4, a=100.0, b=112.0) for seed in range(8000, 8200)]
    assert sum(timing.speedup(f["a"], f["b"]).low > 1.0 for f in found) >= 190
    equal = [Restarted(seed).times(5, 4, a=100.0, b=100.0) for seed in range(8200, 8600)]
    ratios = [timing.speedup(f["a"], f["b"]) for f in equal]
    assert sum(r.low > 1.0 or r.high < 1.0 for r in ratios) <= 0.09 * len(ratios)  # nominal 0.05


def test_a_slow_restart_of_all_arms_is_no_deviation_between_processes():
    def one(seed, slow):
        machine = Restarted(seed)
        parts = []
        for restart in range(5):
            scale = 1.0 + slow * restart
            arms = {name: machine.process(ms * scale) for name, ms in (("a", 100.0), ("b", 120.0), ("c", 50.0))}
            parts.append(timing.interleave(arms, 4))
        return [timing.joined([part[name] for part in parts]) for name in "abc"]

    steady = [timing.restart_deviation(one(seed, 0.0)) for seed in range(100)]
    slower = [timing.restart_deviation(one(seed, 0.1)) for seed in range(100)]
    assert slower == pytest.approx(steady, rel=0.3)
    # √(0.02² + what noise of 1 % adds to a median of four sums of two)
    assert numpy.mean(steady) == pytest.approx(0.0205, rel=0.1)
    a, b, _ = one(0, 0.0)
    assert timing.restart_deviation([a]) is None
    assert timing.restart_deviation([timing.Samples(a.rounds), timing.Samples(b.rounds)]) is None


def test_restarts_are_kept_with_their_rounds():
    taken = Restarted(1).times(3, 2, a=100.0, b=100.0)
    assert taken["a"].restarts == (0, 0, 1, 1, 2, 2)
    assert taken["a"].to_json()["restarts"] == [0, 0, 1, 1, 2, 2]
    assert "restarts" not in timing.Samples(((1.0, 1.0),)).to_json()
    assert timing.by_restart([1.0, 3.0, 8.0, 5.0], [0, 0, 1, 1]) == [2.0, 6.5]
    with pytest.raises(ValueError, match="restarts"):
        timing.Samples(((1.0, 1.0),), (0, 1))
    with pytest.raises(ValueError, match="restart both"):
        timing.speedup(taken["a"], timing.Samples(taken["b"].rounds))
    with pytest.raises(ValueError, match="at least two restarts"):
        timing.over_restarts([1.0])
    with pytest.raises(ValueError, match="positive"):
        timing.over_restarts([1.0, 0.0])


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
