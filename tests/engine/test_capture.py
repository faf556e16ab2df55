"""A captured step is the step: on the CPU, with tapes of operators for CUDA graphs (tests/engine/tape.py)."""

import copy

import pytest
import torch
from tape import Tape, Tapes

from tritium.engine import capture, train
from tritium.engine.capture import WARM_UP, CapturedStep
from tritium.engine.config import Config, ConfigError, DataConfig, GPTConfig, OptimConfig, TrainConfig
from tritium.engine.parallel import World
from tritium.engine.report import Reporter
from tritium.engine.step import MicroBatch, train_step

STEPS = WARM_UP + 4


class UndoingTapes(Tapes):
    """Tapes whose recording leaves no trace in ``tensors``: a CUDA graph's runs nothing."""

    def __init__(self, tensors):
        super().__init__()
        self.tensors = tensors

    def capture(self, function):
        before, rng = [t.clone() for t in self.tensors], torch.get_rng_state()
        replay = super().capture(function)
        with torch.no_grad():
            for tensor, value in zip(self.tensors, before, strict=True):
                tensor.copy_(value)
        torch.set_rng_state(rng)
        return replay


class TwoAlike(World):
    """Two processes with the same rows: what they sum is twice what one has."""

    def sum_(self, tensors):
        for tensor in tensors:
            tensor.mul_(2.0)


def config(
    micro_batches: int, precision: str = "fp32", flat: str = "false", documents: bool = False, **model
) -> Config:
    return Config(
        name="small",
        model=GPTConfig(vocab_size=61, vocab_multiple=4, block_size=16, n_layer=2, n_head=2, n_embd=24, **model),
        train=TrainConfig(
            batch_rows=2 * micro_batches,
            micro_rows=2,
            compile="false",
            precision=precision,
            deterministic="true",
            flat=flat,
        ),
        data=DataConfig(documents=documents),
        optim=OptimConfig(skip_outliers=6.0),  # so that losses and norms are in the state that is compared
    )


def run(captured: bool, micro_batches: int, precision: str = "fp32", last: bool = True, world=World(), **model):
    """Losses, norms and weights of some steps with changing rates, batches, documents and numbers of targets; and the
    log.

    last: whether the last step is captured too.
    """
    c = config(micro_batches, precision, **model)
    torch.manual_seed(0)
    data = torch.randint(61, (STEPS, micro_batches, 2, 17))
    with train.settings(c, torch.device("cpu")):
        engine = train.build(c)
        lr, inverse_count = torch.zeros(()), torch.zeros(())
        model_tensors = [*engine.model.parameters(), *engine.state().values()]
        graphs = UndoingTapes(model_tensors)
        step = CapturedStep(engine.loss, engine.optimizer, world, micro_batches, graphs)
        results, given = [], []
        torch.manual_seed(1)
        for i in range(STEPS):
            start = (torch.arange(16).expand(2, 16) // (i + 2) * (i + 2)).to(torch.int32) if c.data.documents else None
            batches = [MicroBatch(rows[:, :-1].clone(), rows[:, 1:].clone(), start) for rows in data[i]]
            if i % 2:
                batches[0].targets[0, :5] = -100
            given += [(t, t.clone()) for b in batches for t in (b.ids, b.targets, b.seq_start) if t is not None]
            lr.fill_(1e-3 * (i + 1))
            inverse_count.fill_(1.0 / sum(int((b.targets >= 0).sum()) for b in batches))
            if captured and (last or i < STEPS - 1):
                results.append(step(batches, lr, inverse_count))
            else:
                results.append(train_step(engine.loss, engine.optimizer, batches, lr, inverse_count, world))
        state = {k: v.clone() for k, v in engine.state().items()}
    assert all(torch.equal(t, as_it_was) for t, as_it_was in given)  # a bad step's batch is kept, to be dumped
    return results, state, graphs.log


@pytest.mark.parametrize(
    ("micro_batches", "precision", "model"),
    [(1, "fp32", {}), (3, "fp32", {}), (1, "bf16", {}), (2, "bf16", {}), (2, "fp32", {"dropout": 0.2}),
     (1, "bf16", {"flat": "true"}), (3, "bf16", {"flat": "true"}), (2, "fp32", {"documents": True}),
     (1, "fp32", {"world": TwoAlike(0, 2)}), (2, "bf16", {"world": TwoAlike(0, 2)})],
)  # fmt: skip
def test_a_captured_step_is_the_step(micro_batches, precision, model):
    plain, plain_state, _ = run(False, micro_batches, precision, **model)
    ours, state, log = run(True, micro_batches, precision, **model)
    for a, b in zip(plain, ours, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)
    assert len({loss.item() for loss, _ in ours}) == STEPS  # and none was written over by the next
    for name, value in plain_state.items():
        assert torch.equal(value, state[name]), name
    graphs = min(micro_batches, 2) + (micro_batches > 1 or "world" in model)
    further = ["replay 1"] * (micro_batches - 1)
    replays = ["replay 0"] if graphs == 1 else ["replay 0", *further, f"replay {graphs - 1}"]
    assert log == ["warm"] * WARM_UP + [f"capture {i}" for i in range(graphs)] + replays * (STEPS - WARM_UP)


FAULTS = {
    "the learning rate stays as captured": ("self.lr.copy_(lr)", "pass"),
    "so does the number of targets": ("self.inverse_count.copy_(inverse_count)", "pass"),
    "the batch stays as captured": ("self._put(batch)", "pass"),
    "the update comes before the last micro-batch": (
        "for i, batch in", "self.replay[-1]()\n    for i, batch in"),
    "a further micro-batch is taken for the first": ("min(i, 1)", "0"),
    "the first micro-batch adds to the step before's": ("min(i, 1)", "1"),
    "what is returned is written over": ("self.mean.clone(), self.norm.clone()", "self.mean, self.norm"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault, monkeypatch):
    import inspect
    import textwrap

    before, after = FAULTS[fault]
    source = textwrap.dedent(inspect.getsource(CapturedStep.__call__))
    assert before in source
    names = {}
    exec(source.replace(before, after), vars(capture), names)
    monkeypatch.setattr(CapturedStep, "__call__", names["__call__"])
    with pytest.raises((AssertionError, AttributeError)):
        test_a_captured_step_is_the_step(2, "fp32", {})


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_that_is_not_replayed_begins_with_no_gradients_of_the_graphs(micro_batches):
    plain, plain_state, _ = run(False, micro_batches, "bf16")
    ours, state, _ = run(True, micro_batches, "bf16", last=False)
    assert torch.equal(plain[-1][1], ours[-1][1])
    assert all(torch.equal(value, state[name]) for name, value in plain_state.items())


def test_another_shape_or_number_of_micro_batches_is_an_error():
    c = config(1)
    engine = train.build(c)
    step = CapturedStep(engine.loss, engine.optimizer, World(), 1, Tapes())
    lr, inverse_count = torch.tensor(1e-3), torch.tensor(1 / 32)

    def batch(rows):
        return MicroBatch(torch.zeros(rows, 16, dtype=torch.int64), torch.zeros(rows, 16, dtype=torch.int64))

    with pytest.raises(ValueError, match=r"has 1 micro-batch\(es\) and was given 2"):
        step([batch(2), batch(2)], lr, inverse_count)
    for _ in range(WARM_UP + 1):
        step([batch(2)], lr, inverse_count)
    with pytest.raises(ValueError, match=r"of shape \(2, 16\) and was given \(3, 16\)"):
        step([batch(3)], lr, inverse_count)


def test_cuda_graphs_need_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    c = config(1).replace(train={"cuda_graphs": "true"})
    refused = "captures the work of a GPU and this run is on cpu"
    with pytest.raises(ConfigError, match=refused):
        train.build(c)
    # said before anything is done, also where only torch knows what device=auto comes to
    assert c.problems() == [] and refused in c.problems(device="cpu")[0]
    assert refused in c.replace(train={"device": "cpu"}).problems()[0]
    assert c.problems(device="cuda") == []
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match=refused):
        train.main(c.replace(train={"cuda_graphs": "true"}, run={"out": str(out)}), Reporter(quiet=True))
    assert not out.exists()
    c = c.replace(train={"recompute": "full"}, model={"dropout": 0.1})
    assert any("must draw the same random numbers" in problem for problem in c.problems())


def test_cuda_graphs_are_captured_on_the_stream_that_warmed_up(monkeypatch):
    """The order of torch.cuda's calls, on a stand-in for it."""
    log = []

    class Stream:
        count = 0

        def __init__(self):
            Stream.count += 1
            self.name = f"stream {Stream.count}"

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    main = Stream()

    class Using:
        def __init__(self, what):
            self.what = what

        def __enter__(self):
            log.append(f"enter {self.what}")

        def __exit__(self, *exc):
            log.append(f"leave {self.what}")

    class Graph:
        def replay(self):
            log.append("replay")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: Using(s.name))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda g, pool, stream: Using(f"graph in {pool} on {stream.name}"))
    graphs = capture.CudaGraphs()
    with graphs.warming():
        log.append("work")
    graphs.capture(lambda: log.append("work"))()
    assert log == [
        "stream 2 waits for stream 1", "enter stream 2", "work", "leave stream 2", "stream 1 waits for stream 2",
        "enter graph in pool on stream 2", "work", "leave graph in pool on stream 2", "replay",
    ]  # fmt: skip


def test_the_tape_sees_what_the_host_decided():
    """The tape itself: a number that the host read while recording stays as it was."""
    x, y = torch.ones(3), torch.zeros(3)
    tape = Tape()
    with tape:
        y.copy_(x * 2 + copy.copy(x[0].item()))
    x.fill_(5.0)
    tape.replay()
    assert y.tolist() == [11.0] * 3
