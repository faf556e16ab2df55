"""Compiled as one graph or block by block: the same training; and what was compiled, kept with a run."""

import json
import os
import pathlib
import subprocess
import sys
import threading

import pytest
import torch

from tritium.engine import checkpoint, compiling, train
from tritium.engine.config import Config, GPTConfig, TrainConfig
from tritium.engine.step import MicroBatch, train_step
from tritium.kernels import op


def config(scope: str = "model", compile: str = "true", layers: int = 3, **train) -> Config:
    return Config(
        name="small",
        model=GPTConfig(vocab_size=61, vocab_multiple=4, block_size=16, n_layer=layers, n_head=2, n_embd=24),
        train=TrainConfig(batch_rows=2, micro_rows=2, compile=compile, precision="fp32", compile_scope=scope, **train),
    )


def losses(c: Config, steps: int = 3) -> tuple[list[float], list[float], train.Engine]:
    torch.manual_seed(0)
    data = torch.randint(61, (steps, 2, 17))
    with train.settings(c, torch.device("cpu")):
        engine = train.build(c)
        lr, inverse_count = torch.tensor(1e-2), torch.tensor(1 / 32)
        found = [
            train_step(engine.loss, engine.optimizer, [MicroBatch(x[:, :-1], x[:, 1:])], lr, inverse_count)
            for x in data
        ]
    return [loss.item() for loss, _ in found], [norm.item() for _, norm in found], engine


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


BUDGET = 27e-6  # GB: of three blocks the last one or two keep a result that the first computes again


@pytest.mark.parametrize(("recompute", "graphs"), [("none", 3), ("selective", 3), ("every", 4), ("budget", 4)])
def test_blocks_compiled_one_by_one_train_alike_and_share_their_graph(recompute, graphs):
    plain, plain_norms, _ = losses(config(compile="false"))
    torch._dynamo.utils.counters.clear()
    ours, norms, engine = losses(config("block", recompute=recompute, recompute_budget_gb=BUDGET))
    assert ours == pytest.approx(plain, rel=2e-6) and norms == pytest.approx(plain_norms, rel=2e-5)
    # the embedding, the block (of three; of every way to run one), the norm and head: no graph more
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert not torch._dynamo.utils.counters["graph_break"]
    # outside of a training pass the model is as it was
    assert "embed" not in vars(engine.model) and "finish" not in vars(engine.model)
    engine.model(torch.zeros(1, 5, dtype=torch.int64))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_a_failed_pass_leaves_the_model_as_it_was():
    engine = train.build(config("block"))
    before = engine.model.run_block
    with pytest.raises(Exception, match="block_size"):
        engine.loss(MicroBatch(torch.zeros(1, 17, dtype=torch.int64), torch.zeros(1, 17, dtype=torch.int64)))
    assert engine.model.run_block is before and "embed" not in vars(engine.model)


# ------------------------------------------------------------------------------------------------- what a run keeps

PROGRAM = """
import json, os, pathlib, sys, time
import torch
from test_compiling import config, losses
from tritium.engine import compiling
from torch._inductor import codecache
path, cache = pathlib.Path(sys.argv[1]), pathlib.Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
libraries = lambda: {str(file): file.stat().st_mtime_ns for file in cache.rglob("*.so")}
loaded = compiling.load_cache(path)
before = libraries()
values, _, engine = losses(config(layers=1, recompute="selective"))
counters = torch._dynamo.utils.counters
written = compiling.save_cache(path) if not loaded else 0
print(json.dumps({"loaded": loaded, "losses": values, "written": written,
    "compiled": len(set(libraries().items()) - set(before.items())),
    "headers": codecache._precompile_header.cache_info().currsize, **{
    name: counters[group][name] for group, name in (
        ("inductor", "fxgraph_cache_miss"), ("inductor", "fxgraph_cache_hit"),
        ("aot_autograd", "autograd_cache_miss"), ("aot_autograd", "autograd_cache_hit"),
        ("aot_autograd", "autograd_cache_bypass"))}}))
"""


def start(path, cache):
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(pathlib.Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, str(path)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_was_compiled_serves_another_process_with_an_empty_cache(tmp_path):
    """With a policy of recomputing that is a function of ours."""
    path = tmp_path / "compile_cache.bin"
    cold = start(path, tmp_path / "one")
    assert cold["written"] > 1000 and not cold["loaded"] and cold["fxgraph_cache_miss"] > 0
    assert cold["autograd_cache_bypass"] == 0 and cold["compiled"] > 0 and cold["headers"] > 0
    warm = start(path, tmp_path / "two")
    assert warm["loaded"] and warm["losses"] == cold["losses"]
    assert warm["fxgraph_cache_miss"] == 0 and warm["autograd_cache_miss"] == 0 and warm["autograd_cache_hit"] > 0
    assert warm["autograd_cache_bypass"] == 0
    assert warm["compiled"] == 0 and warm["headers"] == 0  # no library, nor what it would be compiled with


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """(what a run has kept, a library that is in it and not in the cache, what of torch's was loaded from it)"""
    path = tmp_path / "run" / "compile_cache.bin"
    path.parent.mkdir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert not compiling.load_cache(path)
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"artifacts" * 100, None))
    library = tmp_path / "cache" / "ab" / "cab.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"library")
    library.with_suffix(".cpp").write_text("void __avx_chk_kernel() {}")
    assert compiling.save_cache(path) == path.stat().st_size
    read = []
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda content: read.append(content) or object())
    library.unlink()
    return path, library, read


def test_processes_that_load_at_once_do_not_take_each_others_files(kept, monkeypatch):
    path, library, read = kept
    write, inner = checkpoint._write, []

    def written(temporary, content):
        write(temporary, content)
        if not inner:  # another process of the run does the same, before this one's file is in place
            inner.append(True)
            assert compiling.load_cache(path)

    monkeypatch.setattr(checkpoint, "_write", written)
    assert compiling.load_cache(path) and len(read) == 2
    assert [file.name for file in library.parent.iterdir() if file.suffix != ".cpp"] == [library.name]
    assert library.read_bytes() == b"library"


def test_what_is_damaged_is_named_and_of_another_machine_not_used(kept, monkeypatch):
    path, library, read = kept
    assert compiling.load_cache(path) and read == [b"artifacts" * 100] and library.read_bytes() == b"library"
    with monkeypatch.context() as other:
        other.setattr(compiling, "machine", lambda: "another")
        assert not compiling.load_cache(path)
    whole = path.read_bytes()
    middle = whole.index(b"artifacts") + 20
    for damaged in (whole[:-1], whole[:50], whole[:middle] + b"?????" + whole[middle + 5 :], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"compile_cache.bin is damaged"):
            compiling.load_cache(path)
    assert len(read) == 1


def test_no_flipped_bit_ends_a_start(kept):
    """In the table at a zip's end, which no checksum holds: another method, version, name, a password."""
    path, _, read = kept
    whole = path.read_bytes()
    names = set()
    for i in range(8 * whole.index(b"PK\x01\x02"), 8 * len(whole)):
        flipped = bytearray(whole)
        flipped[i // 8] ^= 1 << i % 8
        path.write_bytes(flipped)
        with compiling.Beside(True, path) as beside:
            problem = beside.wait()
        names.add(type(problem).__name__)
        assert all(content == b"artifacts" * 100 for content in read)
    assert names == {"NoneType", "ValueError", "OSError"}


def test_other_sources_of_kernels_are_another_key(tmp_path, monkeypatch):
    (tmp_path / "gelu").mkdir()
    (tmp_path / "gelu" / "impl_x.py").write_text("a = 1")
    monkeypatch.setattr(op, "__file__", str(tmp_path / "op.py"))
    compiling.sources.cache_clear()
    try:
        first = compiling.sources()
        compiling.sources.cache_clear()
        (tmp_path / "gelu" / "impl_x.py").write_text("a = 2")
        assert compiling.sources() != first
    finally:
        compiling.sources.cache_clear()
    monkeypatch.undo()
    compiling.compiled(train.build(config(compile="false")).model, "model", "default")
    assert f"tritium {compiling.sources()}" in torch.compiler.config.cache_key_tag


# --------------------------------------------------------------------------------------------------------- the start


def test_the_compiler_is_loaded_beside_the_rest(kept, monkeypatch):
    path, library, read = kept
    with compiling.Beside(True, path) as beside:
        assert beside.wait() is None
    assert len(read) == 1 and library.exists()
    with compiling.Beside(False, path) as beside:
        assert beside.wait() is None
    assert len(read) == 1
    path.write_bytes(path.read_bytes()[:50])
    with compiling.Beside(True, path) as beside:
        assert "is damaged" in str(beside.wait())
    monkeypatch.setattr(compiling, "MODULES", ("tritium.no_such_module",))
    with compiling.Beside(True, path) as beside, pytest.raises(ModuleNotFoundError, match="no_such_module"):
        beside.wait()
    with compiling.Beside(True, None) as beside:  # one that nobody waits for has ended all the same
        pass
    assert not beside.thread.is_alive()


@pytest.mark.parametrize("gpu", [False, True])
def test_the_compilers_sources_are_hashed_beside_the_rest(gpu, monkeypatch):
    """What the first compilation would wait for. About a GPU only the process's own thread may ask."""
    from torch._inductor import codecache

    asked = []
    monkeypatch.setattr(codecache, "torch_key", lambda: asked.append(("torch", threading.current_thread().name)))
    monkeypatch.setattr(
        codecache.CacheBase, "get_system", lambda: asked.append(("system", threading.current_thread().name))
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    with compiling.Beside(True, None) as beside:
        assert beside.wait() is None
    assert asked == [("torch", "compiler"), ("system", "compiler")][: 2 - gpu]


def test_torchs_digests_are_remembered():
    from torch._inductor import codecache

    assert codecache.torch_key() is codecache.torch_key()
    assert codecache.CacheBase.get_system() is codecache.CacheBase.get_system()


START = """
import importlib, json, sys
from tritium.engine import compiling, train
from tritium.engine.config import Config
from tritium.engine.report import Reporter

class Enough(Exception):
    pass

class Beside:
    def __init__(self, on, cache):
        assert on
    def __enter__(self):
        for name in compiling.BOTH:
            importlib.import_module(name)
        self.before = set(sys.modules)
        return self
    def __exit__(self, *exc):
        pass
    def wait(self):
        later = set(sys.modules) - self.before
        print(json.dumps(sorted(name for name in later if name.partition(".")[0] == "torch")))
        raise Enough

compiling.Beside = Beside
train._check_data = lambda *args: None
config = Config.from_json(sys.argv[1])
for out in sys.argv[2:]:
    try:
        train.main(config.replace(run={"out": out}), Reporter(quiet=True))
    except Enough:
        pass
before = set(sys.modules)
for name in compiling.MODULES:
    importlib.import_module(name)
print(len(set(sys.modules) - before))
"""


def test_nobody_imports_what_is_loaded_beside(run_folder, tmp_path):
    """A new run and one that goes on from a checkpoint, up to where they wait for the compiler."""
    stored = Config.from_json(json.dumps(json.loads(next(run_folder.rglob("run.json")).read_text())["config"]))
    c = stored.replace(train={"compile": "true", "steps": 8, "batch_rows": 2, "micro_rows": 2, "device": "cpu"})
    command = [
        sys.executable,
        "-P",
        "-c",
        START,
        c.to_json(),
        str(tmp_path / "new"),
        str(run_folder / "runs" / "small"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    new, resumed, loaded = (json.loads(line) for line in done.stdout.splitlines())
    assert new == [] and resumed == []
    assert loaded > 100, "what is loaded beside had been loaded before"
