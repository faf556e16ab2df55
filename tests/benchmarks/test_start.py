"""benchmarks/start.py: what it hands to a process and reads from it."""

import time

import pytest

from tritium.benchmarks import start

CHILD = """
import os, pathlib, sys, time
began = float(sys.argv[1])
assert 0 <= time.time() - began < 60 and sys.argv[2] == "train", sys.argv
empty = pathlib.Path(os.environ["TMPDIR"])
assert empty.is_dir() and not list(empty.iterdir()) and "TORCHINDUCTOR_CACHE_DIR" not in os.environ
out = pathlib.Path(sys.argv[sys.argv.index("--run.out") + 1])
stop, steps = os.environ.get("TRITIUM_STOP_THERE"), sys.argv[sys.argv.index("--train.steps") + 1]
if (out / "fail").exists():
    sys.exit("no such luck")
kind = "resumed" if steps == "2" else "new" if (out / "compile_cache.bin").exists() else "cold"
assert (stop == "1") == (kind != "cold")
out.mkdir(exist_ok=True)
(out / "compile_cache.bin").touch()
print("first step after", {"cold": 20.0, "new": 5.0, "resumed": 7.0}[kind], "s")
"""


def test_three_kinds_of_start_in_processes_of_their_own(monkeypatch, capsys):
    monkeypatch.setattr(start, "CHILD", CHILD)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere")
    start.main(["tiny", "--train.device", "cpu"])
    last = capsys.readouterr().out.split("\n\n")[-2]
    assert last.splitlines() == [
        "from nothing: 20.00 s, 100% (20.00, 20.00, 20.00)",
        "new, with compile_cache.bin: 5.00 s, 25% (5.00, 5.00, 5.00)",
        "resumed: 7.00 s, 35% (7.00, 7.00, 7.00)",
    ]


def test_the_first_step_of_a_real_run_is_timed(tmp_path):
    """And what follows it is done, or, where that is not wanted, left."""
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "document number {i}"}}\n' for i in range(50)))
    flags = {
        "data.sources": tmp_path / "text.jsonl", "data.tokenizer": "bytes", "data.folder": tmp_path / "data",
        "data.val_fraction": 0.2, "model.n_layer": 1, "model.n_embd": 16, "model.n_head": 2, "model.block_size": 16,
        "train.batch_rows": 2, "train.micro_rows": 2, "train.compile": "false", "train.device": "cpu",
        "train.eval_tokens": 32, "train.sample_tokens": 1, "run.tensorboard": False, "run.require_bigram": False,
    }  # fmt: skip
    argv = ["tiny", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]
    for name, stop in (("left", True), ("done", False)):
        began = time.time()
        assert 0.1 < start.seconds(argv, tmp_path / name, 1, stop) < time.time() - began
        assert (tmp_path / name / "checkpoints").exists() == (not stop)


def test_a_run_that_fails_is_no_time(monkeypatch, tmp_path):
    monkeypatch.setattr(start, "CHILD", CHILD)
    (tmp_path / "fail").touch()
    with pytest.raises(RuntimeError, match="no such luck"):
        start.seconds([], tmp_path, 1, stop=False)
    monkeypatch.setattr(start, "CHILD", "print('nothing')")
    with pytest.raises(RuntimeError, match="nothing"):
        start.seconds([], tmp_path, 1, stop=False)
