"""``tritium replay DUMP``: a bad step once more, in a process of its own. Is it the kernel, the data or the precision?

The step is repeated from the weights, moments, batch and random state of the dump (bad_steps.py), with the kernels,
precision and number of threads that it had; where the dump holds an earlier checkpoint, the steps between are trained
again first. Loss and gradient norm must come out equal to the bit. A second, eager pass looks at what every call site
puts out and at the gradient that reaches it, and names what was first not finite, or largest. With other settings the
step is then repeated from the same state with these, which shows whether the fault goes away.

Several processes are repeated one after the other: their sums of gradients are then added, which for two gives the bits
of an all-reduce; for more, its order of addition is the library's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tritium.engine import checkpoint, moments, train
from tritium.engine.checkpoint import Checkpoint, CheckpointError
from tritium.engine.config import Config, ConfigError, TrainConfig, data_folder, differences
from tritium.engine.guard import GOOD, WORDS
from tritium.engine.model import call
from tritium.engine.parallel import world as join_world
from tritium.engine.schedule import learning_rate
from tritium.engine.step import MicroBatch, train_step
from tritium.kernels import op

# what decides how a step is computed; the rest decides which step it is, or nothing that a single step shows
_NOT_HERE = {"steps", "batch_rows", "seed", "eval_every", "eval_tokens", "sample_every", "sample_tokens", "log_every",
             "rollback_after", "deterministic"}  # fmt: skip
_FREE = {
    "optim.skip_outliers",
    *(f"train.{f.name}" for f in dataclasses.fields(TrainConfig) if f.name not in _NOT_HERE),
}
MOST_ROWS = 80  # of the table; a deeper model is shown block by block


def open_dump(path: pathlib.Path | str) -> Checkpoint:
    """The dump in this folder, verified. CheckpointError where it is none."""
    path = pathlib.Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist: give a folder of a run's bad_steps, RUN/bad_steps/step_…")
    inside = sorted(str(p) for p in (path / "bad_steps").glob("step_*"))
    if inside:
        raise CheckpointError(f"{path} is a run, and a replay wants one of its bad steps: {', '.join(inside)}")
    found = checkpoint.verify(path)
    if "verdict" not in found.meta:
        raise CheckpointError(f"{path} is a checkpoint and no bad step: those are in RUN/bad_steps")
    return found


def as_it_was(found: Checkpoint) -> Config:
    """The configuration of the dump, with what it left to the machine and the processes as they had decided."""
    precision: str = found.config.train.precision
    if precision == "auto":
        precision = {"float32": "fp32", "bfloat16": "bf16"}[found.meta["dtype"]]
    compiled = "true" if found.meta["compiled"] else "false"
    # a captured step has the bits of the plain one (engine/capture.py), and a replay runs it once
    was = {"precision": precision, "compile": compiled, "cuda_graphs": "false"}
    # of several processes: the rounding of moments in bf16 depends on it
    flat = "true" if train.is_flat(found.config, int(found.meta["world_size"])) else "false"
    return found.config.replace(train={**was, "flat": flat})


def check(was: Config, asked: Config) -> list[str]:
    """What ``asked`` changes of ``was``, as text; ConfigError where it would be another step."""
    changed = differences(was, asked)
    if asked.train.micro_rows == 0:
        raise ConfigError(
            f"train.micro_rows=0 leaves the rows to a plan, and a replay is of one step, which had "
            f"{was.train.micro_rows}; give a number, or leave the flag away"
        )
    wrong = [d for d in changed if not d.startswith("kernels.") and d.partition(":")[0] not in _FREE]
    if wrong:
        raise ConfigError(
            "a replay repeats one step, so only how it is computed may be changed (--kernels…, --train.precision, "
            "--train.compile, --train.recompute, --train.micro_rows, …), not:\n" + "\n".join(f"  - {d}" for d in wrong)
        )
    return changed


@dataclass
class Given:
    """What a dump holds for the step: per process its micro-batches' rows and its random state; lr and count."""

    ids: list[Tensor]
    targets: list[Tensor]
    seq_start: list[Tensor | None]
    random: list[dict[str, Tensor]]
    guard: dict[str, Tensor]

    @staticmethod
    def read(found: Checkpoint) -> Given:
        stored = checkpoint.contents(found)
        wanted = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in stored.items()
            if name.startswith(("batch.", "rng.", "optimizer.guard.", "optimizer.skipped"))
        }
        checkpoint.read(found, wanted)
        ranks = range(int(found.meta["world_size"]))
        return Given(
            [wanted[f"batch.ids.{rank}"] for rank in ranks],
            [wanted[f"batch.targets.{rank}"] for rank in ranks],
            [wanted.get(f"batch.seq_start.{rank}") for rank in ranks],
            [{k: v for k, v in wanted.items() if k.startswith("rng.") and k.endswith(f".{rank}")} for rank in ranks],
            {k: v for k, v in wanted.items() if k.startswith("optimizer.")},
        )

    def micro_batches(self, rows: int, device: torch.device) -> list[list[MicroBatch]]:
        """Per process, in micro-batches of so many rows."""
        found = []
        for ids, targets, start in zip(self.ids, self.targets, self.seq_start, strict=True):
            starts = [None] * len(ids) if start is None else start.split(rows)
            parts = zip(ids.split(rows), targets.split(rows), starts, strict=False)
            found.append([MicroBatch(*part).to(device) for part in parts])
        return found


def replay(found: Checkpoint, asked: Config, say: Callable[[str], None] = print) -> bool:
    """Repeat the bad step ``found``, with the settings of ``asked`` too where they differ from its own; says what came
    of it. Returns whether the fault was found again: without other settings, to the bit.

    Raises ConfigError, CheckpointError, DataError or KernelError with a message for the user.
    """
    meta, was = found.meta, as_it_was(found)
    changed = check(was, asked)
    given = Given.read(found)
    with join_world(asked.train.device) as world, contextlib.ExitStack() as stack:
        if world.size > 1:
            raise ConfigError("a replay is one process, also of a step of several; start it without torchrun")
        if world.device.type == "cpu":
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(int(meta["threads"]))
        stack.enter_context(train.settings(was, world.device))
        say(
            f"bad step {found.step} of {was.name}: {WORDS[meta['verdict']]}\n"
            f"  seen   loss {meta['loss']:.9g}, gradient norm {meta['norm']:.9g}; rows {meta['position']} to "
            f"{meta['position'] + was.train.batch_rows - 1} of the data order, {meta['world_size']} process(es), "
            f"{meta['threads']} thread(s), {was.train.precision}, {'compiled' if meta['compiled'] else 'eager'}"
        )
        engine = train.build(was, world)
        _compare_surroundings(found, engine, say)
        say(f"  state  {_bring(engine, found, given)}")
        state = {name: tensor.clone() for name, tensor in engine.state().items()}
        loss, norm, verdict = _once(engine, state, given, meta)
        same = _equal(loss, meta["loss"]) and _equal(norm, meta["norm"])
        say(
            f"  again  loss {loss:.9g}, gradient norm {norm:.9g}: "
            + ("reproduced bit for bit" if same else f"NOT reproduced bit for bit; this time {WORDS[verdict]}")
        )
        say("\n" + look(engine, state, given, meta, table=not changed))
        if not changed:
            if not same:
                say(
                    "\nnot the data alone, then. If versions, kernels and device are those of the run and it was "
                    "deterministic (train.deterministic), a fault of the machine is likely: memory or processor"
                )
            return same
        del engine
        say("\nonce more with " + "; ".join(changed))
        other = train.build(asked, world)
        loss, norm, verdict = _once(other, state, given, meta)
        gone = verdict == GOOD
        say(
            f"  now    loss {loss:.9g}, gradient norm {norm:.9g}: {WORDS[verdict]}, the fault "
            + ("goes away" if gone else "stays")
        )
        if not gone:
            say("\n" + look(other, state, given, meta, table=True))
        return not gone


def _equal(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _compare_surroundings(found: Checkpoint, engine: train.Engine, say: Callable[[str], None]) -> None:
    """Say what is not as it was when the step went wrong."""
    now, then = checkpoint.versions(), found.meta["versions"]
    lines = [
        f"{name} {then.get(name)} → {now.get(name)}" for name in {**then, **now} if then.get(name) != now.get(name)
    ]
    rows = [dataclasses.asdict(row) for row in engine.table]
    pairs = zip(found.meta["kernels"], rows, strict=False)
    lines += [
        f"{a['site']} {a['op']} {a['backend']} → {b['backend']}" for a, b in pairs if a["backend"] != b["backend"]
    ]
    if lines:
        say("  not as it was: " + "; ".join(lines))


# --------------------------------------------------------------------------------------------------- state and the step


def _bring(engine: train.Engine, found: Checkpoint, given: Given) -> str:
    """Put the engine into the state before the step; says how."""
    source = found.meta["state"]
    if source == "none":
        raise CheckpointError(
            f"{found.path} holds no state: weights had moved on by when the loss was read, and there was no checkpoint "
            "to begin from. With --train.log_every 1 or checkpoints more often (--run.save_every) there would be"
        )
    if source == "here":
        moments.read(found, engine.state())
        engine.optimizer.refresh_copies()
        return "before the step, from the dump"
    base = checkpoint.verify(found.path / checkpoint.BESIDE) if source == "checkpoint" else None
    begin = 0 if base is None else base.step
    random = _random_at(engine, base, len(given.ids))
    _train_again(engine, found, begin, random)
    stored = checkpoint.random_state(0, engine.world.device).keys()
    off = any(not torch.equal(random[0][name], given.random[0][name]) for name in stored if name in given.random[0])
    engine_state = engine.state()
    for name, tensor in given.guard.items():
        engine_state[name].copy_(tensor)
    what = f"trained again from {'new weights' if base is None else f'the checkpoint of step {begin}'}, "
    return what + f"{found.step - 1 - begin} steps" + ("; its random state is NOT that of the run" if off else "")


def _random_at(engine: train.Engine, base: Checkpoint | None, processes: int) -> list[dict[str, Tensor]]:
    """Every process's random state at the checkpoint, or when it had built its engine."""
    device = engine.world.device
    if base is None:
        found = [checkpoint.random_state(0, device)]
        for rank in range(1, processes):
            torch.manual_seed(engine.config.train.seed + rank)
            found.append({_renamed(k, rank): v for k, v in checkpoint.random_state(0, device).items()})
        return found
    found = [{_renamed(k, rank): v for k, v in checkpoint.random_state(0, device).items()} for rank in range(processes)]
    moments.read(base, engine.state() | {k: v for one in found for k, v in one.items()})
    engine.optimizer.refresh_copies()
    return found


def _renamed(name: str, rank: int) -> str:
    return f"{name.rpartition('.')[0]}.{rank}"


def _train_again(engine: train.Engine, found: Checkpoint, begin: int, random: list[dict[str, Tensor]]) -> None:
    """The steps after ``begin`` and before the bad one, on the rows that they had."""
    from tritium.engine.tasks.pretraining import Pretraining

    config, device = engine.config, engine.world.device
    t = config.train
    position = int(found.meta["position"]) - (found.step - 1 - begin) * t.batch_rows
    if begin == found.step - 1:
        return
    task = Pretraining(config, data_folder(config))
    train._check_data(found, task)
    processes = len(random)
    sources = [task.batches(position, rank, processes) for rank in range(processes)]
    lr, inverse_count = torch.zeros((), device=device), torch.full((), 1.0 / config.batch_tokens, device=device)
    try:
        for step in range(begin, found.step - 1):
            lr.fill_(learning_rate(step, t.steps, config.optim))
            count = t.batch_rows // (t.micro_rows * processes)
            work = [[next(source).to(device) for _ in range(count)] for source in sources]
            _step(engine, work, random, lr, inverse_count)
    finally:
        for source in sources:
            source.close()  # type: ignore[attr-defined]


def _step(
    engine: train.Engine,
    work: list[list[MicroBatch]],
    random: list[dict[str, Tensor]],
    lr: Tensor,
    inverse_count: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step of all processes, in turn; (mean loss, gradient norm). random: theirs, before and afterwards."""
    device, optimizer = engine.world.device, engine.optimizer
    if len(work) == 1:
        _draw_from(random[0], 0, device)
        result = train_step(engine.loss, optimizer, work[0], lr, inverse_count)
        random[0] = checkpoint.random_state(0, device)
        return result
    total: Tensor | None = None
    sums: list[Tensor] = []
    for rank, batches in enumerate(work):
        _draw_from(random[rank], rank, device)
        part: Tensor | None = None
        for batch in batches:
            loss = engine.loss(batch)
            loss.backward()
            part = loss.detach() if part is None else part + loss.detach()
        assert part is not None
        total = part if total is None else total + part
        random[rank] = checkpoint.random_state(rank, device)
        for gradient, before in zip(optimizer.gradients(), sums, strict=False):
            gradient.copy_(before + gradient)
        if rank < len(work) - 1:
            sums = [gradient.clone() for gradient in optimizer.gradients()]
            optimizer.zero_grad()
    assert total is not None
    mean = total * inverse_count
    norm = optimizer.step(lr, inverse_count, mean)
    optimizer.zero_grad()
    return mean, norm


def _draw_from(random: dict[str, Tensor], rank: int, device: torch.device) -> None:
    """Set the generators, those of the device only if the dump comes from such a one."""
    if set(checkpoint.random_state(rank, device)) <= set(random):
        checkpoint.set_random_state(random, rank, device)
    elif random:
        torch.set_rng_state(random[f"rng.cpu.{rank}"])


def _load(engine: train.Engine, state: dict[str, Tensor]) -> None:
    now = engine.state()
    moments.put(state, now)  # those of the run that is asked for may be of another kind
    for name, tensor in now.items():
        if name in state and state[name].dtype == tensor.dtype:
            tensor.copy_(state[name])
    engine.optimizer.refresh_copies()


def _once(
    engine: train.Engine, state: dict[str, Tensor], given: Given, meta: dict[str, Any]
) -> tuple[float, float, int]:
    """The step from ``state``: (loss, gradient norm, verdict)."""
    config, device = engine.config, engine.world.device
    _load(engine, state)
    lr = torch.full((), float(meta["lr"]), device=device)
    inverse_count = torch.full((), 1.0 / config.batch_tokens, device=device)
    work = given.micro_batches(config.train.micro_rows, device)
    loss, norm = _step(engine, work, list(given.random), lr, inverse_count)
    return loss.item(), norm.item(), int(engine.optimizer.guard.verdict.item())


# -------------------------------------------------------------------------------------------------------------- looking


@dataclass
class Extent:
    """How large a tensor's finite values are, and how many are not finite, over all that was added."""

    largest: float = 0.0
    bad: int = 0
    numel: int = 0

    def add(self, tensor: Tensor, scale: float = 1.0) -> None:
        t = tensor.detach()
        finite = torch.isfinite(t)
        self.bad += int(t.numel() - finite.sum().item())
        self.numel += t.numel()
        if t.numel():
            self.largest = max(self.largest, scale * torch.where(finite, t, 0).abs().max().float().item())

    def __str__(self) -> str:
        return "–" if not self.numel else f"{self.largest:.3g}" + (f", {self.bad} not finite" if self.bad else "")


@dataclass
class Place:
    """A call site, or a whole block: what is known of it."""

    path: str
    op: str
    backend: str
    weights: Extent = field(default_factory=Extent)
    activations: Extent = field(default_factory=Extent)
    gradients: Extent = field(default_factory=Extent)  # of the activations
    square: float = 0.0  # of the norm of the weights' gradients

    @property
    def name(self) -> str:
        return f"{self.path} ({self.op}, {self.backend})" if self.op else self.path


@dataclass
class Looked:
    """What was seen in one pass: the places in the order in which they were computed, and the first faults."""

    places: dict[tuple[str, str], Place] = field(default_factory=dict)
    forward: str = ""  # the first output that is not finite
    backward: str = ""  # the first gradient that is not
    before: str = ""  # where the gradient was last finite
    rows: list[int] = field(default_factory=list)  # of the data order, in the micro-batch

    def output(self, place: Place, args: tuple[Any, ...], kwargs: dict[str, Any], results: Any, scale: float) -> None:
        for result in results if isinstance(results, tuple) else (results,):
            if not isinstance(result, Tensor) or not result.is_floating_point():
                continue
            before = place.activations.bad
            place.activations.add(result)
            if place.activations.bad > before and not self.forward:
                given = Extent()
                for value in (*args, *kwargs.values()):
                    if isinstance(value, Tensor) and value.is_floating_point():
                        given.add(value)
                where = (~torch.isfinite(result)).nonzero()[0].tolist()
                token = ""
                if result.ndim >= 3 and len(result) == len(self.rows):  # (B, T, …)
                    token = f" (row {self.rows[where[0]]} of the data order, column {where[1]})"
                self.forward = (
                    f"{place.name} puts out {place.activations.bad - before} of {result.numel()} numbers that are not "
                    f"finite, the first at {where}{token}; the largest of its inputs: {given}"
                )
            if result.requires_grad:
                result.register_hook(lambda g: self.gradient(place, g, scale))

    def gradient(self, place: Place, gradient: Tensor, scale: float) -> None:
        before = place.gradients.bad
        place.gradients.add(gradient, scale)
        if place.gradients.bad > before and not self.backward:
            where = f", which arose behind {self.before}, where it is finite" if self.before else ""
            self.backward = (
                f"the gradient that reaches the output of {place.name} has {place.gradients.bad - before} of "
                f"{gradient.numel()} numbers that are not finite{where}"
            )
        if not self.backward:
            self.before = place.name


def look(engine: train.Engine, state: dict[str, Tensor], given: Given, meta: dict[str, Any], table: bool) -> str:
    """A table of what every call site computes in this step, eagerly (where wanted), and what in it was first not
    finite, or largest. Gradients are those of the mean loss; the optimizer takes no step.
    """
    config, model, device = engine.config, engine.model, engine.world.device
    _load(engine, state)
    seen = Looked()
    scale = 1.0 / config.batch_tokens
    with _watching(model, seen, scale):
        for rank, batches in enumerate(given.micro_batches(config.train.micro_rows, device)):
            _draw_from(given.random[rank], rank, device)
            row = 0
            for batch in batches:
                seen.rows = [_row(meta, rank, row + i) for i in range(len(batch.ids))]
                row += len(batch.ids)
                model(batch.ids, batch.targets, batch.seq_start).backward()
    modules = dict(model.named_modules())
    faults: list[str] = []
    squares: dict[str, float] = {}
    parameters = dict(model.named_parameters())
    bad_weights = {name: n for name, p in parameters.items() if (n := int((~torch.isfinite(p)).sum().item()))}
    bad_gradients = []
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        squares[name] = (parameter.grad.double() * scale).square().sum().item()
        if not math.isfinite(squares[name]):
            bad_gradients.append(name)
    engine.optimizer.zero_grad()
    for place in seen.places.values():
        for name, parameter in modules[place.path].named_parameters(recurse=False):
            place.weights.add(parameter)
            place.square += squares[f"{place.path}.{name}" if place.path else name]
    if bad_weights:
        first, count = next(iter(bad_weights.items()))
        faults.append(
            f"before the step: {count} of {parameters[first].numel()} weights of {first} are not finite"
            + (f", and {len(bad_weights) - 1} more tensors" if bad_weights.keys() - {first} else "")
        )
    if seen.forward:
        faults.append(f"forward: {seen.forward}")
    if seen.backward and not seen.forward:
        faults.append(f"backward: {seen.backward}")
    elif bad_gradients and not seen.forward:
        faults.append(f"backward: the gradient of {bad_gradients[0]} is not finite, those of the activations are")
    if not faults:
        total = math.fsum(squares.values())
        largest = sorted(squares, key=lambda name: squares[name], reverse=True)[:3]
        parts = [f"{n} {math.sqrt(squares[n]):.3g} ({squares[n] / total:.0%} of the square)" for n in largest if total]
        faults.append("all is finite; the largest gradients: " + ", ".join(parts))
    first_word = "first not finite\n  " if bad_weights or seen.forward or seen.backward or bad_gradients else ""
    return (_table(list(seen.places.values())) + "\n\n" if table else "") + first_word + "\n  ".join(faults)


def _row(meta: dict[str, Any], rank: int, index: int) -> int:
    """Where in the data order the row lies that was a process's ``index``-th in the step."""
    rows, processes = int(meta["config"]["train"]["micro_rows"]), int(meta["world_size"])
    return int(meta["position"]) + index // rows * rows * processes + rank * rows + index % rows


@contextlib.contextmanager
def _watching(model: Any, seen: Looked, scale: float) -> Iterator[None]:
    """Every call site of the model reports to ``seen``; nothing is recomputed, so that each is seen once."""
    sites = list(op.call_sites(model))
    functions = [site.function for _, site in sites]
    run_block, model.run_block = model.run_block, call

    def watched(path: str, site: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            results = function(*args, **kwargs)
            key = (path, site.op.name)
            place = seen.places.setdefault(key, Place(path, site.op.name, site.backend))
            seen.output(place, args, kwargs, results, scale)
            return results

        return run

    try:
        for path, site in sites:
            site.function = watched(path, site, site.function)
        yield
    finally:
        for (_, site), function in zip(sites, functions, strict=True):
            site.function = function
        model.run_block = run_block


def _table(places: list[Place]) -> str:
    if len(places) > MOST_ROWS:
        places = _by_block(places)
    head = ("place", "op", "backend", "weights", "output", "its gradient", "weights' gradient, norm")
    rows = [
        (p.path, p.op, p.backend, str(p.weights), str(p.activations), str(p.gradients),
         f"{math.sqrt(p.square):.3g}" if p.square == p.square and p.weights.numel else "not finite" if p.weights.numel
         else "–")
        for p in places
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ["largest absolute values, in the order of the forward pass; gradients of the mean loss"]
    lines += ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
    return "\n".join(lines)


def _by_block(places: list[Place]) -> list[Place]:
    """One row for each block, and for each place outside of them."""
    found: dict[str, Place] = {}
    for p in places:
        parts = p.path.split(".")
        inside = parts[0] == "blocks"
        name = ".".join(parts[:2]) if inside else p.path
        row = found.setdefault(name, Place(name, "" if inside else p.op, "" if inside else p.backend))
        row.square += p.square
        for a, b in ((row.weights, p.weights), (row.activations, p.activations), (row.gradients, p.gradients)):
            a.largest, a.bad, a.numel = max(a.largest, b.largest), a.bad + b.bad, a.numel + b.numel
    return list(found.values())
