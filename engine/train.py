"""Training: ``main(config)`` sets up and runs the one loop: evaluate, sample, save, stop?, step, log."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import gc
import json
import math
import os
import pathlib
import shutil
import signal
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tritium.engine import allocator, bad_steps, checkpoint, compiling, metrics, moments, plan, precision, tuned
from tritium.engine.bad_steps import ROLLBACKS, BadSteps, Done, Dumps, Recent, Rollback, Seen
from tritium.engine.capture import CapturedStep, CudaGraphs
from tritium.engine.config import Config, ConfigError, data_folder, graphs_need_a_gpu
from tritium.engine.guard import WORDS
from tritium.engine.host import Ahead, garbage_at_rest
from tritium.engine.model import GPT
from tritium.engine.optim import AdamW
from tritium.engine.parallel import World
from tritium.engine.parallel import world as join_world
from tritium.engine.report import Progress, Reporter
from tritium.engine.schedule import learning_rate
from tritium.engine.step import Loss, MicroBatch, train_step
from tritium.engine.tracing import Tracer
from tritium.kernels import op
from tritium.kernels.site import Machine, interpreting

CACHE = "compile_cache.bin"  # in a run's folder: what its first step compiled


@dataclass
class Outcome:
    """How a run ended. status: "done", "interrupted" (Ctrl-C, SIGTERM; saved) or "behind" (did not beat the bigram
    model).

    bits_per_byte: model, unigram, bigram on the validation text, where known. out and checkpoint: paths.
    """

    status: str
    out: pathlib.Path
    checkpoint: pathlib.Path | None
    step: int
    val_loss: float
    bits_per_byte: dict[str, float] = field(default_factory=dict)
    sample: str = ""
    messages: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return {"done": 0, "behind": 1, "interrupted": 130}[self.status]


@dataclass
class Engine:
    """A model made ready to train: what the loop, the tests and the benchmarks step with."""

    config: Config
    model: GPT
    optimizer: AdamW
    loss: Loss
    table: list[op.Row]
    dtype: torch.dtype
    world: World
    compiled: bool
    captured: CapturedStep | None = None  # where a step is replayed from CUDA graphs

    def step(self, batches: Sequence[MicroBatch], lr: Tensor, inverse_count: Tensor) -> tuple[Tensor, Tensor]:
        """One optimizer step over this process's micro-batches: ``train_step``."""
        if self.captured is not None:
            return self.captured(batches, lr, inverse_count)
        return train_step(self.loss, self.optimizer, batches, lr, inverse_count, self.world)

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint stores, as flat names → tensors that are written in place on load."""
        state = {f"model.{k}": v for k, v in self.optimizer.master_weights().items()}
        state |= {f"optimizer.{k}": v for k, v in self.optimizer.state_dict().items()}
        return state


def build(
    config: Config,
    world: World = World(),
    *,
    compile: bool | None = None,
    machine: Machine | None = None,
    fill: bool = True,
    ready: Callable[[], object] | None = None,
) -> Engine:
    """Model, kernels, optimizer and loss for ``config`` (whose vocab_size is set) on ``world.device``; weights are
    fresh.

    compile: overrides config.train.compile. machine: what kernels are chosen for; default: the one this process runs
    on. fill: without it weights hold anything, for who restores them. ready: called before the compiler is touched, to
    wait for what may still be loading it. KernelError when a kernel choice cannot be met, ConfigError for a budget or a
    number of rows that cannot be.
    """
    if config.train.micro_rows < 1:
        raise ConfigError("train.micro_rows=0 leaves the rows to the plan: engine.plan.resolve(config, world) first")
    device = world.device
    torch.manual_seed(config.train.seed)
    with torch.device(device):
        model = GPT(config.model, documents=config.data.documents, fill=fill)
    dtype = precision.resolve(config.train.precision, device)
    if world.any(dtype == torch.float32):  # auto is measured, and all processes must compute alike
        dtype = torch.float32
    layout: str = config.train.weight_layout
    if layout == "auto" and config.optim.moments == "int8":
        layout = "out_in"  # its blocks' order
    if layout == "auto":
        layout = tuned.value("train.weight_layout", (machine or Machine.here(device)).arch, dtype, "out_in")
    precision.lay_out(model, layout)
    masters = precision.to_compute_dtype(model, dtype, head=(machine or Machine.here(device)).device == "cpu")
    optimizer = AdamW(model, config.optim, masters)
    compiled = should_compile(config, device)[0] if compile is None else compile
    table = _bind([model, optimizer], config, device, dtype, compiled, machine)
    several = config.train.batch_rows > config.train.micro_rows  # micro-batches or processes, whose gradients add up
    if is_flat(config, world.size):
        optimizer.flatten(sum_in_fp32=several)
    elif several:
        optimizer.sum_in_fp32()
    if config.train.recompute != "none":
        from tritium.engine import recompute

        t = config.train
        recompute.apply(
            model, t.recompute, t.recompute_keep, every=t.recompute_every, budget=int(t.recompute_budget_gb * 1e9),
            rows=t.micro_rows, machine=machine,
        )  # fmt: skip
    model.head.chunk = config.train.loss_chunk
    forward: Callable[..., Tensor] = model
    if ready is not None:
        ready()
    if compiled:
        forward = compiling.compiled(model, config.train.compile_scope, config.train.compile_mode)
    model.train()
    if world.rank > 0:  # the weights were drawn alike everywhere; dropout must not be
        torch.manual_seed(config.train.seed + world.rank)

    def loss(batch: MicroBatch) -> Tensor:
        return forward(batch.ids, batch.targets, batch.seq_start)

    captured = None
    if config.train.cuda_graphs == "true":
        if device.type != "cuda":
            raise ConfigError(graphs_need_a_gpu(device.type))
        captured = CapturedStep(
            loss, optimizer, world, config.train.batch_rows // (config.train.micro_rows * world.size), CudaGraphs()
        )
    return Engine(config, model, optimizer, loss, table, dtype, world, compiled, captured)


def is_flat(config: Config, processes: int) -> bool:
    """Whether storage is flat in a run of so many processes."""
    eight_bits = config.optim.moments == "int8"  # a scale for 256 elements of one parameter
    return config.train.flat == "true" or (config.train.flat == "auto" and processes > 1 and not eight_bits)


def unheeded_chunk(model: GPT, config: Config) -> str:
    """A sentence where train.loss_chunk is given and changes nothing: not every backend of the loss heeds it."""
    if not config.train.loss_chunk:
        return ""
    site = model.head.linear_cross_entropy
    if site is not None and site.bound["train"].chunks:
        return ""
    op_name = "cross_entropy" if site is None else site.op.name
    why = "model.fused_loss=false" if site is None else f"{op_name}={site.bound['train'].name}"
    fused = " with --model.fused_loss true" if site is None else ""
    return (
        f"train.loss_chunk={config.train.loss_chunk} changes nothing: {why} does not chunk by it; "
        f"use --kernels.linear_cross_entropy native on a CPU, triton on a GPU{fused}"
    )


def check_kernels(config: Config, device: torch.device) -> None:
    """KernelError when a kernel choice cannot be met: said before the data is prepared, which may take hours.

    Asks about a model without memory. Where its vocabulary is not known yet, a choice must fail for a small and for a
    large one: ``build`` asks again with the right one.
    """
    dtype = precision.resolve(config.train.precision, device)
    failures = []
    for vocab_size in [config.model.vocab_size] if config.model.vocab_size else [50257, 257]:
        holders = on_meta(config.replace(model={"vocab_size": vocab_size}), dtype)
        try:
            _bind(holders, config, device, dtype, should_compile(config, device)[0])
            return
        except op.KernelError as error:
            failures.append(error)
    raise failures[0]


def on_meta(config: Config, dtype: torch.dtype) -> list[Any]:
    """Model and optimizer of ``config`` (whose vocab_size is set) without memory, to look at their call sites."""
    with torch.device("meta"):
        model = GPT(config.model, documents=config.data.documents, fill=False)
        return [model, AdamW(model, config.optim, precision.to_compute_dtype(model, dtype))]


def _bind(
    holders: Sequence[Any],
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool,
    machine: Machine | None = None,
) -> list[op.Row]:
    return op.bind(
        holders, config.kernel_choices(), machine=machine or Machine.here(device), dtype=dtype, compiled=compiled,
        deterministic=is_deterministic(config, device),
    )  # fmt: skip


def is_deterministic(config: Config, device: torch.device) -> bool:
    return config.train.deterministic == "true" or (config.train.deterministic == "auto" and device.type == "cpu")


def should_compile(config: Config, device: torch.device) -> tuple[bool, str | None]:
    """Whether to compile, and why not when ``auto`` decides against it. ConfigError when ``true`` cannot be met."""
    if config.train.compile == "false":
        return False, None
    reason = None
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None and (device.type == "cpu" or shutil.which(os.environ.get("CC") or "gcc") is None):
        reason = f"no compiler ({compiler}) was found"
    elif not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").exists():
        reason = "Python.h is missing (Debian: apt install python3-dev)"
    if reason and config.train.compile == "true":
        raise ConfigError(
            f"train.compile=true needs a C++ compiler and Python's headers, and {reason}; install it "
            "or use --train.compile auto"
        )
    if interpreting() and config.train.compile == "auto":
        reason = "Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1), which no compiler makes faster"
    return reason is None, reason


@contextlib.contextmanager
def determinism(on: bool) -> Iterator[None]:
    """torch's deterministic algorithms for the duration, without its NaN-filling of fresh memory."""
    memory: Any = torch.utils.deterministic  # its attribute is a property that type checkers do not see
    before, fill = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = fill


@contextlib.contextmanager
def settings(config: Config, device: torch.device) -> Iterator[None]:
    """What the whole process is set to while it trains: deterministic algorithms, and on a CPU freed memory kept."""
    with determinism(is_deterministic(config, device)), allocator.freed_memory_kept(device.type == "cpu"):
        yield


class Stop:
    """Set by the first SIGINT or SIGTERM; a second one stops at once with what the last checkpoint holds."""

    def __init__(self, reporter: Reporter) -> None:
        self.asked = False
        self.reporter = reporter
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.reporter.status("stopping after this step, then saving (again to stop at once, without saving)")

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def main(config: Config, reporter: Reporter | None = None) -> Outcome:
    """Train ``config`` to its last step, resuming when its run folder holds a checkpoint.

    Raises ConfigError, KernelError, DataError, CheckpointError or BadSteps, each with a message for the user.
    """
    with join_world(config.train.device) as world:
        config.check(world.size, world.device.type)
        reporter = reporter or Reporter()
        if not world.first:
            reporter = Reporter(quiet=True)
        gc.collect()  # an earlier run's model, in a notebook: before this one's, and before the compiler is loaded
        try:
            with allocator.freed_memory_kept(world.device.type == "cpu"), plan.advising(config, world):
                return _run(config, world, reporter)
        finally:
            reporter.close()


def _run(config: Config, world: World, reporter: Reporter) -> Outcome:
    out = pathlib.Path(config.run.out or f"runs/{config.name}")
    with _alone(out) if world.first else contextlib.nullcontext():
        compiles, why_not = should_compile(config, world.device)
        if why_not:
            reporter.warn(f"not compiling: {why_not}; training runs eagerly and slower")
        cache = out / CACHE if config.train.compile_cache else None
        precision.resolve(config.train.precision, world.device)  # auto is measured: while no thread computes beside it
        with (
            compiling.forgotten(compiles),
            compiling.Beside(compiles, cache) as compiler,
            contextlib.ExitStack() as stack,
        ):

            def ready() -> None:
                compiler.wait()
                stack.enter_context(determinism(is_deterministic(config, world.device)))  # torch loads the compiler

            outcome = _prepare_and_run(config, out, world, reporter, compiler, ready)
        return outcome


@contextlib.contextmanager
def _alone(out: pathlib.Path) -> Iterator[None]:
    """The run folder for one run at a time: a second one would replace its metrics and delete its checkpoints."""
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process is training in {out} right now; two would mix their metrics and delete each other's "
                "checkpoints. Wait for it or stop it, or choose another folder with --run.out"
            ) from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                out.rmdir()  # succeeds only where nothing was written: a run that could not begin leaves no folder
    finally:
        os.close(folder)


def _prepare_and_run(
    config: Config,
    out: pathlib.Path,
    world: World,
    reporter: Reporter,
    compiler: compiling.Beside,
    ready: Callable[[], None],
) -> Outcome:
    from tritium.engine.tasks.pretraining import Pretraining

    found = _to_resume(config, out, world, reporter)
    check_kernels(config, world.device)
    reporter.status("preparing the data")
    data = prepared(config, world, reporter)
    task = Pretraining(config, data)
    config = with_vocabulary(config, task.vocab_size)
    task.config = config
    if found is not None:
        checkpoint.check_compatible(found.config, config, found.path)
        _check_data(found, task)
        if found.step > config.train.steps:
            raise ConfigError(
                f"{found.path} is at step {found.step}, beyond train.steps={config.train.steps}: there is nothing left "
                f"to train. Use --train.steps {2 * found.step}, or start a new run with --run.out OTHER_FOLDER"
            )
    if config.train.micro_rows == 0:
        ready()  # a plan traces, with modules of the compiler's
        reporter.status("planning the micro-batch")
        config, why = plan.resolve(config, world)
        task.config = config
        reporter.note(why)
    task.check()

    engine = build(config, world, fill=found is None, ready=ready)
    if (problem := compiler.wait()) is not None:
        reporter.warn(f"{problem}; compiling anew")
    parameters = sum(p.numel() for p in engine.model.parameters())
    reporter.note(
        f"{config.name}: {parameters / 1e6:.1f}M parameters, {str(engine.dtype).removeprefix('torch.')}, "
        f"{world.device.type} × {world.size}, "
        f"{'compiled' if engine.compiled else 'eager'}, {config.batch_tokens:,} tokens a step"
    )
    reporter.note(op.format_table(engine.table))
    if unheeded := unheeded_chunk(engine.model, config):
        reporter.warn(unheeded)

    step = position = tries = 0
    if found is not None:
        if config.optim.skip_outliers and "optimizer.guard.mean" not in checkpoint.contents(found):
            reporter.note(f"{found.path} knows nothing of outliers: losses and norms are collected anew")
        kind = moments.kind_of(checkpoint.contents(found))
        if kind != config.optim.moments:
            reporter.note(
                f"{found.path} has moments in {kind} and this run keeps them in {config.optim.moments}: they are "
                "converted once, to the nearest, and training is not to the bit what it would have been"
            )
        step = restore(engine, found)
        position, tries = _passed_over(out, found)
        reporter.note(f"resumed from {found.path} at step {step}")
        world.barrier()  # all have read it
        if world.first:
            for path in checkpoint.set_aside(out, found):
                reporter.note(f"set aside as {path}: it is of no use to this run and may be deleted")
    if world.first:
        out.mkdir(parents=True, exist_ok=True)
        if found is None:
            (out / Rollback.FILE).unlink(missing_ok=True)
        checkpoint.write_whole(out / "config.json", config.to_json())
        (out / "tokenizer").mkdir(exist_ok=True)
        task.tokenizer.save(out / "tokenizer")  # so that the run can be sampled from without its data
    log = metrics.MetricsFile(out / "metrics.jsonl", step) if world.first else None
    board = _tensorboard(out, step) if world.first and config.run.tensorboard else None
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(
            Stop(reporter)
        )  # from here on Ctrl-C saves; before, there is nothing to save and it just ends the run
        stack.enter_context(garbage_at_rest())
        loop = Loop(config, world, reporter, stop, engine, task, out, log, board, found is None, tries)
        stack.callback(loop.close)
        return loop.run(step, position)


@dataclass
class Loop:
    """The loop and what it needs."""

    config: Config
    world: World
    reporter: Reporter
    stop: Stop
    engine: Engine
    task: Any
    out: pathlib.Path
    log: metrics.MetricsFile | None
    board: Any
    fresh: bool = True  # the run begins here
    tries: int = 0  # rollbacks since the last checkpoint was written
    last: Progress | None = None  # what was shown last
    recent: Recent = field(default_factory=Recent)  # the steps whose loss has not been read yet
    streak: int = 0  # of bad steps, up to the last that was read
    rate: float = 0.0  # FLOP/s of a large product here, once it is measured
    batches: Ahead | None = None

    def run(self, step: int, position: int = 0) -> Outcome:
        """From ``step``, done before, to the end. position: the first row that is read."""
        c, t, world, device = self.config, self.config.train, self.world, self.world.device
        micro_batches = t.batch_rows // (t.micro_rows * world.size)
        self.flops = metrics.flops_per_token(c.model)
        lr, inverse_count = torch.zeros((), device=device), torch.full((), 1.0 / c.batch_tokens, device=device)
        self.reporter.status(
            "compiling and running the first step" if self.engine.compiled else "running the first step"
        )
        batches = Ahead(self.task.batches(position, world.rank, world.size, pin_memory=device.type == "cuda"), device)
        self.batches = batches
        tracer = self._tracer(step)
        self.dumps = Dumps(self.out, c.run.bad_steps, world, step, self.fresh, self.reporter.warn)
        guard = self.engine.optimizer.guard
        before = guard.state.clone()
        saved = None if self.fresh else step
        if t.rollback_after and self.fresh:
            self._save(step, position)  # what to go back to until there is another
            saved = step
        self.val: dict[str, float] = {}
        self.clock, self.clock_step, first = time.perf_counter(), step, step
        while True:
            last = step >= t.steps
            # asking all processes of a GPU run would make the host wait for the device in every step
            agree = world.size == 1 or device.type == "cpu" or last or step % t.log_every == 0
            stopping = agree and world.any(self.stop.asked)
            if (t.eval_every and step % t.eval_every == 0 and step > first) and not last and not stopping:
                self._report(step, step)
                self.val = self._evaluate(step, t.eval_tokens)
                self.clock, self.clock_step = time.perf_counter(), step
            if t.sample_every and step % t.sample_every == 0 and step > first and not last and not stopping:
                self._sample(step)
                self.clock, self.clock_step = time.perf_counter(), step
            if (c.run.save_every and step % c.run.save_every == 0 and step > first) and not last and not stopping:
                saved = self._save_or_warn(step, position, saved)
                self.clock, self.clock_step = time.perf_counter(), step
            if last or stopping:
                self._report(step, step)
                break
            value = learning_rate(step, t.steps, c.optim)
            lr.fill_(value)
            with tracer.step(step + 1):
                random = checkpoint.random_state(world.rank, device)
                work = [next(batches) for _ in range(micro_batches)]
                loss, norm = self.engine.step(work, lr, inverse_count)
                batches.fetch()
            step += 1
            result = torch.cat([torch.stack([loss, norm]), guard.state])  # a copy: the next step writes over them
            self.recent.add(Done(step, position, value, result, before, work, random))
            before = result[2:]
            position += t.batch_rows
            # a GPU's loss is read a step late: by then the device has long computed it, so the host does not wait
            due = step - 1 if device.type == "cuda" else step
            if due > first and (due % t.log_every == 0 or due == first + 1):
                self._report(due, step)
                gc.collect()  # what the steps left is little, and nothing waits right now
                if due == first + 1:
                    self._keep_compiled()
                self.clock, self.clock_step = time.perf_counter(), due
            if t.rollback_after and due % t.log_every == 0 and self.streak >= t.rollback_after:
                step = first = saved = self._rollback(due, position)
                before = guard.state.clone()
        batches.close()
        if last:
            tracer.finish()  # what follows is no step
        try:
            return self._finish(step, position, saved, interrupted=not last)
        finally:
            tracer.finish()  # of a stopped run, after its checkpoint: whoever stops it may not wait for a long trace

    def _tracer(self, step: int) -> Tracer:
        steps = self.config.profiled
        if steps is not None and (steps[1] <= step or steps[0] > self.config.train.steps):
            self.reporter.warn(
                f"run.profile={self.config.run.profile}: nothing is profiled, this run does the steps {step + 1} to "
                f"{self.config.train.steps}"
            )
        suffix = f".{self.world.rank}" if self.world.size > 1 else ""
        return Tracer(
            self.out / "profile", steps, self.world.device, self.reporter.note, self.reporter.warn, suffix
        )  # fmt: skip

    def _report(self, step: int, started: int) -> None:
        """Read the results of the steps up to ``step``, show and log the last of them, see to the bad ones. started:
        the last step that was given to the device.
        """
        seen = self.recent.read(step)  # waits for the device to have done this step; only then the clock
        if not seen:
            return
        now, (one, done) = time.perf_counter(), (seen[-1], seen[-1].done)
        if self.rate == 0.0:  # after the first step: it starts sooner
            self.rate = self._matmul_rate()
        seconds, count = now - self.clock, done.step - self.clock_step
        speed = count * self.config.batch_tokens / seconds if count > 0 else math.nan
        left = self.config.train.steps - done.step
        progress = Progress(
            step=done.step, steps=self.config.train.steps, loss=one.loss, val_loss=self.val.get("val_loss", math.nan),
            lr=done.lr, grad_norm=one.norm, tokens=done.step * self.config.batch_tokens, tokens_per_s=speed,
            matmul_fraction=speed * self.flops / (self.rate * self.world.size),
            eta_s=left * self.config.batch_tokens / speed if speed > 0 else math.nan,
        )  # fmt: skip
        self.last = progress
        self.reporter.progress(progress)
        values = {k: v for k, v in dataclasses.asdict(progress).items() if not (isinstance(v, float) and math.isnan(v))}
        values.pop("val_loss", None)
        self._log({"kind": "step", **values, "skipped": one.skipped})
        self.streak = one.streak
        self._bad(seen, started)

    def _matmul_rate(self) -> float:
        model, rows = self.config.model, self.config.train.micro_rows
        device = self.world.device
        return metrics.matmul_rate(
            device, self.engine.dtype, rows * model.block_size, model.n_embd, model.hidden_width,
            seconds=0.5 if device.type == "cuda" else 0.2,  # a GPU has to raise its clock
        )  # fmt: skip

    def _bad(self, seen: list[Seen], started: int) -> None:
        """Say which steps were bad, and dump the first of each streak."""
        bad = [one for one in seen if one.verdict]
        if not bad:
            return
        paths = []
        for one in bad_steps.streaks(seen):
            # skipped steps leave weights and moments alone: they are still those before it if all since were skipped
            intact = self.engine.optimizer.guard.streak.item() >= started - one.done.step + 1
            batches = one.done.batches
            if batches is None:
                batches = self._again(one.done.position)
            paths.append(self.dumps.write(one, intact, self.engine.state(), batches, self._about()))
        for one in bad:
            numbers = {k: v for k, v in (("loss", one.loss), ("grad_norm", one.norm)) if math.isfinite(v)}
            about = {"verdict": WORDS[one.verdict], "first_row": one.done.position}
            self._log({"kind": "bad", "step": one.done.step, **numbers, **about})
        which = f"step {bad[0].done.step}" + (f" and {len(bad) - 1} more up to {bad[-1].done.step}" if bad[1:] else "")
        kept = "".join(f"; look into it with: tritium replay {path}" for path in paths if path is not None)
        if seen[-1].streak >= 10 and not self.config.train.rollback_after:
            kept += f"; {seen[-1].streak} in a row, and --train.rollback_after would go back to a good checkpoint"
        self.reporter.warn(f"{which}: skipped ({bad[0]}); {bad[-1].skipped} of {seen[-1].done.step} steps so far{kept}")

    def _again(self, position: int) -> list[MicroBatch]:
        """The micro-batches of a step that began at this row, read once more."""
        t, world = self.config.train, self.world
        batches = self.task.batches(position, world.rank, world.size)
        found = [next(batches) for _ in range(t.batch_rows // (t.micro_rows * world.size))]
        batches.close()
        return found

    def _rollback(self, step: int, position: int) -> int:
        """Back to the last good checkpoint, on to the rows from ``position``; returns its step. BadSteps where that has
        not helped.
        """
        world = self.world
        span = f"steps {step - self.streak + 1} to {step} were bad, {self.streak} in a row"
        if self.tries >= ROLLBACKS:
            raise BadSteps(
                f"{span}, after {self.tries} rollbacks since the last checkpoint, each to weights that were good and "
                "on to other rows: neither the data nor one unlucky step is the cause, and nothing more would be "
                f"learned. Look at {self.out / 'bad_steps'} with `tritium replay`; then lower --optim.lr, raise "
                "--optim.warmup_steps, or choose other --kernels or --train.precision fp32"
            )
        good = []
        for path in checkpoint.candidates(self.out):
            with contextlib.suppress(checkpoint.CheckpointError):
                good.append(checkpoint.verify(path))
        if world.any(not good):
            raise BadSteps(f"{span}, and {self.out} holds no good checkpoint to go back to")
        # not to one that Ctrl-C has made: a run that was stopped and continued does what it would have done
        every = [f for f in good if not f.step % self.config.run.save_every and not f.meta.get("streak", 0)]
        good = every or good
        found = good[1 if self.tries and good[1:] else 0]  # a second time at the same place: one further back
        restore(self.engine, found)
        self.tries += 1
        back = Rollback(step, found.step, int(found.meta["position"]), position, self.tries)
        self.recent.clear()
        self.val, self.streak = {}, 0
        self.dumps.began = min(self.dumps.began, found.step)
        world.barrier()  # all have read it
        if world.first:
            back.append_to(self.out)
            for path in checkpoint.set_aside(self.out, found):
                self.reporter.note(f"set aside as {path}: what was trained from it went wrong; it may be deleted")
        if self.log is not None:
            self.log.rewind(found.step)
        if self.board is not None:
            self.board.close()
            self.board = _tensorboard(self.out, found.step)
        self._log({"kind": "rollback", "step": found.step, **dataclasses.asdict(back)})
        self.reporter.warn(
            f"{span}: back to {found.path}, passing over the rows {back.first_row} to {back.end_row - 1} of the data "
            f"order, which were read since (rollback {self.tries} of {ROLLBACKS} before the next checkpoint)"
        )
        self.clock, self.clock_step = time.perf_counter(), found.step
        return found.step

    def _keep_compiled(self) -> None:
        """Keep what the first step compiled with the run; a failure to do so is no reason to end it."""
        if not (self.engine.compiled and self.config.train.compile_cache and self.world.first):
            return
        try:
            compiling.save_cache(self.out / CACHE)
        except OSError as error:
            self.reporter.warn(
                f"what was compiled could not be kept with the run ({error}); a resumed one compiles anew"
            )

    def _log(self, values: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write(**values)
        if self.board is not None:
            for key, value in values.items():
                if isinstance(value, (int, float)) and key not in ("step", "steps"):
                    self.board.add_scalar(f"{values['kind']}/{key}", value, values["step"])

    def _evaluate(self, step: int, limit_tokens: int) -> dict[str, float]:
        result = self.task.evaluate(self.engine.model, self.world.device, limit_tokens)
        self._log({"kind": "eval", "step": step, "tokens": step * self.config.batch_tokens, **result})
        return result

    def _sample(self, step: int) -> str:
        """A sample that leaves the run's random state as it found it: sampling must not change what is learned."""
        if not self.world.first:
            return ""
        state = checkpoint.random_state(0, self.world.device)
        text = self.task.sample(self.engine.model, self.world.device, self.config.train.sample_tokens, seed=step)
        checkpoint.set_random_state(state, 0, self.world.device)
        if text:
            self.reporter.sample(step, text)
            with (self.out / "samples.txt").open("a") as file:
                file.write(f"=== step {step} ===\n{text}\n\n")
        return text

    def _about(self) -> dict[str, Any]:
        """What a checkpoint and a dump say of the run."""
        return {
            "config": dataclasses.asdict(self.config),
            "kernels": [dataclasses.asdict(row) for row in self.engine.table],
            "task": self.task.identity,
            "compiled": self.engine.compiled,
            "dtype": str(self.engine.dtype).removeprefix("torch."),
        }

    def _save(self, step: int, position: int) -> pathlib.Path:
        state = self.engine.state()
        if self.world.any(not _finite(state)):
            raise checkpoint.CheckpointError(
                f"the weights or moments of step {step} are not finite, so no checkpoint was written over good ones"
            )
        meta = {
            "step": step,
            "position": position,
            "streak": int(self.engine.optimizer.guard.streak.item()),
            **self._about(),
        }
        state |= checkpoint.random_state(self.world.rank, self.world.device)
        path = checkpoint.save(self.out, state, meta, self.world, self.config.run.keep)
        self.tries = 0
        return path

    def _save_or_warn(self, step: int, position: int, saved: int | None) -> int | None:
        """A save in the middle of a run that fails is no reason to lose the run: say so and try again at the next
        one. Nor is one made within bad steps: good ones would have to go for it, and a rollback to it would be none.
        """
        if streak := int(self.engine.optimizer.guard.streak.item()):
            self.reporter.warn(f"no checkpoint is written at step {step}: {streak} bad steps in a row")
            return saved
        try:
            self._save(step, position)
        except checkpoint.CheckpointError as error:
            self.reporter.warn(f"{error}. Training goes on; the last good checkpoint is of step {saved or 'none'}")
            return saved
        return step

    def _finish(self, step: int, position: int, saved: int | None, interrupted: bool) -> Outcome:
        c = self.config
        path = checkpoint.folder_of(self.out, step) if saved == step else self._save(step, position)
        if interrupted:
            self._plot()
            message = f"stopped at step {step} of {c.train.steps}; saved {path}; the same command continues from there"
            val_loss = self.val.get("val_loss", math.nan)
            return Outcome("interrupted", self.out, path, step, val_loss, messages=[message])
        val = self._evaluate(step, 0 if c.run.require_bigram else c.train.eval_tokens)
        if self.last is not None:  # the line that is left standing shows the model that is left, not the one before
            self.reporter.progress(dataclasses.replace(self.last, val_loss=val["val_loss"]))
        sample = self._sample(step)
        outcome = Outcome("done", self.out, path, step, val["val_loss"], {"model": val["bits_per_byte"]}, sample)
        if c.run.require_bigram:
            baselines: Any = self.world.share(self.task.baselines() if self.world.first else None)
            outcome.bits_per_byte |= baselines
            if not outcome.bits_per_byte["model"] < outcome.bits_per_byte["bigram"]:
                outcome.status = "behind"
        if self.world.first:
            (self.out / "sample.txt").write_text(sample)
        self._log({"kind": "end", "step": step, **{f"{k}_bits_per_byte": v for k, v in outcome.bits_per_byte.items()}})
        self._plot()
        return outcome

    def _plot(self) -> None:
        if self.world.first:
            from tritium.engine.plots import plot_losses

            plot_losses(self.out)

    def close(self) -> None:
        for opened in (self.log, self.board, self.batches):  # of batches a thread, which an error would leave reading
            if opened is not None:
                opened.close()


@torch.no_grad()
def _finite(state: dict[str, Tensor]) -> bool:
    """Whether every number of the weights and moments is; waits for the device."""
    tensors = [t for name, t in state.items() if not name.startswith("optimizer.guard.") and t.is_floating_point()]
    return bool(torch.isfinite(torch.stack([torch.linalg.vector_norm(t, torch.inf) for t in tensors])).all().item())


def prepared(config: Config, world: World, reporter: Reporter) -> pathlib.Path:
    """The folder of shards, prepared by the first process when it is not there yet."""
    from tritium.engine.data.prepare import is_prepared, prepare

    folder = data_folder(config)
    failure = None
    if world.first and not (config.data.folder and is_prepared(folder)):
        try:
            prepare(
                config.data.sources, folder, tokenizer=config.data.tokenizer, field=config.data.field,
                val_fraction=config.data.val_fraction, seed=config.data.seed, say=reporter.note,
            )  # fmt: skip
        except (
            BaseException
        ) as error:  # told to the other processes first, or they would wait for a barrier that never comes
            failure = error
    if world.any(failure is not None):
        raise failure or RuntimeError("preparing the data failed on the first process")
    return folder


def with_vocabulary(config: Config, vocab_size: int) -> Config:
    """The model's vocabulary from the tokenizer when left 0; ConfigError when the data's ids would not fit."""
    if config.model.vocab_size == 0:
        return config.replace(model={"vocab_size": vocab_size})
    if config.model.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the data's tokenizer, which has {vocab_size} "
            f"ids: ids beyond the table have no row. Use --model.vocab_size {vocab_size}, or 0 to take it from the data"
        )
    return config


def _to_resume(config: Config, out: pathlib.Path, world: World, reporter: Reporter) -> checkpoint.Checkpoint | None:
    if config.run.resume == "never":
        if checkpoint.candidates(out):
            raise ConfigError(
                f"run.resume=never and {out} already holds checkpoints, which a new run would mix with; "
                "choose another --run.out"
            )
        return None
    found = checkpoint.newest(out, reporter.warn)
    if found is None and config.run.resume == "must":
        raise ConfigError(
            f"run.resume=must and {out} holds no checkpoint; check --run.out, or use --run.resume auto to start one"
        )
    return found


def restore(engine: Engine, found: checkpoint.Checkpoint) -> int:
    """Load a checkpoint into the engine, random state included; returns its step.

    A process that was not there when the checkpoint was written (another number of processes) keeps its fresh random
    state.
    """
    world = engine.world
    rng = checkpoint.random_state(world.rank, world.device) if world.rank < int(found.meta["world_size"]) else {}
    state, stored = engine.state(), checkpoint.contents(found)
    for name in [name for name in state if name.startswith("optimizer.guard.") and name not in stored]:
        state.pop(name).zero_()  # of a checkpoint older than these
    moments.read(found, state | rng)
    engine.optimizer.refresh_copies()
    if rng:
        checkpoint.set_random_state(rng, world.rank, world.device)
    return found.step


def _passed_over(out: pathlib.Path, found: checkpoint.Checkpoint) -> tuple[int, int]:
    """The row at which a run continues from this checkpoint, and how many rollbacks led to it: not a row that a
    rollback, in a run that was stopped since, had passed over.
    """
    rollbacks = Rollback.read(out)
    if rollbacks and rollbacks[-1].to_step == found.step:
        return rollbacks[-1].end_row, rollbacks[-1].tries
    return int(found.meta["position"]), 0


def _check_data(found: checkpoint.Checkpoint, task: Any) -> None:
    stored, current = found.meta["task"], json.loads(json.dumps(task.identity))
    if stored != current:
        changed = [k for k in current if stored.get(k) != current[k]]
        raise ConfigError(
            f"{found.path} was trained on other data ({', '.join(changed)} differ): its token ids and sample order "
            "would mean something else. Point --data.folder at the original shards, "
            "or start a new run with --run.out OTHER_FOLDER"
        )


def _tensorboard(out: pathlib.Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
