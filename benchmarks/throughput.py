"""Training throughput against peers: tokens/s of whole steps, on equal weights, batches and losses.

    tritium bench peers [PRESET ...] [--T 256] [--B 2] [--restarts 5] [--rounds 4] [--peers textbook,litgpt]

Every implementation trains in a process of its own (:mod:`arm`), one at a time, in tritium's precision. First each
peer's variants are tried and the fastest kept; then it is checked that all of them compute the same thing (precision,
optimizer, and the losses of three steps from the same weights over the same batches: forward, backward, clipping and
update; where they train in bf16, also in fp32, whose losses differ by less); then they are timed, interleaved in rounds
(:mod:`timing`), and that in several restarts: processes that find their code compiled, started in an order drawn anew,
so that the interval covers what differs between two processes of one program. A comparison of different things is
refused: exit status 1.

A peer that does not implement the preset's model is compared at the nearest that it does (``fit`` of its module), with
an arm of tritium of just that model, in the same rounds; tables name the model. A peer that cannot run says why; where
that is one of peers.REQUIRED, the others are compared all the same, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import pathlib
import random
import re
import shlex
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tritium.benchmarks import peers, record, stages, timing
from tritium.benchmarks.ablate import free_bytes
from tritium.benchmarks.arm import OURS, ArmError, ArmProcess
from tritium.benchmarks.ours import PRECISION
from tritium.engine import allocator, presets
from tritium.engine.config import Config
from tritium.engine.metrics import flops_per_token
from tritium.engine.precision import resolve
from tritium.kernels.op import nearest

RESULTS = record.ROOT / "benchmarks" / "results" if record.IN_SOURCE_TREE else pathlib.Path("benchmark-results")
SHAPES = {
    "cpu": {"gpt2_124m": (256, 2), "tiny": (256, 16)},
    "cuda": {"gpt2_124m": (1024, 32), "tiny": (256, 64)},
}  # (T, B)
VOCAB_SIZE = 1024  # for a preset that takes its vocabulary from the data: what the tiny preset's tokenizer has
LOSS_STEPS = 3
LOSS_BOUNDS = {"fp32": 2e-5, "bf16": 2e-3, "fp8": 2e-2}  # relative, on every step's loss
RESTARTS, ROUNDS = 5, 4  # few rounds in many processes: of the two, it is the processes that differ more
FILL = 0.9  # of the free memory, that the arms of one comparison may hold
NEAR = 0.05  # a variant this close to its peer's best in the screening is timed as well,
FINALISTS = 2  # up to so many of BASELINE and of MEASURE; of the other peers the best

ARM: record.Schema = {
    "peer": str,  # "tritium" or a name in peers.NAMES
    "variant": str,
    "settings": {str: str},  # precision and the optimizer's numbers, read from what was built; equal in all arms
    "model": str,  # a key of settings.models
    "losses": [record.NUMBER],  # of LOSS_STEPS steps from the common weights
    "losses_fp32": [record.NUMBER],  # the same uncompiled in fp32, over two rows at most; [] where it trains in fp32
    "warm_up": {"runs": int, "stable": bool},  # of all restarts
    "tokens_per_s": record.NUMBER,  # B·T over the median step
    "times": {
        "runs": int, "min_ms": record.NUMBER, "p20_ms": record.NUMBER, "p50_ms": record.NUMBER, "p80_ms": record.NUMBER,
        "rounds_ms": [[record.NUMBER]],
        "restarts": [int],  # of each round: which restart it is from, counted from 0
    },
    "noise": record.NUMBER,  # median |log ratio| of the two runs within a round
    "startup_s": record.NUMBER,  # from before the process existed to the end of its first step, compiled from nothing
    "peak_bytes": int,  # after two steps of that process, less what the imports take
    "threads": int,
    "kernels": [{"site": str, "op": str, "phase": str, "backend": str, "why": str}],
}  # fmt: skip
INTERVAL: record.Schema = {"median": record.NUMBER, "low": record.NUMBER, "high": record.NUMBER, "level": record.NUMBER}
SCHEMA: record.Schema = {
    "settings": {
        "preset": str, "T": int, "B": int, "seed": int, "config": dict,
        "restarts": int,  # that were asked for: processes of each arm that are timed
        "rounds": int,  # in each of them
        "models": {str: {
            "changed": str,  # what differs from the preset's model: "position=rope"; "" for that itself
            "flops_per_token": int,  # full convention
            "restarts": int,  # that were completed; of one, the intervals cover rounds within this process alone
            "stopped": str,  # why they are fewer, or ""
            "deviation": (*record.NUMBER, type(None)),  # between processes of one arm: timing.restart_deviation
        }},
    },
    "method": str,
    "screening": [
        {"peer": str, "variant": str, "tokens_per_s": (*record.NUMBER, type(None)), "problem": (str, type(None))},
    ],
    "equal_loss": {"ok": bool, "worst_relative": record.NUMBER, "problems": [str]},
    "arms": {str: ARM},
    "best_peer": str,  # the key of the arm that ours of the same model beats by least
    "speedup": {str: INTERVAL},  # ours of the same model over each of the other arms
    "void": {str: str},  # peer that is no baseline, since another of the same model is faster → by how much
    "peers_absent": {str: str},  # peer → why it could not run
}  # fmt: skip
WHOLE, CTRL_C = "ran to its end", "stopped by Ctrl-C"
METHOD = (
    "one process an arm, one running at a time; on a CPU a peer's threads wait for each other as torch has them, or as "
    "the environment says, tritium's as `tritium train` has them, and tritium keeps freed memory in the process, as do "
    "the variants marked so; all arms are restarted together, in "
    "an order drawn from the seed, their code compiled before; in each restart warm-up until the medians of two "
    "windows of 3 steps agree to 5 %, then rounds: every arm once in an order and once in its reverse; speedup = "
    "geometric mean over restarts of the median over rounds of the ratio of times within the round, 95 % by Student's "
    "t over the restarts; of one restart: the median over rounds, 95 % bootstrap, stretched for few rounds"
)


class Different(RuntimeError):
    """The arms do not compute the same thing; the message says which and by how much."""


BASELINE, MEASURE = "textbook", "huggingface"  # the first is a baseline only when it keeps up with the second


def shaped(name: str, T: int) -> Config:
    """The preset as it is benchmarked: its vocabulary set, room for rows of T tokens."""
    config = presets.load(name)
    model = dataclasses.replace(
        config.model, vocab_size=config.model.vocab_size or VOCAB_SIZE, block_size=max(T, config.model.block_size)
    )
    return dataclasses.replace(config, model=model)


def bench_train(
    config: Config,
    T: int,
    B: int,
    *,
    restarts: int = RESTARTS,
    rounds: int = ROUNDS,
    device: str = "cpu",
    peer_names: Sequence[str] = peers.NAMES,
    screening_steps: int = 5,
    seed: int = 0,
    command: str = "",
) -> dict[str, Any]:
    """Compare training throughput; returns the record (:data:`SCHEMA`).

    restarts: processes of each arm that are timed, each for ``rounds`` rounds; 1: those that compiled from nothing.
    screening_steps: timed steps of each variant when choosing among a peer's; 0 takes the first variant of each.
    Raises Different, ArmError when ours fails, and ValueError when no peer can be compared with.
    """
    result = record.begin("throughput", command, device, config.name)
    dtype = resolve(config.train.precision, torch.device(device))  # once: auto is measured, and all arms shall be alike
    config = config.replace(train={"precision": PRECISION[dtype]})
    fits, absent = fitted(config, peer_names, device)
    for name, reason in absent.items():
        _say(f"{name} is left out: {reason}")
    run = _Run(T, B, device, seed)
    facts: dict[str, dict[str, Any]] = {}
    samples: dict[str, timing.Samples] = {}
    with tempfile.TemporaryDirectory(prefix="tritium-bench-", ignore_cleanup_errors=True) as folder:
        run.folder = pathlib.Path(folder)
        models = {fit.config.name: fit for fit in fits.values()}
        for model, fit in models.items():  # one after the other: a process holds its model as long as it lives
            names = [name for name, other in fits.items() if other.config.name == model]
            if run.ended:
                run.failed |= dict.fromkeys(names, f"was not reached: {run.ended}")
                continue
            try:
                found, taken = run.compare(fit, names, screening_steps, restarts, rounds)
            except (ArmError, KeyboardInterrupt) as error:  # the figures of the other models are whole
                if isinstance(error, KeyboardInterrupt):
                    run.ended = str(error) or CTRL_C
                    if not facts:
                        raise
                elif len(models) == 1:
                    raise
                why = f"{model} could not be timed: {run.ended or error}"
                _say(why)
                run.broken.append(why)
                run.failed |= dict.fromkeys(names, why)
                continue
            facts |= found
            samples |= taken
    record.after(result)
    absent |= run.failed
    if not facts:
        reasons = "; ".join(f"{name} {reason}" for name, reason in absent.items())
        raise ValueError(f"there is no peer to compare with: {reasons}")
    used = {fit.config.name: fit for name, fit in fits.items() if name not in absent}
    ours = {fact["model"]: key for key, fact in facts.items() if fact["peer"] == OURS}
    worst = max(
        abs(a - b) / abs(a)
        for fact in facts.values()
        for a, b in zip(facts[ours[fact["model"]]]["losses"], fact["losses"], strict=True)
    )
    for key, mine in samples.items():
        facts[key] |= {
            "tokens_per_s": 1e3 * B * T / mine.median_ms,
            "times": mine.to_json(),
            "noise": timing.noise(mine),
        }
        speeds = [1e3 * B * T / ms for ms in mine.ms]
        of = [restart for restart in mine.restarts for _ in range(2)]
        result["figures"].append(record.figure(f"{key} tokens/s", "tokens/s", "higher", speeds, restarts=of))
    speedup = {
        key: timing.speedup(samples[ours[fact["model"]]], samples[key])
        for key, fact in facts.items()
        if fact["peer"] != OURS
    }
    result["kernels"] = facts[next(iter(ours.values()))]["kernels"]
    result["sources"] = record.sources(
        (row["op"], row["backend"]) for key in ours.values() for row in facts[key]["kernels"]
    )
    result["checks"] += [
        record.check("equal precision and optimizer", True, _words(next(iter(facts.values()))["settings"])),
        record.check("equal losses", True, f"worst relative difference {worst:g}"),
    ]
    if run.ended or run.broken:
        result["checks"].append(record.check(WHOLE, False, "; ".join(filter(None, [run.ended, *run.broken]))))
    void = falls_behind(facts, samples)
    contenders = [key for key in speedup if facts[key]["peer"] not in void]
    return result | {
        "settings": {
            "preset": config.name, "T": T, "B": B, "restarts": restarts, "rounds": rounds, "seed": seed,
            "config": json.loads(config.to_json()),
            "models": {
                name: {
                    "changed": peers.changed(config.model, fit.config.model),
                    "flops_per_token": flops_per_token(fit.config.model, T),
                    "restarts": len(set(samples[ours[name]].restarts)),
                    "stopped": run.stopped.get(name, ""),
                    "deviation": timing.restart_deviation(
                        [samples[key] for key, fact in facts.items() if fact["model"] == name]
                    ),
                }
                for name, fit in used.items()
            },
        },
        "method": METHOD,
        "screening": run.screening,
        "equal_loss": {"ok": True, "worst_relative": worst, "problems": []},
        "arms": facts,
        "best_peer": min(contenders or speedup, key=lambda key: speedup[key].median),
        "speedup": {key: ratio.to_json() for key, ratio in speedup.items()},
        "void": void,
        "peers_absent": absent,
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a peer is compared at: a configuration, and the name of its parts where they are not the preset's."""

    config: Config
    words: str


def fitted(config: Config, names: Sequence[str], device: str) -> tuple[dict[str, Fit], dict[str, str]]:
    """Each peer's :class:`Fit`, and of those that cannot run here the reasons."""
    fits: dict[str, Fit] = {}
    absent: dict[str, str] = {}
    for name in names:
        module = peers.peer(name)
        model, words = module.fit(config.model)
        reason = module.why_not(device) or "; ".join(model.problems())
        if reason:
            absent[name] = reason
            continue
        label = f"{config.name} with {words}" if words else config.name
        fits[name] = Fit(dataclasses.replace(config, name=label, model=model), words)
    return fits, absent


def falls_behind(facts: Mapping[str, dict[str, Any]], samples: Mapping[str, timing.Samples]) -> dict[str, str]:
    """{BASELINE: why it is void}: plain PyTorch is a baseline only where it is at least as fast as transformers
    compiled, each in its fastest form. Void it is where the whole interval of the ratio is below 1, and where there
    is nothing to hold it to; {} otherwise.
    """
    best = {}
    for name in (BASELINE, MEASURE):
        keys = [key for key, fact in facts.items() if fact["peer"] == name]
        if keys:
            best[name] = samples[min(keys, key=lambda key: samples[key].median_ms)]
    if BASELINE not in best:
        return {}
    if MEASURE not in best:
        return {BASELINE: f"it has to be at least as fast as {MEASURE}, compiled, which was not timed"}
    ratio = timing.speedup(best[BASELINE], best[MEASURE])
    if ratio.high >= 1.0:
        return {}
    return {BASELINE: f"it has to be at least as fast as {MEASURE}, compiled, and is {ratio} × as fast"}


@dataclasses.dataclass(frozen=True)
class _Start:
    """How an arm is started. cache: the folder of its compiled code."""

    name: str
    variant: peers.Variant | None
    cache: str


@dataclasses.dataclass
class _Run:
    """What all arms of one comparison share."""

    T: int
    B: int
    device: str
    seed: int
    folder: pathlib.Path = pathlib.Path()
    spawned: int = 0
    screening: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)  # peer → why no variant of it runs
    needs: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)  # (peer, variant) → bytes it held
    stopped: dict[str, str] = dataclasses.field(default_factory=dict)  # model → why it has fewer restarts
    broken: list[str] = dataclasses.field(default_factory=list)  # models without figures, and why
    ended: str = ""  # by whom the whole run was, before its end

    def process(self, name: str, variant: peers.Variant | None, cache: str = "") -> ArmProcess:
        """A process for an arm. cache: name of a folder of compiled code shared by arms; "": its own, empty one."""
        self.spawned += 1
        place = self.folder / f"{self.spawned}"
        place.mkdir()
        compiled = self.folder / cache if cache else place / "cache"
        settings = None if variant is None else dataclasses.asdict(variant)
        return ArmProcess(name, settings, compiled, place / "stderr.txt")

    def compare(
        self, fit: Fit, names: Sequence[str], screening_steps: int, restarts: int, rounds: int
    ) -> tuple[dict[str, dict[str, Any]], dict[str, timing.Samples]]:
        """Try the peers of one model, start the fastest anew and time them beside tritium: ARM without its figures, and
        the timings, by key; both empty where no peer runs. Different where an arm is not like tritium's."""
        facts: dict[str, dict[str, Any]] = {}
        starts: dict[str, _Start] = {}
        with contextlib.ExitStack() as stack:  # all at once: what has room here has it in every restart
            arms: dict[str, ArmProcess] = {}

            def begin(name: str, variant: peers.Variant | None) -> dict[str, Any]:
                start = _Start(name, variant, f"compiled_{self.spawned}")
                with contextlib.ExitStack() as own:
                    arm = own.enter_context(self.process(name, variant, start.cache))
                    fact = self.begin(arm, fit)
                    stack.push(own.pop_all())
                key = f"{name}: {fact['variant']}" + (f" [{fit.words}]" if fit.words else "")
                arms[key], facts[key], starts[key] = arm, fact, start
                _say(f"{key}: first step done after {fact['startup_s']:.1f} s, losses {fact['losses']}")
                return fact

            free = FILL * free_bytes(self.device)
            ours = begin(OURS, None)
            free -= next(iter(arms.values())).memory_bytes()
            chosen = {name: self.screen(name, fit, ours, screening_steps) for name in names}
            broken: dict[str, str] = {}
            # the fastest of each peer first: what follows may find no room, and a system that is out of memory kills
            for row in itertools.zip_longest(*chosen.values()):
                for name, variant in zip(chosen, row, strict=True):
                    need = self.needs.get((name, str(variant)), 0)
                    if variant is not None and need > free:
                        self.leave_out(name, variant, need, free, any(f["peer"] == name for f in facts.values()))
                    elif variant is not None:
                        try:
                            fact = begin(name, variant)
                        except ArmError as error:  # it costs itself, as in the screening
                            _say(f"{name}: {variant}: not compared: {error}")
                            broken[name] = f"{variant}: {error}"
                            continue
                        require_alike(ours, fact)
                        free -= need or list(arms.values())[-1].memory_bytes()
            compared = {fact["peer"] for fact in facts.values()}
            self.failed |= {name: why for name, why in broken.items() if name not in compared}
            if len(arms) == 1:
                return {}, {}
            if restarts == 1:
                taken = [self.time(arms, facts, rounds)]
        if restarts > 1:
            taken = self.restarted(starts, facts, fit, restarts, rounds)
        return facts, {key: timing.joined([part[key] for part in taken]) for key in facts}

    def time(
        self, arms: Mapping[str, ArmProcess], facts: Mapping[str, dict[str, Any]], rounds: int
    ) -> dict[str, timing.Samples]:
        """Warm arms up and time them, interleaved; adds to the ``warm_up`` of their facts."""
        for key, arm in arms.items():
            warm = timing.warm_up(arm.step_ms)
            before = facts[key].get("warm_up", {"runs": 0, "stable": True})
            facts[key]["warm_up"] = {"runs": before["runs"] + warm.runs, "stable": before["stable"] and warm.stable}
        steps = {key: arm.step_ms for key, arm in arms.items()}
        return timing.interleave(steps, rounds, lambda done: _say(f"round {done} of {rounds}"))

    def restarted(
        self, starts: Mapping[str, _Start], facts: Mapping[str, dict[str, Any]], fit: Fit, restarts: int, rounds: int
    ) -> list[dict[str, timing.Samples]]:
        """Time every arm in ``restarts`` processes, of which those of one restart live side by side: the timings of
        each restart. Where an arm fails in a later one, or Ctrl-C ends it, those before it are kept; why is in
        ``stopped``."""
        drawn = random.Random(f"{self.seed} {fit.config.name}")
        taken: list[dict[str, timing.Samples]] = []
        for restart in range(restarts):
            order = drawn.sample(list(starts), len(starts))
            _say(f"restart {restart + 1} of {restarts}")
            warm_ups = {key: fact.get("warm_up") for key, fact in facts.items()}
            try:
                with contextlib.ExitStack() as stack:
                    arms = {}
                    for key in order:
                        start = starts[key]
                        arms[key] = stack.enter_context(self.process(start.name, start.variant, start.cache))
                        self.begin_again(key, arms[key], facts[key], fit)
                    taken.append(self.time(arms, facts, rounds))
            except (ArmError, KeyboardInterrupt) as error:
                if len(taken) * rounds < 2:  # of one round there is no interval
                    raise
                for key, before in warm_ups.items():
                    facts[key]["warm_up"] = before
                if isinstance(error, KeyboardInterrupt):
                    self.ended = str(error) or CTRL_C
                self.stopped[fit.config.name] = f"restart {restart + 1} {self.ended or f'failed: {error}'}"
                _say(f"{self.stopped[fit.config.name]}; the {restart} before it are kept")
                break
        return taken

    def begin_again(self, key: str, arm: ArmProcess, fact: Mapping[str, Any], fit: Fit) -> None:
        """Build an arm once more; Different where it trains otherwise than it did."""
        started = arm.start(fit.config, self.B, self.T, self.device, self.seed)
        precision = fact["settings"]["precision"]
        again = (arm.losses(LOSS_STEPS), precision)
        found = equal_losses({"it": (fact["losses"], precision), "restarted it": again})["problems"]
        if found or started["variant"] != fact["variant"]:
            found = found or [f"it was {fact['variant']} and is {started['variant']}"]
            raise Different(f"{key} is another one after a restart, so it cannot be timed: {'; '.join(found)}")
        _say(f"{key}: started in {started['startup_s']:.1f} s")

    def begin(self, arm: ArmProcess, fit: Fit) -> dict[str, Any]:
        """Build an arm and see what it computes: ARM without what is timed."""
        started = arm.start(fit.config, self.B, self.T, self.device, self.seed)
        settings = arm.settings()
        exact = arm.losses(LOSS_STEPS, fp32=True) if settings["precision"] != "fp32" else []
        return {
            "peer": arm.name, "model": fit.config.name, **started, "settings": settings, "losses_fp32": exact,
            "losses": arm.losses(LOSS_STEPS),
        }  # fmt: skip

    def screen(self, name: str, fit: Fit, ours: Mapping[str, Any], steps: int) -> list[peers.Variant]:
        """Try the variants of a peer; returns those to compare with. Where none runs, the reasons are in ``failed``."""
        variants = peers.variants_in(name, self.device, fit.config.train.precision)
        if steps == 0:
            return variants[:1]
        speeds: dict[peers.Variant, float] = {}
        for variant in variants:
            self._try(name, variant, fit, ours, steps, speeds)
        if not speeds:
            problems = [row["problem"] for row in self.screening if row["peer"] == name]
            self.failed[name] = "no variant of it runs here: " + "; ".join(problems)
            return []
        main = name in (BASELINE, MEASURE)
        shipped = _fastest(speeds, FINALISTS if main else 1)
        if self.device == "cpu" and allocator.why_not() is None:  # what tritium has is offered to every peer
            for variant in shipped:
                self._try(name, dataclasses.replace(variant, keep_memory=True), fit, ours, steps, speeds)
        best = _fastest(speeds, FINALISTS if main else 1)
        # as it is shipped before another one near to the best: there may not be room for all
        return list(dict.fromkeys([best[0], shipped[0], *best[1:]])) if main else best

    def _try(
        self, name: str, variant: peers.Variant, fit: Fit, ours: Mapping[str, Any], steps: int,
        speeds: dict[peers.Variant, float],
    ) -> None:  # fmt: skip
        """Time a few steps of a variant in a process of its own, once it is known to compute what ours does; a row of
        ``screening`` and, where it runs, its tokens/s."""
        row: dict[str, Any] = {"peer": name, "variant": str(variant), "tokens_per_s": None, "problem": None}
        try:
            with self.process(name, variant, "screening_cache") as arm:
                require_alike(ours, self.begin(arm, fit))
                timing.warm_up(arm.step_ms, limit_runs=10)
                speeds[variant] = 1e3 * self.B * self.T / statistics.median(arm.step_ms() for _ in range(steps))
                row["tokens_per_s"] = speeds[variant]
                self.needs[name, str(variant)] = arm.memory_bytes()
        except ArmError as error:  # a variant that does not run here is recorded, and no reason to stop
            row["problem"] = str(error)
        self.screening.append(row)
        _say(f"screening {name}: {variant}: {row['problem'] or format(speeds[variant], '.0f') + ' tokens/s'}")

    def leave_out(self, name: str, variant: peers.Variant, need: float, free: float, another: bool) -> None:
        """Put on record that a variant was screened and has no room beside those that are compared. another: one of the
        same peer is among these."""
        why = (
            f"not compared: it held {need / 2**30:.1f} GiB, and {max(free, 0.0) / 2**30:.1f} are left beside the others"
        )
        _say(f"{name}: {variant}: {why}; fewer --peers at a time or fewer rows (--B) make room")
        for row in self.screening:
            if (row["peer"], row["variant"]) == (name, str(variant)):
                row["problem"] = why
        if not another:
            self.failed[name] = why


def _fastest(speeds: Mapping[peers.Variant, float], count: int) -> list[peers.Variant]:
    """The fastest variant and those NEAR to it, ``count`` at most."""
    ranked = sorted(speeds, key=lambda v: -speeds[v])[:count]
    return [v for v in ranked if speeds[v] >= (1 - NEAR) * speeds[ranked[0]]]


def require_alike(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Different where an arm's settings or losses are not those of tritium's arm of the same model."""
    pair = {f"{fact['peer']}: {fact['variant']}": fact for fact in (ours, theirs)}
    mine, other = pair
    found = [
        f"{name}: {mine} has {wanted}, {other} {theirs['settings'].get(name)}"
        for name, wanted in ours["settings"].items()
        if theirs["settings"].get(name) != wanted
    ]
    if not found:
        exact = equal_losses({key: (fact["losses_fp32"], "fp32") for key, fact in pair.items()})
        own = equal_losses({key: (fact["losses"], fact["settings"]["precision"]) for key, fact in pair.items()})
        found = [f"in fp32, uncompiled: {problem}" for problem in exact["problems"]] + own["problems"]
    if found:
        raise Different(
            f"these do not compute the same thing at {ours['model']}, so their speeds are not compared; mend the "
            "peer's adapter or its package, or leave it out (--peers):\n  " + "\n  ".join(found)
        )


def _words(settings: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def equal_losses(arms: Mapping[str, tuple[Sequence[float], str]]) -> dict[str, Any]:
    """Hold every arm's losses to the first arm's; arms: key → (losses, its variant's text)."""
    (first, (wanted, first_variant)), *rest = arms.items()
    worst, found = 0.0, []
    for key, (losses, variant) in rest:
        bound = max(LOSS_BOUNDS[p] for p in LOSS_BOUNDS if p == "fp32" or p in variant or p in first_variant)
        for step, (a, b) in enumerate(zip(wanted, losses, strict=True)):
            relative = abs(a - b) / abs(a)
            worst = max(worst, relative)
            if not relative <= bound:  # also when it is NaN
                found.append(
                    f"step {step + 1}: {first} has the loss {a:.6f}, {key} {b:.6f}: relative {relative:.2g} > {bound:g}"
                )
    return {"ok": not found, "worst_relative": worst, "problems": found}


# -------------------------------------------------------------------------------------------------------------- tables


def table(result: dict[str, Any]) -> str:
    """The record as Markdown tables, one for each model, with captions that say where it was measured and how to
    repeat it; below them, who was left out and why."""
    settings, machine, version = result["settings"], result["machine"], result["versions"]
    threads = next(iter(result["arms"].values()))["threads"]
    where = f"{machine['name']}" + (f", {threads} threads" if machine["device"] == "cpu" else "")
    models = settings.get("models") or {settings["preset"]: {"changed": ""}}  # version 1 had one
    lines = []
    for model, about in models.items():
        title = f"{model}" + (f" ({about['changed']})" if about["changed"] else "")
        lines += [
            f"**{title}, T={settings['T']}, B={settings['B']}** on {where}; torch {version['torch']}, "
            f"{timing.how_taken(settings['rounds'], about)}, commit {result['commit'][:10]}"
            f"{' (modified)' if result['dirty'] else ''}: `{result['command']}`",
            "",
            "| training step | tokens/s | tritium is faster by (95 % interval) | start-up, s | peak memory, GiB |",
            "|---|---:|---:|---:|---:|",
        ]
        arms = [(key, arm) for key, arm in result["arms"].items() if arm.get("model", model) == model]
        lines += [_row(result, key, arm) for key, arm in sorted(arms, key=lambda item: item[1]["times"]["p50_ms"])]
        lines.append("")
    lines += [f"{name} is left out: {reason}." for name, reason in result["peers_absent"].items()]
    stopped = {model: about["stopped"] for model, about in models.items() if about.get("stopped")}
    lines += [f"{model} has fewer restarts than were asked for: {reason}." for model, reason in stopped.items()]
    lines += [f"{name} is void as a baseline: {reason}." for name, reason in _void(result).items()]
    lines += [f"NOT SO: {check['name']} ({check['detail']})." for check in result["checks"] if not check["ok"]]
    return "\n".join(lines).rstrip()


def _row(result: dict[str, Any], key: str, arm: dict[str, Any]) -> str:
    faster = "–"
    if key in result["speedup"]:
        faster = "{median:.3f} × [{low:.3f}, {high:.3f}]".format(**result["speedup"][key])
    cells = [key, f"{arm['tokens_per_s']:.0f}"]
    if arm["peer"] == OURS:
        cells = [f"**{cell}**" for cell in cells]
    elif arm["peer"] in _void(result):
        cells[0] += " (void as a baseline)"
    cells += [faster, f"{arm['startup_s']:.1f}", f"{arm['peak_bytes'] / 2**30:.2f}"]
    return "| " + " | ".join(cells) + " |"


def _void(result: dict[str, Any]) -> dict[str, str]:
    return result.get("void", {})  # version 1 had none


def as_shipped(result: dict[str, Any]) -> str | None:
    """The key of the best peer among arms that run as their users run them, without what tritium does about memory on
    a CPU; None where that is the best of all."""
    kept = {key for key in result["speedup"] if peers.KEEPS_MEMORY in result["arms"][key]["variant"]}
    others = [key for key in result["speedup"] if key not in kept and result["arms"][key]["peer"] not in _void(result)]
    if result["best_peer"] not in kept or not others:
        return None
    return min(others, key=lambda key: result["speedup"][key]["median"])


def verdict(result: dict[str, Any]) -> str:
    """One sentence: against the best peer, with the interval's lower bound; and another where the best peer was lent
    what tritium does about memory."""
    ratio = result["speedup"][result["best_peer"]]
    void = result["arms"][result["best_peer"]]["peer"] in _void(result)
    shipped = as_shipped(result)
    sure = "its lower bound is above 1" if ratio["low"] > 1.0 else "its lower bound is NOT above 1"
    return (
        f"{result['settings']['preset']}: tritium is {ratio['median']:.3f} × as fast as "
        f"{'the only one, which is no baseline' if void else 'the best peer'} "
        f"({result['best_peer']}), 95 % interval [{ratio['low']:.3f}, {ratio['high']:.3f}]: {sure}"
    ) + (
        ""
        if shipped is None
        else f"\nThat one was lent what tritium does about memory; of those as they come, the best is {shipped}: "
        "{median:.3f} × [{low:.3f}, {high:.3f}]".format(**result["speedup"][shipped])
    )


def save(result: dict[str, Any], folder: pathlib.Path) -> str:
    """Write the record, and beside it the tables of all throughput records of the folder (throughput.md); returns its
    path, and which one it replaced."""
    settings = result["settings"]
    name = re.sub(r"\W+", "_", settings["preset"])
    path = folder / f"throughput_{name}_T{settings['T']}_B{settings['B']}.json"
    replaced = record.write(result, SCHEMA, path)
    tables = []
    for other in sorted(folder.glob("throughput_*.json")):
        try:
            tables.append(table(record.read(other)))
        except (record.RecordError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            if other == path:
                raise
            _say(f"{other} is left out of throughput.md, it is damaged: {type(error).__name__}: {error}")
    (folder / "throughput.md").write_text("\n\n".join(tables) + "\n")
    return f"{path}{replaced}"


def results_folder(result: dict[str, Any]) -> pathlib.Path:
    """benchmarks/results/cpu, or .../NAME of the GPU; for an installed package, benchmark-results/... here."""
    machine = result["machine"]
    return RESULTS / (
        "cpu" if machine["device"] == "cpu" else re.sub(r"[^a-z0-9]+", "_", machine["name"].lower()).strip("_")
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="tritium bench peers",
        allow_abbrev=False,
        description="Training throughput against other implementations of the same model.",
    )
    made.add_argument("presets", nargs="*", metavar="PRESET", help="presets to compare (default: gpt2_124m tiny)")
    made.add_argument("--T", type=int, help="tokens in a row (default: by preset, 256 on a CPU)")
    made.add_argument("--B", type=int, help="rows in a step (default: by preset)")
    made.add_argument(
        "--restarts",
        type=int,
        default=RESTARTS,
        help="processes of each arm that are timed, so that the interval covers what differs between two processes of "
        "one program; 1 times those that compiled, and its interval does not (default: %(default)s)",
    )
    made.add_argument(
        "--rounds",
        type=int,
        default=ROUNDS,
        help="interleaved rounds in each restart, each runs everything twice (default: %(default)s)",
    )
    made.add_argument(
        "--peers", default=",".join(peers.NAMES), help="implementations to compare with (default: %(default)s)"
    )
    made.add_argument(
        "--screening-steps",
        type=int,
        default=5,
        help="timed steps of each variant of a peer; 0: only its first variant",
    )
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--kernels", default="", help="backend for every op that has it (default: what the preset says)")
    made.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), help="tritium's precision (default: what the preset says)"
    )
    made.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default: 0)")
    made.add_argument("--out", type=pathlib.Path, help="folder of the record (default: benchmarks/results/MACHINE)")
    return made


def _check(made: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    """Exit with status 2 where the command line cannot be meant, before anything is built."""
    for name in a.presets:
        if name not in presets.names():
            made.error(
                f"there is no preset {name!r}; the nearest are {nearest(name, presets.names())}. "
                f"All: {', '.join(presets.names())}"
            )
    for name in a.peers.split(","):
        if name not in peers.NAMES:
            close = nearest(name, peers.NAMES)
            made.error(f"there is no peer {name!r}; the nearest are {close}. All: {', '.join(peers.NAMES)}")
    rounds = (2, " with --restarts 1, or there is no interval") if a.restarts == 1 else (1, "")
    least = {"restarts": (1, ""), "rounds": rounds, "T": (1, ""), "B": (1, ""), "screening_steps": (0, "")}
    for field, (low, why) in least.items():
        value = getattr(a, field)
        if value is not None and value < low:
            made.error(f"--{field.replace('_', '-')} must be at least {low}{why}; it is {value}")
    if not 0 <= a.seed < 2**63:
        made.error(f"--seed must be from 0 to {2**63 - 1}; it is {a.seed}")


@stages.ended_by_signals()
def main(argv: Sequence[str] | None = None) -> int:
    """``tritium bench peers``; exit status 0, 1 when the losses differ, an arm fails or one of peers.REQUIRED gives no
    figure, 2 for a wrong command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    made = parser()
    a, unknown = made.parse_known_args(argv)
    if unknown:
        flags = [flag for action in made._actions for flag in action.option_strings]
        made.error(f"there is no flag {unknown[0]!r}; the nearest are {nearest(unknown[0], flags)}")
    _check(made, a)
    device = a.device
    if device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: torch finds no GPU here, so there is nothing to time; use --device cpu")
    if a.out is not None and (why := record.unwritable(a.out / "record.json")):
        made.error(f"--out: {why}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    names = a.presets or list(SHAPES[device])
    status = 0
    for name in names:
        T, B = SHAPES[device].get(name, (256, 2))
        T, B = T if a.T is None else a.T, B if a.B is None else a.B
        config = shaped(name, T)
        if a.kernels:
            config = config.replace(kernels={"default": a.kernels})
        if a.precision:
            config = config.replace(train={"precision": a.precision})
        command = shlex.join(["tritium", "bench", "peers", *argv])
        try:
            result = bench_train(
                config, T, B, restarts=a.restarts, rounds=a.rounds, device=device, peer_names=a.peers.split(","),
                screening_steps=a.screening_steps, seed=a.seed, command=command,
            )  # fmt: skip
        except (Different, ArmError, ValueError) as error:
            _say(f"{name}: {error}")
            status = 1
            continue
        print(f"\n{table(result)}\n\n{verdict(result)}", flush=True)  # before the disk has a say in it
        print(f"written: {save(result, a.out or results_folder(result))}", flush=True)
        (end,) = [c["detail"] for c in result["checks"] if c["name"] == WHOLE] or [""]
        if end:
            _say(f"{name}: not all of it ran: {end}")
            status = 1
        if end.startswith("stopped by "):
            return 130
        lacking = {peer: reason for peer, reason in result["peers_absent"].items() if peer in peers.REQUIRED}
        for peer, reason in lacking.items():
            others = ",".join(other for other in a.peers.split(",") if other != peer)
            _say(f"{name}: {peer} gave no figure: {reason}; or leave it out: --peers {others}")
        status = max(status, int(bool(lacking)))
    return status


if __name__ == "__main__":
    sys.exit(main())
