"""No host synchronisation: whole steps and the training loop on a fake H100, and every Triton launcher on meta tensors.

tests/engine/test_syncs.py has what the mode sees, and faults planted in clip, update and step on CPU tensors.
"""

from __future__ import annotations

import contextlib
import inspect
import textwrap
from collections.abc import Sequence
from unittest import mock

import pytest
import torch
from fake_gpu import DEVICE, MODELS, B, T, batch, build, layers, present, scalars, serving
from torch.utils._python_dispatch import TorchDispatchMode

from tritium.engine import host, metrics, syncs, train
from tritium.engine.guard import Guard
from tritium.engine.optim import AdamW
from tritium.engine.parallel import World
from tritium.engine.report import Reporter
from tritium.engine.step import MicroBatch, train_step
from tritium.engine.train import Loop, Outcome
from tritium.kernels import aot, autograd, ops
from tritium.kernels.case import Case
from tritium.kernels.contract import site_of
from tritium.kernels.layer_norm import impl_triton as layer_norm
from tritium.kernels.site import Machine


def planted(function, before: str, after: str):
    """The function with ``before`` replaced in its source; its file and lines stay, so that messages name them."""
    function = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(function))
    assert before in source, f"{function.__qualname__} no longer holds {before!r}"
    code = "\n" * (function.__code__.co_firstlineno - 1) + source.replace(before, after)
    names: dict[str, object] = {}
    exec(compile(code, inspect.getsourcefile(function), "exec"), function.__globals__, names)
    return names[function.__name__]


class Answers(TorchDispatchMode):
    """A fake tensor that is read, where that is allowed, is zero: the steps were good."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return 0.0 if function is torch.ops.aten._local_scalar_dense.default else function(*args, **(kwargs or {}))


# ------------------------------------------------------------------------------------------------------- whole steps


@pytest.mark.parametrize("model", MODELS)
def test_a_whole_step_waits_for_nothing(model):
    """Loss, backward, clip, update: with each backend that serves the model outside of a graph."""
    config = layers(MODELS[model], 1)
    table = serving(config, compiled=False)
    able = {op: [name for name, why in known.items() if why is None] for op, known in table.items()}
    for n in range(max(len(names) for names in able.values()) if model == "gpt2" else 2):
        with present():
            engine = build(config, {op: names[-1 - n % len(names)] for op, names in able.items()})
            data, (lr, inverse_count) = batch(config), scalars()
            with syncs.forbidden() as seen:
                train_step(engine.loss, engine.optimizer, [data, data], lr, inverse_count)
    assert not seen


# ---------------------------------------------------------------------------------------------------------- the loop


class Task:
    """Batches on the host, as the loader gives them: to be copied without waiting."""

    identity: dict[str, str] = {}

    def batches(self, *args: object, **kwargs: object):
        def forever():
            while True:
                yield MicroBatch(*(torch.zeros(B, T, dtype=torch.int64) for _ in range(2)))

        return forever()


class Reads(Reporter):
    """Steps shown, with how many had been started by then."""

    def __init__(self):
        super().__init__(quiet=True)
        self.shown: list[tuple[int, int]] = []
        self.started = 0

    def progress(self, p):
        self.shown.append((p.step, self.started))


class Streams:
    """torch.cuda's streams, which a build for the CPU lacks, as far as engine/host.py uses them."""

    def Stream(self):
        return mock.Mock(spec=["record_event"])

    def current_stream(self):
        return mock.Mock(spec=["wait_event"])

    def stream(self, stream):
        return contextlib.nullcontext()


def run_loop(monkeypatch, tmp_path, steps: int, log_every: int) -> tuple[list[str], list[tuple[int, int]]]:
    """The host's reads, and (step shown, steps started before that), of the loop on the fake GPU."""
    config = layers(MODELS["gpt2"], 1).replace(
        train={"steps": steps, "log_every": log_every, "eval_every": 0, "batch_rows": 2 * B},
        run={"save_every": 0, "tensorboard": False},
    )
    reporter = Reads()
    monkeypatch.setattr(metrics, "matmul_rate", lambda *args, **kwargs: 1.0)
    monkeypatch.setattr(Loop, "_finish", lambda self, step, *rest, **k: Outcome("done", tmp_path, None, step, 0.0))
    original = train.train_step

    def counted(*args):
        reporter.started += 1
        return original(*args)

    monkeypatch.setattr(train, "train_step", counted)
    monkeypatch.setattr(train, "Ahead", lambda batches, device: host.Ahead(batches, device, Streams()))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    with present():
        engine = build(config)
        log = metrics.MetricsFile(tmp_path / "metrics.jsonl", 0)
        loop = Loop(
            engine.config, World(device=DEVICE), reporter, train.Stop(reporter), engine, Task(), tmp_path, log, None
        )
        with Answers(), syncs.forbidden(allow=[Loop._report]) as seen:
            outcome = loop.run(0)
        log.close()
    assert outcome.step == steps
    assert len(metrics.read_metrics(tmp_path / "metrics.jsonl")) == len(reporter.shown)
    return seen, reporter.shown


def test_the_loop_waits_only_where_it_logs_and_a_step_late(monkeypatch, tmp_path):
    seen, shown = run_loop(monkeypatch, tmp_path, steps=6, log_every=2)
    # each is read when the next has been started, except the last
    assert shown == [(1, 2), (2, 3), (4, 5), (6, 6)]
    # of each step since: loss, gradient norm, verdict, bad steps in a row and in all; on a real GPU in one copy
    assert len(seen) == 5 * 6
    assert all(line.startswith("aten._local_scalar_dense.default at engine/bad_steps.py:") for line in seen)


@pytest.mark.parametrize(
    ("function", "before", "after", "place"),
    [
        ("run", "step += 1", "step += 1; loss.item()", "engine/train.py"),
        ("run", "step += 1", "step += 1; torch.cuda.synchronize()", "engine/train.py"),
        ("run", "batches.fetch()", "batches.fetch(); work[0].ids.cpu()", "engine/train.py"),
        ("run", "position += t.batch_rows", "position += int(guard.streak)", "engine/train.py"),
        ("_log", "if self.log is not None:", "if self.engine.optimizer.guard.skipped.item() >= 0:", "engine/train.py"),
    ],
    ids=["loss", "synchronize", "batch", "streak", "logger"],
)
def test_planted_in_the_loop(monkeypatch, tmp_path, function, before, after, place):
    monkeypatch.setattr(Loop, function, planted(getattr(Loop, function), before, after))
    if function == "_log":  # allowed from where it is called: what it reads is more than is allowed
        seen, _ = run_loop(monkeypatch, tmp_path, steps=2, log_every=1)
        assert len(seen) > 5 * 2
        return
    with pytest.raises(syncs.HostSync, match=rf"at {place}:\d+ "):
        run_loop(monkeypatch, tmp_path, steps=2, log_every=1)


@pytest.mark.parametrize(
    ("owner", "function", "before", "after", "place"),
    [
        (AdamW, "step", "* inverse_count\n", "* inverse_count; norm.item()\n", "optim"),
        (Guard, "judge", "self.skipped += bad", "self.skipped += bad if bad > 0 else 0", "guard"),
    ],
    ids=["clip", "guard"],
)
def test_planted_in_the_update(monkeypatch, owner, function, before, after, place):
    monkeypatch.setattr(owner, function, planted(getattr(owner, function), before, after))
    config = layers(MODELS["gpt2"], 1)
    with present():
        engine = build(config)
        data, (lr, inverse_count) = batch(config), scalars()
        with pytest.raises(syncs.HostSync, match=rf"engine/{place}\.py:\d+"), syncs.forbidden():
            train_step(engine.loss, engine.optimizer, [data], lr, inverse_count)


# --------------------------------------------------------------------------------------------------------- launchers

WITH_TRITON = [name for name, op in ops.OPS.items() if "triton" in op.backends()]


def varied(cases: Sequence[Case]) -> list[Case]:
    """The first case, and each that brings a value of an option, or an empty axis, that those before it do not."""
    seen: set[object] = set()
    found = []
    for case in cases:
        facts = {*case.options.items(), case.large, 0 in case.shape.values()}
        if not facts <= seen:
            found.append(case)
            seen |= facts
    return found


def launch(name: str, dtype: torch.dtype = torch.bfloat16) -> int:
    """Run the eager path of an op in varied cases, forward and backward, on meta tensors; the number of launches."""
    op = ops.OPS[name]
    backend = op.load("triton")
    with aot.compiling_for("sm_90", compile=False) as launched:
        for case in varied(op.cases.CASES):
            assert backend.unsupported(site_of(op, case, dtype, Machine("cuda", "sm_90"))) is None, case
            arguments = aot.meta_inputs(op, case, dtype)
            with syncs.forbidden(device="meta"):
                results = backend.function(**arguments)
                results = results if isinstance(results, tuple) else (results,)
                wanted = [a for a in arguments.values() if isinstance(a, torch.Tensor) and a.requires_grad]
                results = [r for r in results if isinstance(r, torch.Tensor) and r.requires_grad]
                if results and wanted:
                    torch.autograd.grad(results, wanted, [torch.empty_like(r) for r in results], allow_unused=True)
    return len(launched)


@pytest.mark.parametrize("name", WITH_TRITON)
def test_launchers_wait_for_nothing(name):
    """Of every op with a Triton backend: the path of eager training, not the fakes'."""
    op = ops.OPS[name]
    filled = sum(0 not in case.shape.values() for case in varied(op.cases.CASES))
    assert launch(name) >= filled * (2 if op.has_gradient else 1)


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_planted_in_a_launcher(monkeypatch, which):
    """The launchers are really seen."""
    cell = closure(closure(layer_norm._layer_norm)["apply"].cell_contents.__self__.__dict__[which].__func__)[which]
    launcher = cell.cell_contents

    def looks(first, *rest):
        bool(first.sum() > 0)
        return launcher(first, *rest)

    monkeypatch.setattr(cell, "cell_contents", looks)
    with pytest.raises(syncs.HostSync):
        launch("layer_norm")


def closure(function) -> dict[str, object]:
    return dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))


def test_the_launchers_path_is_the_eager_one():
    """Without the mode's word the library boundary would stand between, and its fakes would run instead."""
    with mock.patch.object(autograd, "bypass", return_value=False):
        assert launch("layer_norm") == 0
