"""The loop as a whole: what it leaves behind, and that a run which was killed continues as if nothing had happened."""

import dataclasses
import functools
import gc
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from tritium.engine import checkpoint, compiling, train
from tritium.engine.config import (
    Config,
    ConfigError,
    DataConfig,
    GPTConfig,
    KernelsConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from tritium.engine.data.errors import DataError
from tritium.engine.data.prepare import prepare
from tritium.engine.metrics import read_metrics
from tritium.engine.parallel import World
from tritium.engine.report import Reporter
from tritium.kernels.op import KernelError

RUN = "import sys, pathlib; from tritium.engine import train; from tritium.engine.config import Config; " \
      "train.main(Config.from_json(pathlib.Path(sys.argv[1]).read_text()))"  # fmt: skip
SERVER = """
import os, pathlib, sys, traceback
import matplotlib.figure, torch._inductor.compile_fx, torch.distributed.checkpoint
from tritium.engine import train
from tritium.engine.config import Config
for line in sys.stdin:
    verb, *words = line.split()
    if verb == "poll":
        pid, status = os.waitpid(int(words[0]), os.WNOHANG)
        print(os.waitstatus_to_exitcode(status) if pid else "running", flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        code = 1
        output = os.open(words[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        os.environ.update(word.split("=") for word in words[2:])
        try:
            code = train.main(Config.from_json(pathlib.Path(words[0]).read_text())).exit_code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
"""


class Run:
    """A training in a process of its own, with one thread."""

    def __init__(self, server: subprocess.Popen, config: Config, folder: pathlib.Path, environment: dict[str, object]):
        path = folder / f"{random.random()}.json"
        path.write_text(config.to_json())
        self.server, self.output, self.code = server, path.with_suffix(".txt"), None
        variables = " ".join(f"{name}={value}" for name, value in environment.items())
        self.pid = int(self.ask(f"start {path} {self.output} {variables}"))

    def ask(self, line: str) -> str:
        print(line, file=self.server.stdin, flush=True)
        return self.server.stdout.readline()

    def poll(self) -> int | None:
        if self.code is None and (answer := self.ask(f"poll {self.pid}").strip()) != "running":
            self.code = int(answer)
        return self.code

    def wait(self) -> None:
        while self.poll() is None:
            time.sleep(0.01)

    def finish(self, code: int = 0) -> str:
        """Wait for its end, which must be with this exit status; returns what it printed."""
        self.wait()
        text = self.output.read_text()
        assert self.code == code, text
        return text


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A function (config, variables of its environment) → Run. The processes are forked from one that has imported
    everything and computed nothing, which saves each of them some three seconds."""
    command = [sys.executable, "-P", "-c", SERVER]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder, runs = tmp_path_factory.mktemp("runs"), []
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(config: Config, **environment: object) -> Run:
        runs.append(Run(server, config, folder, environment))
        return runs[-1]

    with server:
        yield run
        for left in runs:
            if left.poll() is None:
                os.kill(left.pid, signal.SIGKILL)
        server.stdin.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A corpus with something to learn: sentences over a small vocabulary with fixed word order."""
    words = random.Random(0)
    nouns, verbs = ["cat", "dog", "bird", "fish", "horse"], ["sees", "likes", "follows", "hears"]
    text = [
        " ".join(
            f"the {words.choice(nouns)} {words.choice(verbs)} the {words.choice(nouns)}."
            for _ in range(words.randint(1, 9))
        )
        for _ in range(600)
    ]
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in text))
    prepare([folder / "text.jsonl"], folder / "shards", tokenizer="bytes", val_fraction=0.05, say=lambda s: None)
    return folder / "shards"


def config_for(data, out, **changes) -> Config:
    """A run of seconds; keyword arguments SECTION_FIELD replace fields."""
    config = Config(
        name="test",
        model=GPTConfig(vocab_size=0, block_size=32, n_layer=2, n_head=2, n_embd=32, vocab_multiple=8, dropout=0.1),
        data=DataConfig(folder=str(data)),
        train=TrainConfig(steps=12, batch_rows=8, micro_rows=4, compile="false", eval_every=5, eval_tokens=512,
                          sample_tokens=8, log_every=1, device="cpu", precision="bf16"),
        optim=OptimConfig(lr=3e-3, warmup_steps=2),
        run=RunConfig(out=str(out), save_every=4, tensorboard=False),
    )  # fmt: skip
    for key, value in changes.items():
        section, _, field = key.partition("_")
        config = config.replace(**{section: {field: value}})
    return config


def tensors(out: pathlib.Path) -> dict[str, torch.Tensor]:
    """Everything the newest checkpoint holds."""
    found = checkpoint.newest(out, pytest.fail)
    import torch.distributed.checkpoint as dcp

    stored = dcp.FileSystemReader(found.path).read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    checkpoint.read(found, state)
    return state | {"step": torch.tensor(found.step)}


def assert_identical(a: pathlib.Path, b: pathlib.Path) -> None:
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert different == []


def losses(out: pathlib.Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(out / "metrics.jsonl") if line["kind"] == "step"}


def wait_for_step(out: pathlib.Path, step: int, run: Run) -> None:
    path = out / "metrics.jsonl"
    while not (path.exists() and any(line["step"] >= step for line in read_metrics(path))):
        assert run.poll() is None, f"ended before step {step}: {run.output.read_text()}"
        time.sleep(0.005)


def test_a_run_learns_and_leaves_everything_behind(data, tmp_path):
    out = tmp_path / "run"
    config = config_for(
        data, out, train_steps=60, run_require_bigram=True, run_tensorboard=True, model_dropout=0.0, optim_lr=1e-2
    )
    outcome = train.main(config, Reporter(quiet=True))
    curve = losses(out)
    assert curve[60] < 0.6 * curve[1]
    assert set(outcome.bits_per_byte) == {"model", "unigram", "bigram"}
    assert outcome.bits_per_byte["model"] < outcome.bits_per_byte["unigram"]
    for name in ("loss.png", "metrics.jsonl", "sample.txt", "config.json", "tokenizer/tokenizer.json", "tensorboard"):
        assert (out / name).exists(), name
    assert outcome.checkpoint is not None and checkpoint.verify(outcome.checkpoint).step == 60
    restored = checkpoint.load_run(out)
    assert restored.step == 60 and restored.tokenizer.decode(restored.tokenizer.encode("the cat")) == "the cat"
    meta = checkpoint.verify(outcome.checkpoint).meta
    assert meta["position"] == 480 and meta["kernels"] and meta["versions"]["torch"] == torch.__version__


def test_behind_the_bigram_is_exit_code_1(data, tmp_path):
    outcome = train.main(config_for(data, tmp_path, train_steps=1, run_require_bigram=True), Reporter(quiet=True))
    assert outcome.status == "behind" and outcome.exit_code == 1


def placed(config: Config, out: pathlib.Path, **train: object) -> Config:
    """The same run in another folder."""
    return dataclasses.replace(
        config, run=dataclasses.replace(config.run, out=str(out)), train=dataclasses.replace(config.train, **train)
    )


def test_killed_at_a_random_step_it_continues_bit_for_bit(data, tmp_path, start):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    config = config_for(data, whole, train_steps=40, run_save_every=3)
    start(config).finish()
    config = placed(config, killed)
    for step in sorted(random.sample(range(4, 36), 2)):
        run = start(config)
        wait_for_step(killed, step, run)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    assert "resumed from" in start(config).finish()
    assert_identical(whole, killed)
    assert losses(whole) == losses(killed)


@pytest.mark.timeout(300)
def test_compiled_training_resumes_bit_for_bit_too(data, tmp_path, start):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    config = config_for(
        data, whole, train_steps=6, train_compile="true", run_save_every=3, train_eval_every=0, run_keep=5,
        model_n_layer=1,
    )  # fmt: skip
    start(config).finish()
    start(placed(config, parts)).finish()
    assert_identical(whole, parts)  # repeatable at all
    for path in checkpoint.candidates(parts):
        if path.name != "step_00000003":
            shutil.rmtree(path)
    assert "resumed from" in start(placed(config, parts)).finish()
    assert_identical(whole, parts)


def test_runs_in_one_process_do_not_use_up_the_compilers_limit(data, tmp_path, monkeypatch):
    """One configuration after the other, as in a notebook: Dynamo counts GPT.forward's graphs, whichever model's."""
    compile = functools.partial(torch.compile, backend="eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(compiling, "compiled", lambda model, *rest: compile(model))
    with torch._dynamo.config.patch(recompile_limit=1):
        for rows in (1, 2, 4):
            config = config_for(data, tmp_path / str(rows), train_steps=1, train_compile="true", train_micro_rows=rows)
            assert train.main(config, Reporter(quiet=True)).status == "done"


def test_ctrl_c_saves_and_the_same_command_continues(data, tmp_path, start):
    out = tmp_path / "run"
    config = config_for(data, out, train_steps=100_000, run_save_every=0, train_eval_every=0)
    run = start(config)
    wait_for_step(out, 3, run)
    os.kill(run.pid, signal.SIGINT)
    run.finish(130)
    step = checkpoint.newest(out, pytest.fail).step
    assert step >= 3
    text = start(placed(config, out, steps=step + 2)).finish()
    assert f"at step {step}" in text
    assert checkpoint.newest(out, pytest.fail).step == step + 2


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_two_processes_learn_what_one_does(data, tmp_path, start, precision, bound):
    alone, together = tmp_path / "alone", tmp_path / "together"
    config = config_for(
        data, together, train_steps=8, model_dropout=0.0, train_precision=precision, train_eval_every=0
    )  # fmt: skip
    if precision == "fp32":  # as a user starts them
        (tmp_path / "run.py").write_text(RUN)
        (tmp_path / "config.json").write_text(config.to_json())
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
        command = [sys.executable, *torchrun, tmp_path / "run.py", tmp_path / "config.json"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        both = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert both.returncode == 0, both.stdout + both.stderr
        said = both.stdout
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
        said = "".join(run.finish() for run in [start(config, RANK=rank, **shared) for rank in range(2)])
    assert "cpu × 2" in said
    start(placed(config, alone)).finish()
    one, two = losses(alone), losses(together)
    assert one.keys() == two.keys() and len(one) == 8
    for step, loss in one.items():
        assert abs(two[step] - loss) <= bound * abs(loss), (step, loss, two[step])


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_the_split_into_micro_batches_does_not_matter(data, tmp_path, precision, bound):
    curves = []
    for rows in (8, 4, 2):
        out = tmp_path / str(rows)
        config = config_for(
            data, out, train_steps=5, train_micro_rows=rows, model_dropout=0.0, train_eval_every=0,
            train_precision=precision,
        )  # fmt: skip
        train.main(config, Reporter(quiet=True))
        curves.append(losses(out))
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=bound)


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(data, tmp_path):
    config = config_for(data, tmp_path, train_steps=8)
    train.main(config, Reporter(quiet=True))
    reference = losses(tmp_path)
    newest = checkpoint.candidates(tmp_path)[0]
    assert newest.name == "step_00000008"
    file = next(newest.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    said = []

    class Listening(Reporter):
        def note(self, text):
            said.append(text)

    outcome = train.main(config, Listening())
    assert any("damaged" in s and "step_00000008" in s for s in said)
    assert any("resumed from" in s and "step_00000004" in s for s in said)
    assert outcome.step == 8 and losses(tmp_path) == reference


def test_a_kernel_that_cannot_be_had_is_said_before_the_data_is_prepared(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "prepared", lambda *a: pytest.fail("the data was prepared first"))
    config = config_for(data, tmp_path / "run")
    config = config.replace(kernels={"attention": "triton"})
    with pytest.raises(KernelError, match="Triton compiles for GPUs"):
        train.main(config, Reporter(quiet=True))
    assert not (tmp_path / "run").exists()


def test_the_last_line_shows_the_loss_of_the_model_that_is_left(data, tmp_path):
    shown = []

    class Listening(Reporter):
        def progress(self, p):
            shown.append(p)

    outcome = train.main(config_for(data, tmp_path, train_steps=4, train_eval_every=2), Listening(quiet=True))
    assert (shown[-1].step, shown[-1].val_loss) == (4, outcome.val_loss)
    before = next(p.val_loss for p in shown if p.step == 4)
    assert before != outcome.val_loss  # or this test would show nothing


def test_another_model_cannot_continue_and_nothing_is_lost(data, tmp_path):
    train.main(config_for(data, tmp_path, train_steps=2), Reporter(quiet=True))
    before = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    with pytest.raises(ConfigError, match=r"model.n_layer: 2 → 3"):
        train.main(config_for(data, tmp_path, train_steps=4, model_n_layer=3), Reporter(quiet=True))
    with pytest.raises(ConfigError, match="run.resume=never"):
        train.main(config_for(data, tmp_path, run_resume="never"), Reporter(quiet=True))
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == before
    with pytest.raises(ConfigError, match="run.resume=must"):
        train.main(config_for(data, tmp_path / "none", run_resume="must"), Reporter(quiet=True))


def test_other_data_cannot_continue(data, tmp_path):
    train.main(config_for(data, tmp_path / "run", train_steps=2), Reporter(quiet=True))
    lines = [json.dumps({"text": f"another corpus, with other words, document {i}. " * 5}) for i in range(40)]
    (tmp_path / "other.jsonl").write_text("\n".join(lines))
    prepare([tmp_path / "other.jsonl"], tmp_path / "other", tokenizer="bytes", val_fraction=0.2, say=lambda s: None)
    with pytest.raises(ConfigError, match="other data"):
        train.main(config_for(tmp_path / "other", tmp_path / "run", train_steps=4), Reporter(quiet=True))


def test_a_vocabulary_too_small_for_the_data_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match=r"model.vocab_size=100 is smaller .* 257"):
        train.main(config_for(data, tmp_path, model_vocab_size=100), Reporter(quiet=True))


def test_kernel_choices_reach_the_call_sites_and_the_checkpoint(data, tmp_path):
    config = dataclasses.replace(
        config_for(data, tmp_path, train_steps=1, model_dropout=0.0),
        kernels=KernelsConfig(attention="sdpa", override=("blocks.1.*:attention=reference",)),
    )
    train.main(config, Reporter(quiet=True))
    rows = checkpoint.newest(tmp_path, pytest.fail).meta["kernels"]
    chosen = {row["site"]: row["backend"] for row in rows if row["op"] == "attention" and row["phase"] == "train"}
    assert sorted(chosen.values()) == ["reference", "sdpa"]
    assert next(b for s, b in chosen.items() if "blocks.1" in s) == "reference"


def test_a_damaged_checkpoint_is_set_aside_and_no_good_one_is_lost(data, tmp_path):
    train.main(config_for(data, tmp_path, train_steps=8), Reporter(quiet=True))
    newest = checkpoint.candidates(tmp_path)[0]
    (newest / "run.json").write_text("{}")
    outcome = train.main(
        config_for(data, tmp_path, train_steps=6, run_keep=1, run_save_every=1), Reporter(quiet=True)
    )  # 5 and 6 are lower than the damaged 8
    assert outcome.checkpoint is not None and outcome.checkpoint.name == "step_00000006"
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["damaged_step_00000008", "step_00000006"]
    assert checkpoint.newest(tmp_path, pytest.fail).step == 6


def test_a_run_folder_has_one_run_at_a_time(data, tmp_path):
    with train._alone(tmp_path / "run"), pytest.raises(ConfigError, match="another process is training in"):
        try:
            train.main(config_for(data, tmp_path / "run", train_steps=1), Reporter(quiet=True))
        finally:
            assert (tmp_path / "run").is_dir()  # the other one's, though nothing is in it yet
    assert list(tmp_path.iterdir()) == []
    assert train.main(config_for(data, tmp_path / "run", train_steps=1), Reporter(quiet=True)).status == "done"


def test_a_run_beyond_its_steps_is_refused_and_stays_as_it_is(data, tmp_path):
    train.main(config_for(data, tmp_path, train_steps=3), Reporter(quiet=True))
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ConfigError, match=r"is at step 3, beyond train\.steps=2.*Use --train\.steps 6"):
        train.main(config_for(data, tmp_path, train_steps=2), Reporter(quiet=True))
    assert (tmp_path / "config.json").read_text() == before


def test_rows_longer_than_the_data_leave_no_folder(data, tmp_path):
    with pytest.raises(DataError, match="row"):
        train.main(config_for(data, tmp_path / "run", model_block_size=10_000_000), Reporter(quiet=True))
    assert list(tmp_path.iterdir()) == []


def test_no_validation_split_is_said_at_the_start(data, tmp_path):
    lines = [json.dumps({"text": f"document {i}. " * 20}) for i in range(40)]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    prepare([tmp_path / "all.jsonl"], tmp_path / "all", tokenizer="bytes", val_fraction=0.0, say=lambda s: None)
    with pytest.raises(DataError, match="'val'"):
        train.main(config_for(tmp_path / "all", tmp_path / "run", train_steps=1), Reporter(quiet=True))
    assert not (tmp_path / "run").exists()


def test_processes_begin_with_equal_weights_and_draw_their_own_dropout(data, tmp_path):
    class Alone(World):  # answers for the others
        def any(self, flag: bool) -> bool:
            return flag

    config = train.with_vocabulary(config_for(data, tmp_path, train_compile="false"), 257)
    engines, draws = [], []
    for rank in (0, 1, 2):
        engines.append(train.build(config, Alone(rank=rank, size=3)))
        draws.append(torch.rand(8))
    weights = [list(engine.model.state_dict().values()) for engine in engines]
    assert all(torch.equal(a, b) for other in weights[1:] for a, b in zip(weights[0], other, strict=True))
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])


def test_a_run_that_fails_leaves_the_process_as_it_was(run_folder, tmp_path, monkeypatch):
    """In a notebook, which keeps the error and with it all that the run held."""

    def fail(*args):
        assert not gc.isenabled() and any(t.name == "tritium-loader" for t in threading.enumerate())
        raise ZeroDivisionError

    monkeypatch.setattr(train.Engine, "step", fail)
    stored = checkpoint.newest(run_folder, print).config
    small = {"steps": 2, "batch_rows": 2, "micro_rows": 2, "compile": "false", "device": "cpu"}
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError) as kept:
        train.main(stored.replace(train=small, run={"out": str(tmp_path / "run")}), Reporter(quiet=True))
    assert kept.traceback and not any(t.name == "tritium-loader" for t in threading.enumerate())
    assert gc.isenabled() and gc.get_freeze_count() == 0
    assert signal.getsignal(signal.SIGINT) is before and not torch.are_deterministic_algorithms_enabled()
