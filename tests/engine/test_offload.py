"""What blocks keep, in the host's memory: the same losses and gradients, in an order of streams that is asserted."""

import dataclasses
import functools
import weakref

import pytest
import torch
from tape import Streams
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tritium.engine import compiling, offload, recompute, train
from tritium.engine.config import Config, ConfigError, TrainConfig
from tritium.engine.model import GPT, GPTConfig, call
from tritium.kernels import op
from tritium.kernels.site import Machine

T, LAYERS = 16, 5
SMALL = GPTConfig(vocab_size=61, vocab_multiple=16, block_size=T, n_layer=LAYERS, n_head=4, n_embd=32, init_std=0.2)
MODELS = {
    "gpt2": SMALL,
    "llama": dataclasses.replace(SMALL, position="rope", norm="rms_norm", activation="swiglu", n_kv_head=2, bias=False),
    "dropout": dataclasses.replace(SMALL, dropout=0.3),
}
IDS, TARGETS = torch.randint(61, (2, 4, T), generator=torch.Generator().manual_seed(0))
H100 = Machine("cuda", "sm_90", packages={})


@pytest.fixture(autouse=True)
def _small_storages_too(monkeypatch):
    monkeypatch.setattr(offload, "LEAST", 256)


def build(config: GPTConfig = SMALL, streams=None, stay: int = 2, **options) -> GPT:
    """A model; streams: with its results offloaded, as far as a CPU can, on these."""
    torch.manual_seed(0)
    model = GPT(config)
    op.bind(model, "auto")
    if streams is not None:
        plain = functools.partial(torch.empty, dtype=torch.uint8)
        model.run_block = offload.Offloaded(model, [call] * LAYERS, stay, streams, options.pop("place", plain))
    return model


def step(model, forward=None) -> list[torch.Tensor]:
    torch.manual_seed(7)
    loss = (model if forward is None else forward)(IDS, TARGETS)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


class Alive(TorchDispatchMode):
    """Bytes of the storages made inside that are still there."""

    def __init__(self):
        super().__init__()
        self.bytes, self.seen = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return results

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.bytes -= size


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_losses_and_gradients_are_the_same_bit_for_bit(config):
    expected = step(build(config))
    model = build(config, Streams())
    for _ in range(2):  # the second time in the host's memory of the first
        for a, b in zip(step(model), expected, strict=True):
            assert torch.equal(a, b)
    assert model.run_block.moved_bytes > 0


ORDER = [
    # forward: each block's copy begins when its work has been handed over, and blocks the one after the next at most
    "main records 1", "copies waits for 1", "copies records 2",
    "main records 3", "copies waits for 3", "copies records 4",
    "main waits for 2", "main records 5", "copies waits for 5", "copies records 6",
    "main waits for 4", "main waits for 6",
    # backward: block 3, which stayed, asks for those of block 2; then each asks for those before it
    "main records 7", "copies waits for 7", "copies records 8",
    "main waits for 8", "main records 9", "copies waits for 9", "copies records 10",
    "main waits for 10", "main records 11", "copies waits for 11", "copies records 12",
    "main waits for 12",
]  # fmt: skip


def order_of(model: GPT, streams: Streams) -> list[str]:
    streams.log.clear()
    streams.events = 0
    step(model)
    return list(streams.log)


def test_copies_run_on_their_own_stream_a_block_ahead():
    streams = Streams()
    assert order_of(build(streams=streams), streams) == ORDER


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("_let_go", lambda plain: lambda self, layer: None),  # what was copied is never freed, and never waited for
        ("_beside", lambda plain: lambda self: self.streams.stream(self.stream)),  # a copy that waits for nothing
        ("_fetch", lambda plain: lambda self, layer: plain(self, layer - 1)),  # two blocks ahead
    ],
)
def test_another_order_is_seen(method, change, monkeypatch):
    streams = Streams()
    model = build(streams=streams)
    monkeypatch.setattr(offload.Offloaded, method, change(getattr(offload.Offloaded, method)))
    try:
        found = order_of(model, streams)
    except (RuntimeError, AssertionError):
        return
    assert found != ORDER


def test_what_is_copied_is_what_comes_back(monkeypatch):
    """The planted fault: a copy to the host that does not happen."""
    expected = step(build())
    model = build(streams=Streams(), place=lambda size: torch.zeros(size, dtype=torch.uint8))
    copy = torch.Tensor.copy_
    lost = []

    def forgets(self, source, non_blocking=False):
        if self.dtype == torch.uint8 and non_blocking and not lost:
            lost.append(self)
            return self
        return copy(self, source, non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", forgets)
    found = step(model)
    assert lost and torch.equal(found[0], expected[0])
    assert any(not torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("stay", [2, 4])
def test_the_device_is_left_by_what_is_on_the_host(stay):
    """After forward, to the byte; after backward nothing but what is there without."""
    alive, after = {}, {}
    for streams in (None, Streams()):
        model = build(streams=streams, stay=stay, place=functools.partial(torch.empty, dtype=torch.uint8))
        torch.manual_seed(7)
        with Alive() as mode:
            mode.seen |= {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}  # made before
            loss = model(IDS, TARGETS)
            alive[streams is not None] = mode.bytes
            if streams is not None:
                run = model.run_block
                assert run.host_bytes == run.moved_bytes > 0
                alive[True] -= run.host_bytes
                assert alive[False] - alive[True] == run.moved_bytes
                assert all(e.flat is None for s in run.saved.values() for e in s.entries.values())
                assert [s.layer for s in run.saved.values() if s.entries] == list(range(LAYERS - stay))
            loss.backward()
            loss = None
            after[streams is not None] = mode.bytes - (model.run_block.host_bytes if streams is not None else 0)
    assert after[True] == after[False]


def test_the_hosts_memory_is_used_again_and_given_back_after_an_unused_forward():
    places = []

    def place(size):
        places.append(size)
        return torch.empty(size, dtype=torch.uint8)

    model = build(streams=Streams(), place=place)
    step(model)
    first = len(places)
    step(model)
    model(IDS, TARGETS)  # no backward
    step(model)
    assert len(places) == first and sum(places) == model.run_block.host_bytes
    with torch.no_grad():
        model(IDS, TARGETS)
    model.eval()
    model(IDS, TARGETS)
    assert len(places) == first


def test_a_second_backward_is_refused():
    model = build(streams=Streams())
    loss = model(IDS, TARGETS)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once for each forward, and this is a second one"):
        loss.backward()


def test_blocks_compiled_one_by_one(monkeypatch):
    """The same graph for all blocks, the hooks around it; to the bit what the same compiler makes without."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    plain = build()
    expected = step(plain, compiling._Parts(plain, None))
    streams = Streams()
    model = build(streams=streams)
    parts = compiling._Parts(model, None)
    for a, b in zip(step(model, parts), expected, strict=True):
        assert torch.equal(a, b)
    assert isinstance(parts.parts["run_block"], offload.Offloaded)
    assert parts.parts["run_block"].moved_bytes > 0 and streams.log == ORDER


def test_settings_that_cannot_be_are_refused_with_a_remedy():
    with pytest.raises(ConfigError, match="this run is on cpu, whose memory is the host's.*recompute full"):
        recompute.apply(build(), "offload")
    with pytest.raises(ConfigError, match="leaves the last 2 blocks on the device and this model has 2"):
        recompute.apply(GPT(dataclasses.replace(SMALL, n_layer=2)), "offload", machine=H100)
    config = Config(train=TrainConfig(recompute="offload", compile_scope="model"))
    with pytest.raises(ConfigError, match="compiled as one graph has inside of it; use --train.compile_scope block"):
        config.check()
    config.replace(train={"compile_scope": "block"}).check()
    config.replace(train={"compile": "false"}).check()
    with pytest.raises(ConfigError, match="captured step have never been tried"):
        config.replace(train={"compile": "false", "cuda_graphs": "true"}).check()


def test_a_budget_lets_the_last_blocks_stay():
    model = build()
    most = recompute.look_at(model, len(IDS), H100).most
    for budget, stay in ((0, 2), (most, 2), (3 * most, 3), (4 * most + 1, 4)):
        recompute.apply(model, "offload", budget=budget, rows=len(IDS), machine=H100)
        assert model.run_block.stay == stay
    config = Config(model=SMALL, train=TrainConfig(batch_rows=4, micro_rows=4, recompute="offload", compile="false",
                                                   device="cpu", precision="fp32"))  # fmt: skip
    with pytest.raises(ConfigError, match="this run is on cpu"):
        train.build(config)
