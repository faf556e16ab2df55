"""Compiled as one graph or block by block: the same training; and what was compiled, kept with a run."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from tritium.engine import compiling, train
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


@pytest.mark.parametrize(("recompute", "graphs"), [("none", 3), ("selective", 3), ("every", 4)])
def test_blocks_compiled_one_by_one_train_alike_and_share_their_graph(recompute, graphs):
    plain, plain_norms, _ = losses(config(compile="false"))
    torch._dynamo.utils.counters.clear()
    ours, norms, engine = losses(config("block", recompute=recompute))
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
path = pathlib.Path(sys.argv[1])
loaded = compiling.load_cache(path)
values, _, engine = losses(config(layers=1))
counters = torch._dynamo.utils.counters
written = compiling.save_cache(path) if not loaded else 0
print(json.dumps({"loaded": loaded, "losses": values, "written": written, **{
    name: counters[group][name] for group, name in (
        ("inductor", "fxgraph_cache_miss"), ("inductor", "fxgraph_cache_hit"),
        ("aot_autograd", "autograd_cache_miss"), ("aot_autograd", "autograd_cache_hit"),
        ("aot_autograd", "autograd_cache_bypass"))}}))
"""


def start(path, cache, **environment):
    import os
    import pathlib

    env = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(pathlib.Path(__file__).parent),
    } | environment  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, str(path)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_was_compiled_serves_another_process_with_an_empty_cache(tmp_path):
    path, compiler, called = tmp_path / "compile_cache.bin", tmp_path / "c++", tmp_path / "called.txt"
    compiler.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {called}\nexec {shutil.which("g++")} "$@"\n')
    compiler.chmod(0o755)
    cold = start(path, tmp_path / "one", CXX=str(compiler))
    assert cold["written"] > 1000 and not cold["loaded"] and cold["fxgraph_cache_miss"] > 0
    assert cold["autograd_cache_bypass"] == 0
    assert ".cpp" in called.read_text()
    called.write_text("")
    warm = start(path, tmp_path / "two", CXX=str(compiler))
    assert warm["loaded"] and warm["losses"] == cold["losses"]
    assert warm["fxgraph_cache_miss"] == 0 and warm["autograd_cache_miss"] == 0 and warm["autograd_cache_hit"] > 0
    assert ".cpp" not in called.read_text()  # no library was compiled again


def test_what_is_damaged_is_named_and_of_another_machine_not_used(tmp_path, monkeypatch):
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
