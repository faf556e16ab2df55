"""What each choice of kernel or setting is worth: speed, memory, loss and gradients of training, arm beside arm.

    tritium ablate PRESET attention=sdpa,triton layer_norm=reference,triton [--mode one] [--steps 200 --seeds 5]

An axis is NAME=VALUE,VALUE; its first value belongs to the baseline. Every arm is an engine of its own in this one
process: bound, compiled, with the same weights and batches. An arm that cannot be built here is listed with the reason.
Before anything is timed, an arm must agree with the fp32 reference (gradients of every tensor and their norm, then the
losses of three steps) and its backends must keep the contract; one that does not is red and gets no speed. Then all
arms are timed, interleaved (:mod:`timing`), beside a twin of the baseline that shows what this machine can resolve.
With --steps the arms are trained from several seeds and their curves compared (:mod:`curves`). docs/ablate.md says how
to read the results.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import os
import pathlib
import shlex
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tritium.benchmarks import ablate_results, curves, record, stages, timing
from tritium.engine import presets
from tritium.engine.config import Config, ConfigError, KernelsConfig
from tritium.engine.schedule import learning_rate

if TYPE_CHECKING:
    from torch import Tensor

    from tritium.engine.step import MicroBatch
    from tritium.kernels.op import Row

MODES = ("grid", "one", "leave-one-out")
LOSS_STEPS = 3
# Largest deviation from the fp32 reference, relative: (a step's loss, the gradient norm, a tensor's gradient in the
# Euclidean norm, the factor by which it is longer). Added to twice what the reference kernels deviate in the arm's own
# precision, as in docs/numerics.md. fp32: some hundred times what another order of summation costs a tensor of GPT-2
# 124M (3e-6), and a twentieth of a gradient × 1.02; the norm is one sum over all of them, taken in fp32. bf16: tensors
# are rounded number by number (2⁻⁸), which a norm of the difference sees and the factor averages out. fp8: on top of
# what the reference kernels deviate in bf16, the rounding of operands (2⁻⁴, of gradients 2⁻³) through all layers; seen
# of tiny at a width of 256: 8e-4, 1.2e-2, 0.18, 0.03.
FLOORS = {"fp32": (1e-4, 5e-3, 1e-3, 1e-3), "bf16": (2e-3, 5e-3, 2e-2, 5e-3), "fp8": (1e-2, 5e-2, 5e-1, 1e-1)}
FACTOR = 2.0
WENT_TO_ITS_END, STOPPED = "the run went to its end", "stopped by Ctrl-C"
TWIN_LEVEL = 0.99  # of the twin's interval: one quiet machine in a hundred is called noisy

FIXED = {  # sections and fields that are no axis, and why
    "run": "it decides where results go, and no step",
    "data": "arms are compared on the same data",
    "train.seed": "arms are compared from the same seed; --seeds K trains from K of them",
    "train.steps": "arms are compared over the same number of steps, --steps",
    "train.batch_rows": "arms are compared on the same batches, of --B rows; micro_rows is the axis",
    "train.device": "all arms run on one device, --device",
    "train.eval_every": "use --eval-every", "train.eval_tokens": "arms are evaluated on the same text",
    "train.sample_every": "an ablation writes no samples", "train.sample_tokens": "an ablation writes no samples",
    "train.log_every": "an ablation has its own record",
    "model.vocab_size": "arms are compared on the same tokens; vocab_multiple pads the table",
    "model.block_size": "arms are compared on the same rows, of --T tokens",
}  # fmt: skip
ALIASES = {
    "kernels": "kernels.default", "dtype": "train.precision", "micro_batch": "train.micro_rows",
    "vocabulary_padding": "model.vocab_multiple", "gemm_layout": "train.weight_layout",
    "optimizer": "kernels.adamw",  # there is one, AdamW: its settings are the fields optim.*, this is who updates
}  # fmt: skip

INTERVAL: record.Schema = {"median": record.NUMBER, "low": record.NUMBER, "high": record.NUMBER, "level": record.NUMBER}
MAYBE = (*record.NUMBER, type(None))
ARM: record.Schema = {
    "name": str,
    "settings": {str: str},  # axis → value
    "status": str,  # "ok", "red" (wrong), "unavailable" (cannot be had here), "failed" (broke) or "not run"
    "reason": str,  # of a status that is not ok
    "group": (int, type(None)),  # arms of one group were timed in the same rounds
    "precision": (str, type(None)), "compiled": (bool, type(None)),
    "speed": (dict, type(None)),  # tokens/s: INTERVAL; null, as the next three, unless ok
    "ratio": (dict, type(None)),  # tokens/s over the baseline's, in the same rounds: INTERVAL
    "delta_tokens_per_s": (dict, type(None)),  # tokens/s less the baseline's: INTERVAL
    "verdict": str,  # "baseline", "faster", "slower", "no difference shown", or "" where nothing was timed
    "times": (dict, type(None)),  # every timing: timing.Samples.to_json
    "noise": MAYBE,
    "own_bytes": (int, type(None)),  # weights, working copies, moments, tables
    "peak_bytes": (int, type(None)),  # own_bytes and the most that a step holds at once beside them, in tensors
    "loss_delta": MAYBE,  # relative, of the step of LOSS_STEPS whose loss deviates most from the fp32 reference
    "gradient_delta": MAYBE,  # relative, of the first step's gradient norm
    "gradient_error": (dict, type(None)),  # the tensor whose gradient deviates most: tensor, relative, factor
    "first_step_s": MAYBE,
    "compile_s": MAYBE,  # the first step less a steady one: compiling, tuning, first touches
    "kernels": [record.KERNEL],
    "training": (dict, type(None)),  # curves.ARM
}  # fmt: skip
SCHEMA: record.Schema = {
    "settings": {
        "T": int, "B": int, "rounds": int, "seed": int, "mode": str, "axes": {str: [str]}, "gate": bool,
        "steps": int, "seeds": int, "eval_every": int, "target_loss": MAYBE, "data": str, "config": dict,
    },
    "method": str,
    "baseline": str,
    "arms": [ARM],
    "twin": (dict, type(None)),  # a second arm like the baseline, over the baseline: INTERVAL at TWIN_LEVEL
    "resolution": record.NUMBER,  # differences of speed smaller than this are not told from none
}  # fmt: skip
METHOD = (
    "one process, an engine and a compiled model for every arm, same weights and batches; a round is every arm once in "
    "an order and once in its reverse; ratio = median over rounds of the ratio of times within the round, 95 % "
    "percentile bootstrap; a difference is shown when its interval excludes 1 and its median lies outside the twin's "
    "interval; peak memory = the arm's own tensors and the most that one step allocates beside them"
)


class AxisError(ValueError):
    """An axis that is not understood; the message names the nearest that is."""


class NothingToCompare(RuntimeError):
    """There is no baseline; the message says why."""


# ----------------------------------------------------------------------------------------------------------------- axes


def nearest(name: str, known: Sequence[str], count: int = 3) -> str:
    """As tritium.kernels.op.nearest, without loading torch."""
    return ", ".join(difflib.get_close_matches(name, known, count, cutoff=0.0))


def config_fields() -> list[str]:
    """Every field of a Config as section.field."""
    default = Config()
    return [
        f"{section.name}.{f.name}"
        for section in dataclasses.fields(Config)
        if section.name != "name"
        for f in dataclasses.fields(getattr(default, section.name))
    ]


def op_names() -> list[str]:
    return [f.name for f in dataclasses.fields(KernelsConfig) if f.name not in ("default", "override")]


@dataclass(frozen=True)
class Axis:
    """What is varied. field: of Config, as section.field; a name [PATTERN:]OP[@PHASE] has kernels.override."""

    name: str
    field: str
    values: tuple[str, ...]

    @property
    def op(self) -> str | None:
        """The op whose backend this axis chooses, everywhere or in places."""
        if self.field == "kernels.override":
            return _op_of(self.name)
        section, _, name = self.field.partition(".")
        return name if section == "kernels" and name != "default" else None

    @staticmethod
    def parse(text: str) -> Axis:
        """From NAME=VALUE,VALUE. AxisError for a name that is no axis, a value given twice, an unknown backend."""
        name, equals, given = text.partition("=")
        values = tuple(given.split(","))
        if not equals or not all(values):
            raise AxisError(f"an axis reads NAME=VALUE,VALUE (attention=sdpa,triton), and {text!r} does not")
        if len(set(values)) < len(values):
            raise AxisError(f"{text}: a value is given twice, which would be two arms of one name; give it once")
        axis = Axis(name, field_of(name), values)
        known = _backends(axis)
        for value in values:
            if known and value not in known and ("." not in value or axis.op is None):
                raise AxisError(
                    f"{axis.op or 'no op'} has no backend {value!r}; the nearest are {nearest(value, known)}"
                    + ("" if axis.op is None else f"; it has {', '.join(known)}, or give a module path")
                )
        return axis

    def apply(self, config: Config, value: str) -> Config:
        """``config`` with this axis at ``value``; AxisError where it is no value of the field."""
        section, _, name = self.field.partition(".")
        if self.field == "kernels.override":
            typed: object = (*config.kernels.override, f"{self.name}={value}")
        else:
            typed = _typed(self.field, value)
        return config.replace(**{section: {name: typed}})


def field_of(name: str) -> str:
    """The field that an axis' name means; AxisError, with the nearest, for none or several."""
    if ":" in name or "@" in name:
        if _op_of(name) not in op_names():
            raise AxisError(
                f"{name}: an axis over places reads [PATTERN:]OP[@PHASE], and there is no op {_op_of(name)!r}; "
                f"the nearest are {nearest(_op_of(name), op_names())}"
            )
        return "kernels.override"
    known = config_fields()
    found = ALIASES.get(name, name)
    if found not in known:
        matches = [f for f in known if f.partition(".")[2] == name]
        if len(matches) > 1:
            raise AxisError(f"{name!r} may mean {' or '.join(matches)}; say which")
        if not matches:
            candidates = [*ALIASES, *(f.partition(".")[2] for f in known if _why_fixed(f) is None), *known]
            raise AxisError(
                f"there is no axis {name!r}; the nearest are {nearest(name, list(dict.fromkeys(candidates)))}. An axis "
                "is an op, kernels (all ops) or a field of the configuration"
            )
        (found,) = matches
    if (why := _why_fixed(found)) is not None:
        raise AxisError(f"{found} cannot be an axis: {why}")
    if found == "kernels.override":
        raise AxisError("kernels.override is varied by naming the place: 'blocks.0.*:attention=sdpa,triton'")
    return found


def check_axes(axes: Sequence[Axis], flags: Sequence[str]) -> None:
    """AxisError where what one part of the command line sets another overwrites, so that an arm would not be what its
    name says; and for one value in two spellings. flags: of fields, for all arms."""
    if len({axis.name for axis in axes}) < len(axes):
        raise AxisError("an axis is given twice; give all of its values at once, NAME=VALUE,VALUE")
    words = {"--" + word.partition("=")[0][2:].replace("-", "_") for word in flags if word.startswith("--")}
    if "--kernels" in words:
        words.add("--kernels.default")
    by_field: dict[str, Axis] = {}
    for axis in axes:
        if axis.field == "kernels.override":  # they add up
            continue
        other = by_field.setdefault(axis.field, axis)
        if other is not axis:
            raise AxisError(
                f"{other.name} and {axis.name} both set {axis.field}, so that arms of one would run what the other "
                "says; give all of its values at once, NAME=VALUE,VALUE"
            )
        if f"--{axis.field}" in words:
            raise AxisError(
                f"--{axis.field} sets what the axis {axis.name} varies, so that it would hold for no arm; leave it out"
            )
        seen: dict[str, str] = {}
        for value in axis.values:
            same = seen.setdefault(repr(_typed(axis.field, value)), value)
            if same != value:
                raise AxisError(
                    f"{axis.name}: {same} and {value} are one value, which would be two equal arms; give one"
                )


def _why_fixed(field: str) -> str | None:
    return FIXED.get(field, FIXED.get(field.partition(".")[0]))


def _op_of(place: str) -> str:
    return place.rpartition(":")[2].partition("@")[0]


def _backends(axis: Axis) -> list[str]:
    """What an axis over backends may choose from; [] for another axis."""
    if not axis.field.startswith("kernels."):
        return []
    from tritium.kernels.ops import OPS

    ops = list(OPS.values()) if axis.op is None else [OPS[axis.op]]
    return ["auto", *dict.fromkeys(name for op in ops for name in op.backends())]


def _typed(field: str, value: str) -> Any:
    """A field's value from text, as ``tritium train`` reads it; a list's items are joined by +."""
    from tritium.engine import cli

    section, _, name = field.partition(".")
    many = isinstance(getattr(getattr(Config(), section), name), tuple)
    try:
        parsed = cli.parse(Config, [f"--{field}", *(value.split("+") if many else [value])], "ablate", "")
    except cli.UsageError as error:
        raise AxisError(f"{field}={value}: {error}") from None
    return getattr(getattr(parsed, section), name)


@dataclass(frozen=True)
class Choice:
    """One arm as it was asked for."""

    name: str
    settings: dict[str, str]
    config: Config


def choices(base: Config, axes: Sequence[Axis], mode: str) -> list[Choice]:
    """The arms, the baseline first: every combination ("grid"), or the baseline and each other value alone ("one")."""
    firsts = {axis.name: axis.values[0] for axis in axes}
    if mode == "grid":
        chosen = [
            dict(zip(firsts, values, strict=True)) for values in itertools.product(*(axis.values for axis in axes))
        ]
    else:
        chosen = [firsts, *(firsts | {axis.name: value} for axis in axes for value in axis.values[1:])]
    found = []
    for settings in chosen:
        config = base
        for axis in axes:
            config = axis.apply(config, settings[axis.name])
        shown = settings if mode == "grid" or settings == firsts else _changed(firsts, settings)
        found.append(Choice(" ".join(f"{k}={v}" for k, v in shown.items()), settings, config))
    return found


def _changed(firsts: Mapping[str, str], settings: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in settings.items() if firsts[name] != value}


def left_out(base: Config, ops: Sequence[str], device: str) -> list[Choice]:
    """The preset's own choice, and each op of ``ops`` (default: all that it does not leave to the reference) set to
    reference in turn. AxisError for an op that the preset leaves there, or does not call."""
    bound = {row.op: row.backend for row in planned(base, device) if row.phase == "train"}
    able = [op for op, backend in bound.items() if backend != "reference"]
    for op in ops:
        if op not in able:
            has = f"{op} is computed by its reference already" if op in bound else f"this model does not call {op!r}"
            raise AxisError(f"{has}: nothing can be left out; the nearest are {nearest(op, able) or 'none'}")
    if not able:
        raise AxisError("every op of this preset is computed by its reference here: there is nothing to leave out")
    return [
        Choice("all", {}, base),
        *(Choice(f"{op}=reference", {op: "reference"}, base.replace(kernels={op: "reference"})) for op in ops or able),
    ]


def planned(config: Config, device: str) -> list[Row]:
    """The kernel table that ``config`` would get here, without memory; KernelError where it cannot be met."""
    import torch

    from tritium.engine import precision, train
    from tritium.kernels import op
    from tritium.kernels.site import Machine

    place = torch.device(device)
    dtype = precision.resolve(config.train.precision, place)
    return op.bind(
        train.on_meta(config, dtype), config.kernel_choices(), machine=Machine.here(place), dtype=dtype,
        compiled=train.should_compile(config, place)[0], deterministic=train.is_deterministic(config, place),
    )  # fmt: skip


def check_ops(axes: Sequence[Axis], arms: Sequence[Choice]) -> None:
    """AxisError for an op that no arm's model calls: every arm would be refused."""
    import torch

    from tritium.engine import train
    from tritium.kernels.op import call_sites

    models = {dataclasses.astuple(arm.config.model): arm.config for arm in arms}
    called: set[str] = set()
    for config in models.values():
        if not config.problems():
            called |= {site.op.name for _, site in call_sites(train.on_meta(config, torch.float32))}
    for axis in axes:
        if called and axis.op is not None and axis.op not in called:
            raise AxisError(
                f"no arm calls {axis.op}, so {axis.name} would change nothing; the nearest of the ops that are called "
                f"are {nearest(axis.op, sorted(called))}. All: {', '.join(sorted(called))}"
            )


# ------------------------------------------------------------------------------------------------------------ deviation


@dataclass
class Observed:
    """What an arm computes from the common weights: the first batch's gradients, then LOSS_STEPS losses."""

    gradients: dict[str, Tensor]
    losses: list[float]
    norm: float


@dataclass
class Deviation:
    """How far an arm is from the fp32 reference, relative and signed where a sign has a meaning."""

    losses: list[float]
    norm: float
    tensors: dict[str, tuple[float, float]]  # name → (‖g − r‖ / ‖r‖, ⟨g, r⟩ / ⟨r, r⟩ − 1)

    @property
    def loss(self) -> float:
        return max(self.losses, key=_size)

    @property
    def worst(self) -> tuple[str, float, float]:
        """The tensor whose gradient is farthest off: its name, and the two of ``tensors``."""
        name = max(self.tensors, key=lambda n: _size(self.tensors[n][0]))
        return (name, *self.tensors[name])


def _size(x: float) -> float:
    return math.inf if math.isnan(x) else abs(x)


def deviation(got: Observed, reference: Observed) -> Deviation:
    tensors = {}
    for name, r in reference.gradients.items():
        g = got.gradients[name]
        rows = min(len(g), len(r))  # a table may be padded to another length; padding has no gradient
        difference, whole = (g[:rows] - r[:rows]).double().norm().item(), r.double().norm().item()
        surplus = g[rows:].double().norm().item()
        if whole > 0.0:
            factor = (g[:rows].double() * r[:rows].double()).sum().item() / whole**2 - 1.0
            tensors[name] = (math.hypot(difference, surplus) / whole, factor)
        else:  # of a table of positions that no row reaches
            tensors[name] = (0.0 if difference == surplus == 0.0 else math.inf, 0.0)
    losses = [a / b - 1.0 for a, b in zip(got.losses, reference.losses, strict=True)]
    exact = math.sqrt(sum(r.double().square().sum().item() for r in reference.gradients.values()))
    return Deviation(losses, got.norm / exact - 1.0, tensors)


def wrong(found: Deviation, same: Deviation | None, precision: str) -> list[str]:
    """What deviates by more than FLOORS allows. same: of the reference kernels in the arm's own precision, where that
    is not fp32."""
    loss, norm, relative, factor = FLOORS[precision]
    said = []
    for step, value in enumerate(found.losses):
        bound = loss + (FACTOR * _size(same.losses[step]) if same else 0.0)
        if not abs(value) <= bound:
            said.append(f"the loss of step {step + 1} deviates by {value:+.2g} of it (bound {bound:.2g})")
    bound = norm + (FACTOR * _size(same.norm) if same else 0.0)
    if not abs(found.norm) <= bound:
        said.append(f"the gradient norm is {1 + found.norm:.4f} times the reference's (bound {bound:.2g} from 1)")
    off = []
    for name, (r, f) in found.tensors.items():
        bound_r = relative + (FACTOR * _size(same.tensors[name][0]) if same else 0.0)
        bound_f = factor + (FACTOR * _size(same.tensors[name][1]) if same else 0.0)
        if not r <= bound_r or not abs(f) <= bound_f:
            off.append(
                (max(_size(r) / bound_r, _size(f) / bound_f),
                 f"the gradient of {name} is {1 + f:.4f} times the reference's (bound {bound_f:.2g} from 1) and "
                 f"differs by {r:.2g} of it (bound {bound_r:.2g})")
            )  # fmt: skip
    if off:
        said.append(max(off)[1] + (f"; {len(off)} tensors are off" if len(off) > 1 else ""))
    return said


def reference_of(config: Config, precision: str = "fp32") -> Config:
    """What an arm is held to: the same model and optimizer, reference kernels, eager, whole batches, nothing
    recomputed."""
    return dataclasses.replace(config, kernels=KernelsConfig(default="reference")).replace(
        train={"precision": precision, "compile": "false", "recompute": "none", "micro_rows": config.train.batch_rows}
    )


# ----------------------------------------------------------------------------------------------------------------- arms


class Arm:
    """An engine in training. config: its train.batch_rows and micro_rows are those of a step."""

    def __init__(self, config: Config, device: str):
        import torch

        from tritium.engine import train
        from tritium.engine.parallel import World

        self.config, self.device = config, device
        self.world = World(device=torch.device(device))
        self.deterministic = train.is_deterministic(config, self.world.device)
        with self._settings():
            self.engine = train.build(config, self.world)
        # a class of its own: dynamo would else let arms that look alike share compiled code
        model: Any = self.engine.model
        model.__class__ = type("GPT", (type(model),), {})
        self.lr = torch.full((), config.optim.lr, device=device)
        self.inverse_count = torch.zeros((), device=device)
        self.clock = timing.clock_for(device)
        self.loss: Tensor | None = None  # of the last step
        self.turn: Iterator[MicroBatch] | None = None

    def _settings(self) -> contextlib.AbstractContextManager[None]:
        from tritium.engine import train

        return train.determinism(self.deterministic)

    @property
    def precision(self) -> str:
        """Of its products: fp8 where any is."""
        from tritium.benchmarks import ours

        return ours.precision(self.engine)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take fp32 weights by name, tables without their padding (:func:`initial_weights`), and start the optimizer
        anew."""
        from tritium.benchmarks import peers

        optimizer = self.engine.optimizer
        peers.assign(optimizer.master_weights(), weights)
        optimizer.refresh_copies()
        for state in optimizer.state_dict().values():
            state.zero_()

    def micro_batches(self, batch: MicroBatch) -> list[MicroBatch]:
        from tritium.engine.step import MicroBatch

        self.inverse_count.fill_(1.0 / batch.targets.numel())
        rows = self.config.train.micro_rows
        parts = [t.split(rows) if t is not None else None for t in (batch.ids, batch.targets, batch.seq_start)]
        return [
            MicroBatch(*(None if p is None else p[i] for p in parts))  # type: ignore[arg-type]
            for i in range(len(batch.ids) // rows)
        ]

    def gradients(self, batch: MicroBatch) -> dict[str, Tensor]:
        """The gradient of the mean loss by parameter, fp32; nothing is updated."""
        optimizer = self.engine.optimizer
        with self._settings():
            for part in self.micro_batches(batch):
                self.engine.loss(part).backward()
            names = [name for group in optimizer.groups for name in group.names]
            found = dict(zip(names, optimizer.gradients(), strict=True))
            optimizer.zero_grad()
            return {name: g.float() * self.inverse_count for name, g in found.items()}

    def step(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Forward, backward, clip, update; (mean loss before, gradient norm), both () fp32."""
        with self._settings():
            loss, norm = self.engine.step(self.micro_batches(batch), self.lr, self.inverse_count)
        self.loss = loss
        return loss, norm

    def observe(self, weights: Mapping[str, Tensor], batches: Sequence[MicroBatch]) -> tuple[Observed, float]:
        """What it computes from ``weights``; and the seconds of its first forward, backward and update, in which all is
        compiled."""
        self.load(weights)
        start = time.perf_counter()
        with _nothing_cached() if self.engine.compiled else contextlib.nullcontext():
            gradients = self.gradients(batches[0])
            losses = [tuple(x.item() for x in self.step(batches[0]))]
        seconds = time.perf_counter() - start
        losses += [tuple(x.item() for x in self.step(batches[i % len(batches)])) for i in range(1, LOSS_STEPS)]
        return Observed(gradients, [loss for loss, _ in losses], losses[0][1]), seconds

    def own_bytes(self) -> int:
        """Of the tensors that it keeps from step to step."""
        model = self.engine.model
        tensors = [*self.engine.state().values(), *model.parameters(), *model.buffers()]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def step_ms(self) -> float:
        """A step on the next of the batches that ``turn`` deals out."""
        assert self.turn is not None
        batch = next(self.turn)
        return self.clock.times_ms([lambda: self.step(batch)])[0]

    # what curves.train asks of a learner

    def restart(self, seed: int) -> None:
        import torch

        self.load(initial_weights(self.config, seed, self.device))
        torch.manual_seed(seed)

    def train(self, batch: MicroBatch, lr: float) -> float:
        self.lr.fill_(lr)
        moved = batch.to(self.world.device)
        return self.clock.times_ms([lambda: self.step(moved)])[0] / 1e3

    def evaluate(self, data: curves.Data) -> float:
        with self._settings():
            return data.validation_loss(self.engine.model, self.world.device)


@contextlib.contextmanager
def _nothing_cached() -> Iterator[None]:
    """torch.compile from nothing, so that an arm does not find what another has compiled and seem quick to start."""
    from torch._inductor.utils import fresh_inductor_cache

    with fresh_inductor_cache():
        yield


@contextlib.contextmanager
def _room_to_compile(arms: int) -> Iterator[None]:
    """Dynamo's limits on how often one function is compiled, raised: the arms' models are all of one class' code."""
    import torch._dynamo

    limits: Any = torch._dynamo.config
    with limits.patch(recompile_limit=64 * (arms + 2), accumulated_recompile_limit=1024 * (arms + 2)):
        yield


def initial_weights(config: Config, seed: int, device: str) -> dict[str, Tensor]:
    """The weights with which training begins from ``seed``: the model's own initialisation; padding and the arm's
    kernels do not change them."""
    plain = reference_of(config).replace(model={"vocab_multiple": 1}, train={"seed": seed})
    return Arm(plain, device).engine.optimizer.master_weights()


def wide_weights(config: Config, seed: int, device: str) -> dict[str, Tensor]:
    """Weights for the check: three times as wide as the initial ones, norms and biases drawn as well, so that a part
    that is left out shows. A function of the name, so that arms with other padding get the same."""
    import torch

    found = {}
    for name, w in initial_weights(config, seed, device).items():
        draw = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
        noise = torch.randn(w.shape, generator=draw).to(device)
        found[name] = 3.0 * w if w.ndim >= 2 else w + 0.2 * noise
    return found


def _release() -> None:
    """Give back what a group of arms held, compiled code included."""
    import gc

    import torch
    import torch._dynamo

    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most bytes of tensors that ``call`` holds at once beyond what was there before it.

    On a CPU by torch's profiler, which sees every allocation of torch's allocator, those of compiled code included; not
    what native code takes for itself.
    """
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    held = most = 0
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def free_bytes(device: str) -> int:
    """Memory that is free on the device now, to this process."""
    import torch

    from tritium.engine import allocator

    if device == "cuda":
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + cached
    available = allocator.available_bytes()
    return available if available is not None else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


# ------------------------------------------------------------------------------------------------------------ ablating


@dataclass
class Request:
    """What to do. arms: the baseline first. together: at most so many arms at a time besides baseline and twin; 0: as
    many as the memory holds. steps: 0 trains no curves."""

    base: Config
    arms: Sequence[Choice]
    axes: Sequence[Axis]
    mode: str
    T: int
    B: int
    device: str
    rounds: int = 10
    seed: int = 0
    gate: bool = True
    twin: bool = True
    together: int = 0
    steps: int = 0
    seeds: int = 0
    eval_every: int = 0
    target_loss: float | None = None
    data: curves.Data | None = None
    command: str = ""
    say: Callable[[str], object] = field(default=lambda text: None, repr=False)


def ablate(request: Request) -> dict[str, Any]:
    """Build, check, time and train the arms; returns the record (:data:`SCHEMA`). NothingToCompare where the baseline
    cannot be timed. After Ctrl-C, and where a later group's baseline cannot be timed, a record of what was measured,
    with a red check; KeyboardInterrupt or NothingToCompare where that is nothing."""
    from tritium.engine import allocator

    run = _Run(request)
    with allocator.freed_memory_kept(request.device == "cpu"), _room_to_compile(len(request.arms)):
        pending = list(request.arms[1:])
        try:
            while pending or not run.groups:
                pending = run.group(pending)
        except KeyboardInterrupt:
            if not run.samples:  # nothing was measured
                raise
            run.stop(STOPPED)
        except NothingToCompare as error:  # the groups before this one had their own baseline
            if not run.samples:
                raise
            request.say(f"{request.base.name}: {error}")
            run.stop(str(error))
    return run.record()


class _Broke(Exception):
    """An arm raised ``error``."""

    def __init__(self, name: str, error: Exception):
        super().__init__(name)
        self.name, self.error = name, error


def _told_apart(name: str, step: Callable[[], float]) -> Callable[[], float]:
    """``step``, with what it raises as the arm's _Broke."""

    def run() -> float:
        try:
            return step()
        except Exception as error:  # a backend of the user's may fail in any way
            raise _Broke(name, error) from error

    return run


class _Run:
    """An ablation under way."""

    def __init__(self, request: Request):
        from tritium.benchmarks import peers
        from tritium.benchmarks.kernels import Gate
        from tritium.engine.step import MicroBatch

        self.request = r = request
        self.result = record.begin("ablate", r.command, r.device, r.base.name)
        self.gate = Gate(r.device)
        self.batches = [
            MicroBatch(ids, targets) for ids, targets in peers.batches(r.base.model, r.B, r.T, 4, r.device, r.seed)
        ]
        self.rows: dict[str, dict[str, Any]] = {choice.name: _row(choice) for choice in r.arms}
        self.wide: dict[str, dict[str, Tensor]] = {}  # by model: the weights to check with
        self.references: dict[str, Observed] = {}
        self.samples: list[dict[str, timing.Samples]] = []  # of each group
        self.trained: dict[str, list[curves.Curve]] = {}
        self.trained_beside: dict[str, list[curves.Curve]] = {}
        self.first_row: dict[str, Any] = {}  # the baseline's, of the first group
        self.stopped = ""  # why not all was measured
        self.lost: dict[str, str] = {}  # arm → why it was not trained to the end
        self.twins: list[timing.Interval] = []
        self.groups = 0
        self.recompiled = 0

    # one arm ----------------------------------------------------------------------------------------------------------

    def admit(self, choice: Choice) -> Arm | None:
        """Build an arm and check it; its row says what was found. None for one that is not to be timed."""
        import torch

        from tritium.kernels.op import KernelError

        row = self.rows[choice.name]
        self.request.say(f"{choice.name}: building and checking")
        try:
            arm = self.build(choice, row)
        except (KernelError, ConfigError) as error:
            row |= {"status": "unavailable", "reason": str(error).splitlines()[0]}
            if isinstance(error, ConfigError):
                row["reason"] = " ".join(str(error).split())
        except torch.OutOfMemoryError as error:
            row |= {"status": "failed", "reason": f"out of memory: {str(error).splitlines()[0]}; give a smaller --B"}
        except Exception as error:  # a backend of the user's may fail in any way; the other arms go on
            row |= {"status": "failed", "reason": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
            self.request.say(traceback.format_exc())
        if row["status"] == "ok":
            return arm
        self.request.say(f"{choice.name}: {row['status']}: {row['reason']}")
        return None

    def build(self, choice: Choice, row: dict[str, Any]) -> Arm:
        from tritium.benchmarks.training import Compiled

        choice.config.check()
        if choice.config.model.dropout > 0.0:
            raise ConfigError(
                "with dropout two arms draw different masks, so that nothing shows whether they compute the same; use "
                "--model.dropout 0"
            )
        reference = self.reference(choice.config, "fp32")
        before = Compiled.now()
        arm = Arm(choice.config, self.request.device)
        got, seconds = arm.observe(self.weights(choice.config), self.batches)
        compiled = Compiled.now().graphs - before.graphs
        found = deviation(got, reference)
        same = None
        if arm.precision != "fp32":
            # of what is in fp8 the reference kernels know nothing
            same = deviation(self.reference(choice.config, "bf16"), reference)
        said = wrong(found, same, arm.precision)
        if arm.engine.compiled and compiled == 0:
            raise RuntimeError("torch.compile was asked for and compiled nothing")
        said += self.contract(arm) if self.request.gate else []
        name, relative, factor = found.worst
        table = [dataclasses.asdict(line) for line in arm.engine.table if line.phase == "train"]
        row |= {
            "status": "red" if said else "ok", "reason": "; ".join(said), "group": self.groups,
            "precision": arm.precision, "compiled": arm.engine.compiled,
            "loss_delta": _finite(found.loss), "gradient_delta": _finite(found.norm),
            "gradient_error": {"tensor": name, "relative": _finite(relative), "factor": _finite(factor)},
            "first_step_s": seconds, "own_bytes": arm.own_bytes(), "kernels": table,
        }  # fmt: skip
        if not said:
            row["peak_bytes"] = row["own_bytes"] + peak_bytes(lambda: arm.step(self.batches[0]), self.request.device)
        return arm

    def weights(self, config: Config) -> dict[str, Tensor]:
        """The common weights of all arms of a model."""
        key = reference_of(config).replace(model={"vocab_multiple": 1}).to_json()
        if key not in self.wide:
            self.wide[key] = wide_weights(config, self.request.seed, self.request.device)
        return self.wide[key]

    def reference(self, config: Config, precision: str) -> Observed:
        """What the reference kernels compute for an arm's model in ``precision``; made once for each model."""
        wanted = reference_of(config, precision).replace(model={"vocab_multiple": 1})
        key = wanted.to_json()
        if key not in self.references:
            arm = Arm(wanted, self.request.device)
            self.references[key], _ = arm.observe(self.weights(config), self.batches)
        return self.references[key]

    def contract(self, arm: Arm) -> list[str]:
        """Which of an arm's backends break the contract, run here and now."""
        from tritium.kernels.op import call_sites

        broken = []
        for _, site in call_sites([arm.engine.model, arm.engine.optimizer]):
            backend, dtype = site.bound["train"], site.dtype or arm.engine.dtype
            said = f"{site.op.name}.{backend.name} breaks the contract"
            if backend.name == "reference" or said in broken:
                continue
            before = len(self.gate.red)
            if not self.gate.admits(site.op, backend, dtype):
                broken.append(said)
                for text in self.gate.red[before : before + 3]:
                    self.request.say(text)
        return broken

    # a group of arms --------------------------------------------------------------------------------------------------

    def group(self, pending: list[Choice]) -> list[Choice]:
        """Time (and train) the baseline beside as many of ``pending`` as there is room for; the rest is returned."""
        r = self.request
        first = r.arms[0]
        again = dict(self.rows[first.name])
        if self.groups:
            self.first_row = again
        baseline = self.admit(first)
        if baseline is None:
            row = self.rows[first.name]
            raise NothingToCompare(f"the baseline ({first.name}) is {row['status']}: {row['reason']}")
        if self.groups:  # its row tells of the first group
            self.rows[first.name] = again
        arms = {first.name: baseline}
        twin = None
        if r.twin:
            key = f"{first.name} (again)"
            self.rows[key] = _row(first)
            twin = self.admit(dataclasses.replace(first, name=key))
            row = self.rows.pop(key)
            if twin is None:
                raise NothingToCompare(f"the baseline's twin is {row['status']}: {row['reason']}")
        while pending and self.has_room(len(arms)):
            choice = pending.pop(0)
            arm = self.admit(choice)
            if arm is not None:
                arms[choice.name] = arm
        if len(arms) > 1 or not self.groups:
            self.time(arms, twin)
            if r.steps:
                self.train(arms)
        self.groups += 1
        del baseline, twin, arms
        _release()
        return pending

    def stop(self, why: str) -> None:
        """No more is measured: what the group under way has begun to write is taken back."""
        first = self.request.arms[0].name
        if self.first_row:
            self.rows[first] = self.first_row
        self.rows = {choice.name: self.rows[choice.name] for choice in self.request.arms}
        self.stopped = why

    def has_room(self, arms: int) -> bool:
        """Whether one more arm fits beside so many, the baseline among them; one always has to. Asked anew for each:
        on a CPU those before it took more than they hold, the compiler's memory and holes in the heap."""
        from tritium.engine import allocator, plan

        r = self.request
        if r.together or arms == 1:
            return arms <= max(1, r.together)
        margin = plan.HOLES_MARGIN if r.device == "cpu" and allocator.policy() != "native" else plan.MARGIN
        return free_bytes(r.device) >= (1 + margin) * int(self.rows[r.arms[0].name]["peak_bytes"])

    def time(self, arms: Mapping[str, Arm], twin: Arm | None) -> None:
        from tritium.benchmarks.training import Compiled

        r = self.request
        runs = dict(arms) | ({"": twin} if twin is not None else {})
        steps = {name: _told_apart(name, arm.step_ms) for name, arm in runs.items()}
        while True:
            try:
                for name, arm in runs.items():
                    arm.lr.fill_(arm.config.optim.lr)
                    arm.turn = itertools.cycle(self.batches)
                    timing.warm_up(steps[name], limit_runs=20)
                before = Compiled.now()
                samples = timing.interleave(
                    {name: steps[name] for name in runs}, r.rounds, lambda done: r.say(f"round {done} of {r.rounds}")
                )
                break
            except _Broke as broke:  # the others are timed without it
                self.drop(broke, runs)
        record.after(self.result)  # of the last group; training comes later
        self.recompiled += Compiled.now().graphs - before.graphs
        baseline = samples[r.arms[0].name]
        if twin is not None:
            self.twins.append(timing.speedup(samples.pop(""), baseline, level=TWIN_LEVEL))
        self.samples.append(samples)
        for name, taken in samples.items():
            row, arm = self.rows[name], arms[name]
            if arm.loss is None or not math.isfinite(arm.loss.item()):
                row |= {"status": "red", "reason": "its loss did not stay finite while it was timed"}
                continue
            if name == r.arms[0].name and self.groups:
                continue
            step_s = taken.median_ms / 1e3
            row |= {
                "speed": timing.bootstrap_median_of_positive(self.tokens_per_s(taken)).to_json(),
                "ratio": timing.speedup(taken, baseline).to_json(),
                "delta_tokens_per_s": timing.bootstrap_median(
                    [a - b for a, b in zip(self.tokens_per_s(taken), self.tokens_per_s(baseline), strict=True)]
                ).to_json(),
                "times": taken.to_json(),
                "noise": timing.noise(taken),
                "compile_s": max(0.0, row["first_step_s"] - 2 * step_s),
            }

    def drop(self, broke: _Broke, runs: dict[str, Arm]) -> None:
        """Take an arm out of ``runs``; NothingToCompare where the others are compared with it."""
        name, first = broke.name, self.request.arms[0].name
        reason = f"while it was timed: {type(broke.error).__name__}: {(str(broke.error).splitlines() or [''])[0]}"
        if name in ("", first):
            who = f"the baseline ({first})" if name else "the baseline's twin"
            raise NothingToCompare(f"{who} is failed: {reason}") from broke.error
        self.rows[name] |= {"status": "failed", "reason": reason}
        self.request.say(f"{name}: failed: {reason}")
        del runs[name]

    def tokens_per_s(self, samples: timing.Samples) -> list[float]:
        """Of each round."""
        return [2e3 * self.request.B * self.request.T / sum(pair) for pair in samples.rounds]

    def train(self, arms: Mapping[str, Arm]) -> None:
        r = self.request
        assert r.data is not None
        kept = {name: arm for name, arm in arms.items() if self.rows[name]["status"] == "ok"}
        stopped = None
        try:
            found = self.curves(kept)
        except curves.Stopped as error:
            stopped, found = error, error.found
            if any(len(trained) < 2 for trained in found.values()):  # nothing to pair
                raise
        first = r.arms[0].name
        for name, trained in found.items():
            if name != first:
                self.trained[name], self.trained_beside[name] = trained, found[first]
            elif first not in self.trained:
                self.trained[name] = trained
        if stopped is not None:
            raise stopped

    def curves(self, kept: Mapping[str, Arm]) -> dict[str, list[curves.Curve]]:
        r = self.request
        assert r.data is not None
        return curves.train(
            kept, r.data, range(r.seed, r.seed + r.seeds), r.steps, r.eval_every,
            lambda name, step: learning_rate(step, r.steps, kept[name].config.optim), r.say, self.lost,
        )  # fmt: skip

    # the record -------------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        r, rows = self.request, list(self.rows.values())
        first = r.arms[0].name
        resolution = max(
            (math.exp(max(abs(math.log(t.low)), abs(math.log(t.high)))) - 1 for t in self.twins), default=0.0
        )
        for row in rows:
            if not row["status"] or (self.stopped and row["status"] == "ok" and row["speed"] is None):
                row |= {"status": "not run", "reason": self.stopped}
            row["verdict"] = "baseline" if row["name"] == first else verdict(row["ratio"], resolution)
        if self.trained:
            told = curves.compare(self.trained, self.trained_beside, r.B * r.T, r.target_loss)
            for name, found in told.items():
                self.rows[name]["training"] = found
        twin = max(self.twins, key=lambda t: abs(math.log(t.median)), default=None)
        checks = [record.check(f"{row['name']} {ablate_results.RIGHT}", row["status"] == "ok", row["reason"])
                  for row in rows if row["status"] in ("ok", "red", "failed")]  # fmt: skip
        if self.stopped:
            checks.append(record.check(WENT_TO_ITS_END, False, self.stopped))
        if not self.stopped and not any(row["status"] == "ok" for row in rows if row["name"] != first):
            reasons = "; ".join(f"{row['name']}: {row['reason']}" for row in rows if row["name"] != first)
            checks.append(record.check("an arm was compared with the baseline", False, reasons))
        checks += [record.check(f"{name} trains to the end", False, why) for name, why in self.lost.items()]
        checks.append(record.check("nothing compiled while timing", self.recompiled == 0, f"{self.recompiled} frames"))
        if twin is not None:
            ok = all(t.low <= 1.0 <= t.high for t in self.twins)
            checks.append(record.check("the baseline is as fast as its twin", ok, str(twin)))
        backends = {(line["op"], line["backend"]) for row in rows for line in row["kernels"]}
        data = "" if r.data is None else r.data.name
        return self.result | {
            "settings": {
                "T": r.T, "B": r.B, "rounds": r.rounds, "seed": r.seed, "mode": r.mode, "gate": r.gate,
                "axes": {axis.name: list(axis.values) for axis in r.axes}, "steps": r.steps,
                "seeds": min(map(len, self.trained.values()), default=r.seeds),
                "eval_every": r.eval_every, "target_loss": r.target_loss, "data": data,
                "config": json.loads(r.base.to_json()),
            },
            "method": METHOD, "baseline": first, "arms": rows,
            "twin": None if twin is None else twin.to_json(), "resolution": resolution,
            "kernels": self.rows[first]["kernels"], "sources": record.sources(backends),
            "figures": self.figures(rows), "checks": checks,
        }  # fmt: skip

    def figures(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Of the arms that are right."""
        found = []
        for row in rows:
            if row["speed"] is None:
                continue
            name, taken = row["name"], self.samples[row["group"]][row["name"]]
            speeds = [1e3 * self.request.B * self.request.T / ms for ms in taken.ms]
            found += [
                record.figure(f"{name} tokens/s", "tokens/s", "higher", speeds),
                record.figure(f"{name} peak memory", "bytes", "lower", value=row["peak_bytes"]),
                record.figure(f"{name} compilation", "s", "lower", value=row["compile_s"]),
            ]
            if row["training"] is not None:
                finals = [curve["val_loss"][-1] for curve in row["training"]["curves"]]
                found.append(record.figure(f"{name} final validation loss", "nats per token", "lower", finals))
                target = row["training"]["target"]
                if target is not None and target["reached"]:
                    what = f"{name} seconds to a validation loss of {self.request.target_loss:g}"
                    found.append(record.figure(what, "s", "lower", target["seconds"]))
        return found


def _row(choice: Choice) -> dict[str, Any]:
    """An ARM of which nothing is known yet."""
    nothing = dict.fromkeys(ARM)
    return nothing | {"name": choice.name, "settings": choice.settings, "status": "", "reason": "", "verdict": "",
                      "kernels": []}  # fmt: skip


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def verdict(ratio: Mapping[str, float] | None, resolution: float) -> str:
    """What a ratio of speeds shows on a machine that cannot tell smaller differences than ``resolution``."""
    if ratio is None:
        return ""
    if ratio["low"] > 1.0 and ratio["median"] > 1.0 + resolution:
        return "faster"
    if ratio["high"] < 1.0 and ratio["median"] < 1.0 / (1.0 + resolution):
        return "slower"
    return "no difference shown"


# ------------------------------------------------------------------------------------------------------------- command


def save(result: dict[str, Any], path: pathlib.Path) -> str:
    """Write the record and beside it the picture and the page; returns the three paths, and which record this replaced.
    RecordError, and nothing is written, when the record does not fit its schema."""
    replaced = record.write(result, SCHEMA, path)
    picture = ablate_results.draw(result)
    written = [path, path.with_suffix(".png"), path.with_suffix(".html")]
    for target, content in zip(written[1:], (picture, ablate_results.page(result, picture).encode()), strict=True):
        temporary = target.with_suffix(".tmp")
        temporary.write_bytes(content)
        os.replace(temporary, target)
    return ", ".join(map(str, written)) + replaced


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="tritium ablate",
        usage="%(prog)s PRESET AXIS=VALUE,VALUE ... [options] [--FIELD VALUE ...]",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="What each choice of kernel or setting is worth: speed, memory, loss, gradients, arm beside arm.\n"
        "\n"
        "An axis is an op (attention=sdpa,native), kernels (every op: kernels=auto,reference), a place\n"
        "('blocks.0.*:attention=sdpa,native') or a field of the configuration (precision=fp32,bf16,\n"
        "recompute=none,full, micro_rows=8,4, compile=true,false, compile_mode=default,max-autotune-no-cudagraphs,\n"
        "weight_layout=out_in,in_out, vocab_multiple=1,64, optim.lr=1e-3,3e-3). Its first\n"
        "value is the baseline's. A list's items are joined by +. Every field is a flag too, for all arms\n"
        "(--kernels.attention native).",
        epilog="examples:\n"
        "  tritium ablate tiny attention=native,sdpa,reference adamw=native,reference\n"
        "  tritium ablate tiny --mode leave-one-out\n"
        "  tritium ablate tiny precision=fp32,bf16 --steps 300 --seeds 5 --target-loss 4.0",
    )
    add = made.add_argument
    add("--mode", default="one", help=f"{', '.join(MODES)}: every combination; one axis at a time from the baseline; "
        "the preset's own choice with each op (or those named after PRESET) set to reference "
        "(default: %(default)s)")  # fmt: skip
    add("--T", type=int, help="tokens in a row (default: by preset; with --steps its block_size)")
    add("--B", type=int, help="rows in a step (default: by preset; with --steps its batch_rows)")
    add("--rounds", type=int, default=10, help="of two steps of every arm (default: %(default)s)")
    add("--steps", type=int, default=0, help="also train every arm for so many steps (default: %(default)s)")
    add("--seeds", type=int, default=3, help="with --steps: seeds to train from (default: %(default)s)")
    add("--eval-every", type=int, default=0, help="steps between validation losses (default: steps / 20)")
    add("--target-loss", type=float, help="with --steps: measure seconds and tokens to this validation loss")
    add("--data", choices=("preset", "markov"), default="preset", help="with --steps: the preset's text, or tokens "
        "of a random Markov chain, which need no file")  # fmt: skip
    add("--no-gate", dest="gate", action="store_false", help="do not hold the backends to their contract first")
    add("--no-twin", dest="twin", action="store_false", help="do not time a second arm like the baseline")
    add("--together", type=int, default=0, help="arms at a time beside the baseline (default: as the memory allows)")
    add(
        "--write-tuning",
        action="store_true",
        help="let auto take the order that was found, for every op that is an axis",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--seed", type=int, default=0, help="of batches and weights; the first of --seeds (default: %(default)s)")
    add("--out", type=pathlib.Path, help="folder of the results (default: benchmarks/results/MACHINE)")
    return made


def _check(made: argparse.ArgumentParser, a: argparse.Namespace, fields: Sequence[str]) -> None:
    """Exit with status 2 where the command line cannot be meant, before anything is built."""
    if a.preset not in presets.names():
        made.error(
            f"there is no preset {a.preset!r}; the nearest are {nearest(a.preset, presets.names())}. "
            f"All: {', '.join(presets.names())}"
        )
    if a.mode not in MODES:
        made.error(f"there is no mode {a.mode!r}; the nearest are {nearest(a.mode, MODES)}")
    own = [flag for action in made._actions for flag in action.option_strings]
    known = {f"--{name}" for name in config_fields()} | {"--kernels"}
    for word in fields:
        flag = word.partition("=")[0].replace("-", "_").replace("__", "--", 1)
        if word.startswith("-") and flag not in known and not _number(word):
            made.error(f"there is no flag {word!r}; the nearest are {nearest(word, [*own, *sorted(known)])}")
    if (late := _after_the_flags(fields)) is not None:
        made.error(
            f"{late!r} comes after the flags; axes and ops come before them: tritium ablate {a.preset} "
            f"{' '.join([*a.axes, late])} --mode {a.mode} ..."
        )
    for flag, on in (("--no-gate", a.gate), ("--no-twin", a.twin)):
        if a.write_tuning and not on:
            made.error(
                f"--write-tuning lets auto take what is shown to be right and faster, and {flag} leaves out what shows "
                f"it; leave {flag} out"
            )
    least = {
        "rounds": (2, ", or there is no interval"), "T": (1, ""), "B": (1, ""), "steps": (0, ""),
        "seeds": (3, ", or a paired test shows nothing"), "eval_every": (0, ""), "together": (0, ""),
    }  # fmt: skip
    for name, (low, why) in least.items():
        value = getattr(a, name)
        if value is not None and value < low:
            made.error(f"--{name.replace('_', '-')} must be at least {low}{why}; it is {value}")
    if not 0 <= a.seed < 2**62:
        made.error(f"--seed must be from 0 to {2**62 - 1}; it is {a.seed}")
    if a.target_loss is not None and not (a.steps and math.isfinite(a.target_loss) and a.target_loss > 0.0):
        made.error(
            f"--target-loss {a.target_loss} must be above 0, and wants --steps N: the most steps to train for it"
        )
    if a.mode == "leave-one-out":
        for word in a.axes:
            if word not in op_names():
                made.error(
                    f"--mode leave-one-out takes names of ops, and {word!r} is none; the nearest are "
                    f"{nearest(word, op_names())}"
                )
    elif not a.axes:
        made.error("no axis was given, so there is nothing to compare; for example: attention=native,sdpa")


def _after_the_flags(fields: Sequence[str]) -> str | None:
    """The first word that is no flag and no flag's value."""
    before, many = "", False
    for word in fields:
        if word.startswith("--"):
            section, _, name = word[2:].partition("=")[0].replace("-", "_").partition(".")
            many = isinstance(getattr(getattr(Config(), section, None), name, None), tuple)
        elif not many and (not before.startswith("--") or "=" in before):
            return word
        before = word
    return None


def _number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def configured(a: argparse.Namespace, fields: Sequence[str], device: str) -> tuple[Config, int, int]:
    """(configuration, T, B) of the preset as it is ablated."""
    from tritium.benchmarks import training

    config, T, B = training.configured(a.preset, a.T, device, fields)
    if a.steps:
        T, B = a.T or config.model.block_size, config.train.batch_rows
        vocab_size = presets.load(a.preset).model.vocab_size if not any("vocab_size" in f for f in fields) else None
        model = {"block_size": T} | ({} if vocab_size is None or a.data == "markov" else {"vocab_size": vocab_size})
        config = config.replace(model=model)
    B = a.B or B
    rows = config.train.micro_rows if a.steps or any("micro" in f for f in fields) else B
    return config.replace(train={"batch_rows": B, "micro_rows": rows if rows and B % rows == 0 else B}), T, B


def request_of(a: argparse.Namespace, fields: Sequence[str], device: str) -> Request:
    """What the command line asks for. AxisError, ConfigError, KernelError or DataError where it cannot be had."""
    from tritium.engine import cli, train

    axes = [] if a.mode == "leave-one-out" else [Axis.parse(word) for word in a.axes]
    check_axes(axes, fields)
    values = [value for axis in axes if axis.op is not None for value in axis.values]
    cli._find_modules_here(values)
    config, T, B = configured(a, fields, device)
    data: curves.Data | None = None
    if a.steps and a.data == "preset":
        corpus = curves.Corpus(config, _say)
        config = train.with_vocabulary(config, corpus.vocab_size)
        data = corpus.shaped(config)
    elif a.steps:
        data = curves.Markov(config.model.vocab_size, B, T)
    arms = left_out(config, a.axes, device) if a.mode == "leave-one-out" else choices(config, axes, a.mode)
    if len(arms) < 2:
        raise AxisError(
            "every axis has one value, so there is one arm and nothing to compare it with; give more values"
        )
    check_ops(axes, arms)
    if a.write_tuning and not any(axis.op is not None and axis.field != "kernels.override" for axis in axes):
        raise AxisError(
            "--write-tuning writes the order of an op's backends, and no axis is an op: attention=native,sdpa"
        )
    return Request(
        config, arms, axes, a.mode, T, B, device, a.rounds, a.seed, a.gate, a.twin, a.together, a.steps,
        a.seeds if a.steps else 0, (a.eval_every or max(1, a.steps // 20)) if a.steps else 0, a.target_loss, data,
        say=_say,
    )  # fmt: skip


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@stages.ended_by_signals()
def main(argv: Sequence[str] | None = None) -> int:
    """``tritium ablate``; exit status 0, 1 when an arm is red or failed, a check does not hold or there is no baseline,
    2 for a wrong command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    made = parser()
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    words, rest = argv[:count], argv[count:]
    a, fields = made.parse_known_args(rest)
    if not words:
        made.error("PRESET is missing; for example: tritium ablate tiny attention=native,sdpa")
    a.preset, a.axes = words[0], words[1:]
    _check(made, a, fields)

    import torch

    from tritium.benchmarks import throughput
    from tritium.engine import cli
    from tritium.engine.data.errors import DataError
    from tritium.kernels.op import KernelError

    device = a.device
    if device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: torch finds no GPU here, so there is nothing to time; use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        request = request_of(a, fields, device)
        request.command = shlex.join(["tritium", "ablate", *argv])
        folder = a.out or throughput.results_folder({"machine": record.machine(device)})
        digest = hashlib.sha256("\0".join([a.mode, *words[1:], *fields, str(a.steps)]).encode()).hexdigest()[:6]
        path = folder / f"ablate_{a.preset}_T{request.T}_B{request.B}_{digest}.json"
        if why := record.unwritable(path):
            made.error(f"--out: {why}")
        result = ablate(request)
    except (AxisError, cli.UsageError) as error:
        made.error(str(error))
    except (NothingToCompare, ConfigError, KernelError, DataError) as error:
        _say(f"{a.preset}: {error}")
        return 1
    print(f"\n{ablate_results.text(result)}\n", flush=True)  # before the disk has a say in it
    print(f"written: {save(result, path)}", flush=True)
    status = int(not all(check["ok"] for check in result["checks"]))
    chosen = [axis.op for axis in request.axes if axis.op is not None and axis.field != "kernels.override"]
    for op in dict.fromkeys(chosen) if a.write_tuning else ():
        try:
            print(ablate_results.write_tuning(result, op, request.arms[0].config), flush=True)
        except (RuntimeError, OSError) as error:
            _say(f"--write-tuning: {op}: {error}")
            status = 1
    stopped = any((check["name"], check["detail"]) == (WENT_TO_ITS_END, STOPPED) for check in result["checks"])
    return 130 if stopped else status


if __name__ == "__main__":
    sys.exit(main())
