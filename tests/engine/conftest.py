"""What the tests of the command line share: running a verb, a training that only notes its Config, a small run."""

import dataclasses
import importlib.util
import pathlib
import sys
import types

import pytest

from tritium.engine import cli
from tritium.engine.config import Config
from tritium.engine.report import Reporter

_spec = importlib.util.spec_from_file_location("tape", pathlib.Path(__file__).with_name("tape.py"))
assert _spec is not None and _spec.loader is not None
sys.modules["tape"] = _module = importlib.util.module_from_spec(_spec)  # what the tests of captured steps share
_spec.loader.exec_module(_module)


@pytest.fixture
def tritium(capsys, monkeypatch, tmp_path):
    """tritium("verb", ...) → (exit status, stdout, stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: object) -> tuple[int, str, str]:
        status = cli.main([str(a) for a in argv])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def trained(monkeypatch):
    """A train.main that only notes what it was asked for: trained[-1] is the Config; trained.error is raised if set,
    trained.step is where the run ends."""
    import tritium.engine

    class Asked(list):
        error: BaseException | None = None
        step = 1

    asked = Asked()

    def main(config, reporter):
        assert isinstance(reporter, Reporter)
        asked.append(config)
        if asked.error is not None:
            raise asked.error
        out = pathlib.Path(config.run.out or f"runs/{config.name}")
        return types.SimpleNamespace(
            status="done", exit_code=0, out=out, checkpoint=None, step=asked.step, val_loss=2.0, sample="",
            messages=["said"], bits_per_byte={"model": 1.5, "unigram": 3.0, "bigram": 2.0},
        )  # fmt: skip

    fake = types.ModuleType("tritium.engine.train")
    fake.main = main
    monkeypatch.setitem(sys.modules, "tritium.engine.train", fake)
    monkeypatch.setattr(tritium.engine, "train", fake, raising=False)
    return asked


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of a random, tiny model on bytes: root/runs/small and root/data."""
    import torch

    from tritium.engine import checkpoint
    from tritium.engine.config import DataConfig, GPTConfig
    from tritium.engine.data.prepare import prepare
    from tritium.engine.data.tokenizer import load_tokenizer
    from tritium.engine.model import GPT
    from tritium.engine.parallel import World

    root = tmp_path_factory.mktemp("run")
    (root / "text.jsonl").write_text("".join(f'{{"text": "document number {i}"}}\n' for i in range(50)))
    prepare([root / "text.jsonl"], root / "data", tokenizer="bytes", val_fraction=0.2, say=lambda s: None)
    network = GPTConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=16, vocab_multiple=8, init_std=0.3)
    config = Config(name="small", model=network, data=DataConfig(folder=str(root / "data"), tokenizer="bytes"))
    torch.manual_seed(0)
    out = root / "runs" / "small"
    state = {f"model.{name}": p.detach() for name, p in GPT(network).named_parameters()}
    meta = {"step": 7, "position": 0, "config": dataclasses.asdict(config), "kernels": [], "task": {}}
    checkpoint.save(out, state, meta, World(), keep=1)
    (out / "tokenizer").mkdir()
    load_tokenizer("bytes").save(out / "tokenizer")
    return out
