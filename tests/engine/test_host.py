"""Batches copied ahead, in an order of streams that is asserted; garbage at rest."""

import gc
import weakref

import pytest
import torch
from tape import Streams

from tritium.engine import train
from tritium.engine.config import Config, RunConfig, TrainConfig
from tritium.engine.host import Ahead, garbage_at_rest
from tritium.engine.report import Reporter
from tritium.engine.step import MicroBatch


class Watched(MicroBatch):
    """A batch whose move is written down, with the stream it was made on."""

    def to(self, device):
        streams.log.append(f"copy {int(self.ids[0])} on {streams.current.name}")
        return super().to(device)


streams: Streams


@pytest.fixture(autouse=True)
def _streams(monkeypatch):
    global streams
    streams = Streams()
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, s: streams.log.append(f"kept for {s.name}"))


def batches(count):
    return iter([Watched(torch.tensor([i]), torch.tensor([i + 10])) for i in range(count)])


def test_the_next_batch_is_copied_on_its_own_stream_while_the_last_is_computed_with():
    ahead = Ahead(batches(3), torch.device("cpu"), streams)
    for i in range(3):
        batch = next(ahead)
        assert batch.ids.tolist() == [i] and batch.targets.tolist() == [i + 10]
        streams.log.append(f"step {i} on {streams.current.name}")
        ahead.fetch()
    with pytest.raises(StopIteration):
        next(ahead)
    kept = ["kept for main"] * 2
    assert streams.log == [
        "copy 0 on copies", "copies records 1", "main waits for 1", *kept, "step 0 on main",
        "copy 1 on copies", "copies records 2", "main waits for 2", *kept, "step 1 on main",
        "copy 2 on copies", "copies records 3", "main waits for 3", *kept, "step 2 on main",
    ]  # fmt: skip


def test_without_streams_batches_come_when_they_are_asked_for():
    ahead = Ahead(batches(2), torch.device("cpu"))
    assert next(ahead).ids.tolist() == [0]
    ahead.fetch()
    assert streams.log == ["copy 0 on main"]
    assert next(ahead).ids.tolist() == [1]


def test_garbage_is_at_rest_for_the_duration():
    collected = []
    gc.callbacks.append(lambda phase, info: collected.append(phase))
    try:
        with garbage_at_rest():
            collected.clear()
            assert gc.get_freeze_count() > 0 and not gc.isenabled()
            loops = []
            for _ in range(20000):  # far beyond the thresholds
                loop = []
                loop.append(loop)
                loops.append(loop)
            assert not collected
        assert gc.isenabled() and gc.get_freeze_count() == 0
    finally:
        gc.callbacks.pop()


def test_an_earlier_runs_model_is_gone_before_the_next_is_built(monkeypatch, tmp_path):
    """As in a notebook: models lie in cycles, and during a run no garbage is collected."""

    class Model:
        pass

    def run(*args):
        seen.append(model())

    earlier = Model()
    earlier.itself, model, seen = earlier, weakref.ref(earlier), []
    del earlier
    monkeypatch.setattr(train, "_run", run)
    gc.disable()
    try:
        train.main(Config(train=TrainConfig(device="cpu"), run=RunConfig(out=str(tmp_path))), Reporter(quiet=True))
    finally:
        gc.enable()
    assert seen == [None]
