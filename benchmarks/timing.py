"""How alternatives are timed: interleaved, warmed up, paired, and with an interval on every ratio.

One *round* runs every alternative twice, in an order and then in its reverse (A B B A), so that a machine which slows
down or speeds up steadily treats all of them alike; the order itself turns from round to round. The figure for "A
against B" is the median over rounds of the ratio of their times within the round, with a bootstrap interval over
rounds: noise that lasts longer than a round cancels, and noise that does not widens the interval. What is assumed is
that the ratios of different rounds know nothing of each other.

Two processes of one program can differ for as long as they live, by how their memory happens to lie: no number of
rounds tells that from a difference between programs. Where every alternative was *restarted*, the figure is the
geometric mean of the restarts' medians, and the interval Student's over the restarts, one value each
(:func:`over_restarts`). All that differs between processes and all that differs between rounds is in these values, so
that their deviation is the whole of it. It is not a bootstrap: of three or five restarts there are too few resamples.

An *arm* is a function without arguments that runs its alternative once and returns the milliseconds it took.
:func:`timed` makes one from a call and a :class:`Clock`; an arm may as well drive another process that times itself.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy

from tritium.benchmarks.curves import student_quantile

Arm = Callable[[], float]


class Clock(Protocol):
    """Times calls on a device. ``name`` goes into records."""

    name: str

    def times_ms(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        """Run the calls in order; milliseconds of each, of the device's work and not only of its submission."""
        ...


class WallClock:
    """``time.perf_counter`` around each call; ``synchronize`` (a GPU's) runs before both readings."""

    def __init__(self, synchronize: Callable[[], object] | None = None):
        self.synchronize = synchronize
        self.name = "perf_counter" if synchronize is None else "perf_counter, synchronised"

    def times_ms(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        times = []
        for call in calls:
            if self.synchronize is not None:
                self.synchronize()
            start = time.perf_counter_ns()
            call()
            if self.synchronize is not None:
                self.synchronize()
            times.append((time.perf_counter_ns() - start) / 1e6)
        return times


class CudaEvents:
    """A pair of CUDA events around each call, one synchronisation for all of them.

    scrub_bytes > 0: a buffer of that size is overwritten before each call, outside the events. That empties the L2
    cache, and it occupies the device while the host submits the call, so that a short kernel is not charged for its
    launch.
    """

    def __init__(self, scrub_bytes: int = 0):
        import torch

        self._torch = torch
        self._scrub = torch.empty(scrub_bytes, dtype=torch.uint8, device="cuda") if scrub_bytes else None
        self.name = "cuda events" + (f", {scrub_bytes >> 20} MiB overwritten before each call" if scrub_bytes else "")

    def times_ms(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        cuda = self._torch.cuda
        pairs = [(cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)) for _ in calls]
        for call, (begin, end) in zip(calls, pairs, strict=True):
            if self._scrub is not None:
                self._scrub.zero_()
            begin.record()
            call()
            end.record()
        cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in pairs]


def clock_for(device: str, *, scrub_bytes: int = 0) -> Clock:
    """The clock of a device: "cpu" or "cuda"."""
    return CudaEvents(scrub_bytes) if device == "cuda" else WallClock()


def rotate(call: Callable[..., object], inputs: Sequence[tuple[Any, ...]]) -> Callable[[], object]:
    """``call`` on the next of ``inputs`` each time, so that no run finds its operands where the last one left them."""
    turn = itertools.cycle(inputs)
    return lambda: call(*next(turn))


def timed(call: Callable[[], object], clock: Clock, inner: int = 1) -> Arm:
    """An arm: the median of ``inner`` consecutive calls."""
    return lambda: statistics.median(clock.times_ms([call] * inner))


# ------------------------------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class WarmUp:
    """What happened before timing began; ``stable`` is False when the limit ended it."""

    runs: int
    stable: bool
    ms: tuple[float, ...]


def warm_up(
    arm: Arm,
    *,
    window: int = 3,
    tolerance: float = 0.05,
    limit_runs: int = 30,
    limit_s: float = 120.0,
    agreed: Callable[[bool], bool] = bool,
) -> WarmUp:
    """Run ``arm`` until the medians of its last two windows of runs differ by ≤ ``tolerance``, or until a limit.

    agreed(stop): what all processes do, where the arm is a step that several take together.
    """
    start = time.monotonic()
    ms: list[float] = []
    while True:
        ms.append(arm())
        stable = False
        if len(ms) >= 2 * window:
            before, after = statistics.median(ms[-2 * window : -window]), statistics.median(ms[-window:])
            stable = abs(after - before) <= tolerance * before
        over = len(ms) >= limit_runs or (len(ms) >= 2 and time.monotonic() - start >= limit_s)
        if agreed(stable or over):
            return WarmUp(len(ms), stable, tuple(ms))


@dataclass(frozen=True)
class Samples:
    """The timings of one arm: for each round, the two runs of its palindrome, in milliseconds.

    restarts: for each round, which start of the arm's process it is from, counted from 0; () where there was one.
    """

    rounds: tuple[tuple[float, float], ...]
    restarts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.restarts and len(self.restarts) != len(self.rounds):
            raise ValueError(f"{len(self.rounds)} rounds cannot be of {len(self.restarts)} restarts; name one of each")

    @property
    def ms(self) -> list[float]:
        return [t for pair in self.rounds for t in pair]

    def quantile_ms(self, q: float) -> float:
        return float(numpy.quantile(self.ms, q))

    @property
    def median_ms(self) -> float:
        return self.quantile_ms(0.5)

    def to_json(self) -> dict[str, object]:
        """Percentiles and every single timing, so that another statistic can be computed later."""
        quantiles = {f"p{100 * q:.0f}_ms": self.quantile_ms(q) for q in (0.2, 0.5, 0.8)}
        return {
            "runs": len(self.ms),
            "min_ms": min(self.ms),
            **quantiles,
            "rounds_ms": [list(pair) for pair in self.rounds],
            **({"restarts": list(self.restarts)} if self.restarts else {}),
        }


def joined(parts: Sequence[Samples]) -> Samples:
    """The timings of one arm in several processes, one after the other."""
    rounds = tuple(pair for part in parts for pair in part.rounds)
    return Samples(rounds, tuple(i for i, part in enumerate(parts) for _ in part.rounds))


def interleave(
    arms: Mapping[str, Arm], rounds: int, between: Callable[[int], object] = lambda done: None
) -> dict[str, Samples]:
    """Run every arm twice in each of ``rounds`` rounds, A B C C B A, the order turned by one arm each round.

    between(done): called after each round, for progress.
    """
    if rounds < 1 or not arms:
        raise ValueError(f"interleave needs at least one arm and one round, not {len(arms)} and {rounds}")
    names = list(arms)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for done in range(rounds):
        turn = done % len(names)
        order = names[turn:] + names[:turn]
        first = {name: arms[name]() for name in order}
        second = {name: arms[name]() for name in reversed(order)}
        for name in names:
            taken[name].append((first[name], second[name]))
        between(done + 1)
    return {name: Samples(tuple(pairs)) for name, pairs in taken.items()}


# ----------------------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Interval:
    """A median over rounds with its interval, or of several restarts the geometric mean of their medians. For a ratio
    of speeds: above 1 when the first is faster."""

    median: float
    low: float
    high: float
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def bootstrap_median(
    values: Sequence[float], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Median of ``values`` and its bootstrap interval (Efron 1979), seeded so that it can be recomputed.

    A resample never leaves its values, between two of which the truth lies only every second time. So the percentiles'
    distances from the median are stretched by √(n / (n - 1)), and by Student's quantile of n - 1 degrees of freedom
    over the normal one: 9 × for two values, 1.2 × for ten, nothing for many.
    """
    data = numpy.asarray(values, dtype=numpy.float64)
    if data.size < 2 or not numpy.isfinite(data).all():
        raise ValueError(f"an interval needs at least two finite values, not {data.tolist()}; take more rounds")
    generator = numpy.random.default_rng(seed)
    middle = float(numpy.median(data))
    distances = numpy.median(generator.choice(data, size=(resamples, data.size)), axis=1) - middle
    tail = (1.0 - level) / 2.0
    low, high = numpy.quantile(distances, (tail, 1.0 - tail)) * _stretch(data.size, level)
    return Interval(middle, middle + min(float(low), 0.0), middle + max(float(high), 0.0), level)


@functools.cache
def _stretch(n: int, level: float) -> float:
    normal = statistics.NormalDist().inv_cdf((1.0 + level) / 2.0)
    return math.sqrt(n / (n - 1)) * student_quantile(level, n - 1) / normal


def bootstrap_median_of_positive(values: Sequence[float], *, level: float = 0.95, seed: int = 0) -> Interval:
    """The same of speeds, times or ratios, by their logarithms, so that no end of the interval is below 0."""
    if not all(value > 0.0 for value in values):
        raise ValueError(f"the median's logarithm needs positive values, not {list(values)}")
    found = bootstrap_median([math.log(value) for value in values], level=level, seed=seed)
    return Interval(math.exp(found.median), math.exp(found.low), math.exp(found.high), level)


def by_restart(values: Sequence[float], restarts: Sequence[int]) -> list[float]:
    """The median of the values of each restart, in the order of the restarts."""
    taken: dict[int, list[float]] = {}
    for value, restart in zip(values, restarts, strict=True):
        taken.setdefault(restart, []).append(value)
    return [statistics.median(taken[restart]) for restart in sorted(taken)]


def over_restarts(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """The geometric mean of one positive value of each of at least two restarts, with Student's interval.

    Assumed is that the restarts know nothing of each other, and that their logarithms are about normal.
    """
    if len(values) < 2 or not all(0.0 < value < math.inf for value in values):
        raise ValueError(f"an interval needs positive values of at least two restarts, not {list(values)}")
    logs = [math.log(value) for value in values]
    middle = statistics.fmean(logs)
    half = student_quantile(level, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Interval(math.exp(middle), math.exp(middle - half), math.exp(middle + half), level)


def speedup(ours: Samples, theirs: Samples, *, level: float = 0.95, seed: int = 0) -> Interval:
    """How many times faster ``ours`` is than ``theirs``, from their times within the same rounds.

    Of several restarts the interval covers what differs between two processes; of one it covers this process alone.
    """
    if len(ours.rounds) != len(theirs.rounds) or ours.restarts != theirs.restarts:
        raise ValueError(
            f"rounds must be paired: {len(ours.rounds)} against {len(theirs.rounds)}; time both in one interleave(), "
            "and restart both at once"
        )
    ratios = [sum(b) / sum(a) for a, b in zip(ours.rounds, theirs.rounds, strict=True)]
    if len(set(ours.restarts)) > 1:
        return over_restarts(by_restart(ratios, ours.restarts), level=level)
    return bootstrap_median_of_positive(ratios, level=level, seed=seed)


def restart_deviation(samples: Sequence[Samples]) -> float | None:
    """Standard deviation between processes of one arm, about a fraction of its time; None for fewer than two arms of
    two restarts. All arms have the same restarts.

    Of the logarithms of the restarts' medians, with what is common to an arm and what is common to a restart (the
    machine was slower then) taken out; the little that the noise within a restart adds to a median is in it.
    """
    if len(samples) < 2 or len(set(samples[0].restarts)) < 2:
        return None
    table = numpy.log([by_restart([sum(pair) for pair in arm.rounds], arm.restarts) for arm in samples])
    rest = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
    arms, restarts = table.shape
    return float(numpy.sqrt((rest**2).sum() / ((arms - 1) * (restarts - 1))))


def how_taken(rounds: int, about: Mapping[str, Any]) -> str:
    """In words, how arms were timed. about: "restarts" and "deviation" of a throughput record's model; one from before
    version 4 had one process of each arm, and does not say so."""
    if "restarts" not in about:
        return f"{rounds} interleaved rounds"
    if about["restarts"] == 1:
        return f"{rounds} interleaved rounds in one process of each (so the intervals do not cover another process)"
    deviation = f" (which deviate by {100 * about['deviation']:.1f} %)" if about["deviation"] is not None else ""
    return f"{rounds} interleaved rounds in each of {about['restarts']} processes{deviation}"


def noise(samples: Samples) -> float:
    """How far an arm differs from itself within a round: the median of |log(first run / second run)|, ≈ a fraction."""
    return statistics.median(abs(math.log(a / b)) for a, b in samples.rounds)
