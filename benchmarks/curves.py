"""Training curves of several arms, side by side, and what their differences show.

All arms of a comparison train in lockstep: the same batch goes to each in turn, in an order that turns from step to
step, so that a machine which slows down does so for all of them. Seconds are of the training steps alone: evaluating
and compiling are outside. Differences are paired by seed, since arms that share a seed share weights and data.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy

from tritium.benchmarks import record

if TYPE_CHECKING:
    import torch

    from tritium.engine.config import Config
    from tritium.engine.step import MicroBatch

EXACT = 16  # up to so many seeds every pattern of signs is looked at; beyond, 2 ** EXACT of them, drawn


class Learner(Protocol):
    """An arm that can be trained from a seed."""

    def restart(self, seed: int) -> None:
        """Fresh weights and optimizer of ``seed``."""
        ...

    def train(self, batch: MicroBatch, lr: float) -> float:
        """One step on ``batch``; its seconds."""
        ...

    def evaluate(self, data: Data) -> float:
        """Validation loss, nats per token."""
        ...


class Data(Protocol):
    """What is trained on: the same batches in the same order for every arm of a seed."""

    name: str

    def batches(self, seed: int) -> Iterator[MicroBatch]: ...
    def validation_loss(self, model: torch.nn.Module, device: torch.device) -> float: ...


@dataclass
class Curve:
    """One training: after ``steps[i]`` steps of ``train_s[i]`` seconds the validation loss was ``val_loss[i]``."""

    seed: int
    steps: list[int] = field(default_factory=list)
    train_s: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)

    @property
    def final(self) -> float:
        return self.val_loss[-1]

    @property
    def mean(self) -> float:
        """The area under the curve over its length (trapezoids over steps)."""
        if len(self.steps) == 1:
            return self.val_loss[0]
        pairs = zip(itertools.pairwise(self.steps), itertools.pairwise(self.val_loss), strict=True)
        return sum((t - s) * (a + b) / 2 for (s, t), (a, b) in pairs) / (self.steps[-1] - self.steps[0])

    def reached(self, target: float) -> int | None:
        """Index of the first evaluation at or below ``target``, or None."""
        return next((i for i, loss in enumerate(self.val_loss) if loss <= target), None)


class Stopped(KeyboardInterrupt):
    """Ctrl-C, with the curves of the seeds that every arm has finished."""

    def __init__(self, found: dict[str, list[Curve]]):
        super().__init__()
        self.found = found


class Lost(Exception):
    """An arm cannot go on; the message says why."""


def train(
    arms: Mapping[str, Learner],
    data: Data,
    seeds: Sequence[int],
    steps: int,
    every: int,
    rate: Callable[[str, int], float],
    say: Callable[[str], object] = lambda text: None,
    lost: dict[str, str] | None = None,
) -> dict[str, list[Curve]]:
    """Train every arm from every seed for ``steps`` steps, evaluating before the first, every ``every`` and at the end.

    rate(arm, step): the learning rate of a step. An arm that breaks or diverges is left out from there on and of the
    result, and ``lost`` says why; without the first, the baseline, there is no result. Stopped on Ctrl-C.
    """
    found: dict[str, list[Curve]] = {name: [] for name in arms}
    names = list(arms)
    lost = {} if lost is None else lost
    first = names[0]

    def each(order: Sequence[str], do: Callable[[str], None], seed: int, step: int) -> None:
        for name in order:
            try:
                do(name)
            except Exception as error:  # whatever a backend of the user's may raise
                said = (str(error).splitlines() or [""])[0]
                what = said if isinstance(error, Lost) else f"{type(error).__name__}: {said}"
                lost[name] = f"{what}, from seed {seed} at step {step}"
                say(f"{name}: {lost[name]}; it is left out")
                names.remove(name)
                del found[name]
                if name == first:
                    break

    def evaluate(name: str) -> None:
        curve = found[name][-1]
        loss = arms[name].evaluate(data)
        if not math.isfinite(loss):
            raise Lost(f"a validation loss of {loss}")
        curve.steps.append(step)
        curve.train_s.append(seconds[name])
        curve.val_loss.append(loss)

    def begin(name: str) -> None:
        arms[name].restart(seed)
        found[name].append(Curve(seed))

    def learn(name: str) -> None:
        seconds[name] += arms[name].train(batch, rate(name, step))

    finished = 0
    try:
        for seed in seeds:
            seconds, step = dict.fromkeys(names, 0.0), 0
            each(list(names), begin, seed, 0)
            batches = data.batches(seed)
            for step in range(steps + 1):
                if first in lost:
                    return {}
                if step % every == 0 or step == steps:
                    each(list(names), evaluate, seed, step)
                    losses = ", ".join(f"{name} {found[name][-1].final:.4f}" for name in names)
                    say(f"seed {seed}, step {step} of {steps}: validation loss {losses}")
                if step < steps and names:
                    batch, turn = next(batches), step // 2 % len(names)
                    order = names[turn:] + names[:turn]
                    each(order if step % 2 == 0 else order[::-1], learn, seed, step)
            if (close := getattr(batches, "close", None)) is not None:
                close()
            finished += 1
    except KeyboardInterrupt:
        raise Stopped({name: done[:finished] for name, done in found.items()}) from None
    return {} if first in lost else found


# ----------------------------------------------------------------------------------------------------------- statistics


def student_t(t: float, freedom: int) -> float:
    """P(|T| ≤ t) of Student's distribution with a whole number of degrees of freedom (Abramowitz & Stegun 26.7.3-4)."""
    if math.isinf(t):
        return 1.0
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (cosine, 0.0) if freedom % 2 else (1.0, 0.0)
    for k in range(1 if freedom % 2 else 0, freedom - 1, 2):
        total += term
        term *= (k + 1) / (k + 2) * cosine * cosine
    return 2 / math.pi * (angle + sine * total) if freedom % 2 else sine * total


def student_quantile(level: float, freedom: int) -> float:
    """t with P(|T| ≤ t) = level, by bisection."""
    low, high = 0.0, 1.0
    while student_t(high, freedom) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t(middle, freedom) < level else (low, middle)
    return high


@dataclass(frozen=True)
class Paired:
    """Differences by seed: their mean with its interval, and how likely a mean so far from 0 would be by chance.

    p: Student's paired t-test, which takes the differences for normally distributed. p_signs: the exact sign-flip test,
    which takes them only for symmetric; with n seeds it cannot be below 2 / 2ⁿ. p_holm: p, corrected for the number of
    arms that were compared (Holm 1979).
    """

    n: int
    mean: float
    low: float
    high: float
    p: float
    p_signs: float
    p_holm: float

    @property
    def shown(self) -> bool:
        """Whether a difference is shown at 5 %, all arms considered."""
        return self.p_holm < 0.05


PAIRED: record.Schema = {
    "n": int, "mean": record.NUMBER, "low": record.NUMBER, "high": record.NUMBER, "p": record.NUMBER,
    "p_signs": record.NUMBER, "p_holm": record.NUMBER,
}  # fmt: skip


def paired(differences: Mapping[str, Sequence[float]], level: float = 0.95) -> dict[str, Paired]:
    """Arm → its differences to the baseline, seed by seed → what they show. ValueError for fewer than two seeds."""
    found: dict[str, tuple[int, float, float, float, float]] = {}
    for name, values in differences.items():
        n = len(values)
        if n < 2:
            raise ValueError(f"a paired test needs at least two seeds, and {name} has {n}; give more --seeds")
        mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(n)
        half = student_quantile(level, n - 1) * error
        p = 1.0 if mean == 0.0 else 1.0 - student_t(mean / error if error > 0.0 else math.inf, n - 1)
        found[name] = (n, mean, half, p, sign_flips(values))
    holm = corrected({name: p for name, (_, _, _, p, _) in found.items()})
    return {
        name: Paired(n, mean, mean - half, mean + half, p, signs, holm[name])
        for name, (n, mean, half, p, signs) in found.items()
    }


def sign_flips(values: Sequence[float], seed: int = 0) -> float:
    """p of the two-sided sign-flip test of mean 0: the share of sign patterns whose mean is at least as far from it."""
    n = len(values)
    if n <= EXACT:
        signs = numpy.array(list(itertools.product((1.0, -1.0), repeat=n)))
    else:
        signs = numpy.random.default_rng(seed).choice((1.0, -1.0), size=(2**EXACT, n))
        signs[0] = 1.0  # the pattern that was seen is one of those that are possible
    means = numpy.abs(signs @ numpy.asarray(values))
    return float(numpy.mean(means >= means[0] * (1 - 1e-12)))


def corrected(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's correction for as many tests as there are: arm → p, at most 1."""
    worst, found = 0.0, {}
    for rank, name in enumerate(sorted(p, key=p.__getitem__)):
        worst = max(worst, min(1.0, (len(p) - rank) * p[name]))
        found[name] = worst
    return found


# -------------------------------------------------------------------------------------------------------------- results

TARGET: record.Schema = {
    "reached": int, "of": int,  # seeds
    "seconds": [record.NUMBER], "tokens": [int],  # of the seeds that reached it, in order
    "seconds_ratio": (dict, type(None)),  # baseline's seconds over the arm's, by seed: median, low, high, level
}  # fmt: skip
ARM: record.Schema = {
    "curves": [{"seed": int, "steps": [int], "train_s": [record.NUMBER], "val_loss": [record.NUMBER]}],
    "final": (dict, type(None)),  # PAIRED: final validation loss less the baseline's; null for the baseline
    "mean": (dict, type(None)),  # the same of the mean over the curve
    "target": (dict, type(None)),  # TARGET
}


def compare(
    curves: Mapping[str, Sequence[Curve]],
    baselines: Mapping[str, Sequence[Curve]],
    step_tokens: int,
    target: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Every arm's curves beside those of its baseline, as ARM. baselines: arm → the baseline's curves that it trained
    in lockstep with; the baseline itself has none there."""
    paired_final = paired({n: [a.final - b.final for a, b in _pairs(curves[n], c)] for n, c in baselines.items()})
    paired_mean = paired({n: [a.mean - b.mean for a, b in _pairs(curves[n], c)] for n, c in baselines.items()})
    found = {}
    for name, mine in curves.items():
        found[name] = {
            "curves": [{"seed": c.seed, "steps": c.steps, "train_s": c.train_s, "val_loss": c.val_loss} for c in mine],
            "final": vars(paired_final[name]) if name in paired_final else None,
            "mean": vars(paired_mean[name]) if name in paired_mean else None,
            "target": None if target is None else to_target(mine, baselines.get(name), step_tokens, target),
        }
    return found


def _pairs(mine: Sequence[Curve], theirs: Sequence[Curve]) -> list[tuple[Curve, Curve]]:
    return list(zip(mine, theirs, strict=True))


def to_target(
    mine: Sequence[Curve], baseline: Sequence[Curve] | None, step_tokens: int, target: float
) -> dict[str, Any]:
    """Seconds and tokens of each seed until the first evaluation at or below ``target``, as TARGET. The ratio is of the
    seeds that reached it in both, with Student's interval over the logarithms; null for fewer than two."""
    at = [(curve, index) for curve in mine if (index := curve.reached(target)) is not None]
    logs = []
    for a, b in _pairs(mine, baseline or ()) if baseline else []:
        i, j = a.reached(target), b.reached(target)
        if i is not None and j is not None and a.train_s[i] > 0.0 and b.train_s[j] > 0.0:
            logs.append(math.log(b.train_s[j] / a.train_s[i]))
    ratio = None
    if len(logs) >= 2:
        mean = statistics.fmean(logs)
        half = student_quantile(0.95, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
        ratio = {"median": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half), "level": 0.95}
    return {
        "reached": len(at),
        "of": len(mine),
        "seconds": [curve.train_s[i] for curve, i in at],
        "tokens": [curve.steps[i] * step_tokens for curve, i in at],
        "seconds_ratio": ratio,
    }


# ----------------------------------------------------------------------------------------------------------------- data


class Corpus:
    """The preset's own text, in whole batches of ``rows`` rows."""

    def __init__(self, config: Config, say: Callable[[str], object]):
        from tritium.engine import train
        from tritium.engine.parallel import World
        from tritium.engine.report import Reporter
        from tritium.engine.tasks.pretraining import Pretraining

        class Said(Reporter):
            def write(self, text: str) -> None:
                say(text)

        self.folder = train.prepared(config, World(), Said())
        self.vocab_size = Pretraining(config, self.folder).vocab_size
        self.config, self.name = config, ", ".join(config.data.sources) if not config.data.folder else str(self.folder)

    def shaped(self, config: Config) -> Corpus:
        """For a model and batch of another shape; ConfigError or DataError where the text cannot feed it."""
        from tritium.engine.tasks.pretraining import Pretraining

        self.config = config.replace(train={"micro_rows": config.train.batch_rows})
        self.task = Pretraining(self.config, self.folder)
        self.task.check()
        return self

    def batches(self, seed: int) -> Iterator[MicroBatch]:
        """Endless batches (batch_rows, block_size) in the order of ``seed``."""
        from tritium.engine.tasks.pretraining import Pretraining

        return Pretraining(self.config.replace(data={"seed": seed}), self.folder).batches(0)

    def validation_loss(self, model: torch.nn.Module, device: torch.device) -> float:
        return self.task.evaluate(model, device, self.config.train.eval_tokens)["val_loss"]


class Markov:
    """Tokens of a random Markov chain of order 1: something to learn without any file. One of ``choices`` tokens
    follows each, so a model can come down from log V to log choices."""

    def __init__(self, vocab_size: int, B: int, T: int, choices: int = 4, seed: int = 0):
        import torch

        self.name, self.vocab_size, self.B, self.T = "a random Markov chain", vocab_size, B, T
        self.next = torch.randint(vocab_size, (vocab_size, choices), generator=torch.Generator().manual_seed(seed))
        self.held_out = next(self.batches(2**62))

    def batches(self, seed: int) -> Iterator[MicroBatch]:
        """Endless batches (B, T) of ``seed``."""
        import torch

        from tritium.engine.step import MicroBatch

        draw = torch.Generator().manual_seed(seed)
        while True:
            rows = torch.empty(self.B, self.T + 1, dtype=torch.int64)
            rows[:, 0] = torch.randint(self.vocab_size, (self.B,), generator=draw)
            which = torch.randint(self.next.shape[1], (self.B, self.T), generator=draw)
            for t in range(self.T):
                rows[:, t + 1] = self.next[rows[:, t], which[:, t]]
            yield MicroBatch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())

    def validation_loss(self, model: torch.nn.Module, device: torch.device) -> float:
        from tritium.engine.evaluate import validation_loss

        total, tokens = validation_loss(model, [self.held_out], device)  # type: ignore[list-item]
        return total / tokens
