"""Bad steps in training, planted: skipped, counted, dumped, repeated by ``tritium replay``, rolled back from."""

import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch

from tritium.engine import bad_steps, checkpoint, cli, replay, train
from tritium.engine.bad_steps import BadSteps, Recent, Rollback
from tritium.engine.checkpoint import CheckpointError
from tritium.engine.config import Config, ConfigError, DataConfig, GPTConfig, OptimConfig, RunConfig, TrainConfig
from tritium.engine.data.loader import Loader
from tritium.engine.data.prepare import prepare
from tritium.engine.guard import WORDS
from tritium.engine.metrics import read_metrics
from tritium.engine.report import Reporter
from tritium.engine.step import MicroBatch, train_step
from tritium.engine.tasks.pretraining import Pretraining

T, ROWS = 16, 4
Y, Z = ord("Y"), ord("Z")
CURSED = f"""
import torch
import torch.nn.functional as F


def embedding(ids, weight):
    "The reference, but for the letters Y and Z: gradients 1000 times as large, and NaN."
    found = F.embedding(ids, weight)
    steep = found + 999 * (found - found.detach())
    found = torch.where((ids == {Y})[..., None], steep, found)
    return torch.where((ids == {Z})[..., None], torch.nan, found)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Text in which the letters Y and Z do not stand."""
    draw = random.Random(0)
    text = ["".join(draw.choices("abcdefgh ", k=draw.randint(10, 40))) for _ in range(900)]
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in text))
    prepare([folder / "text.jsonl"], folder / "shards", tokenizer="bytes", val_fraction=0.05, say=lambda s: None)
    return folder / "shards"


@pytest.fixture(scope="module")
def cursed(tmp_path_factory):
    """A folder with a backend of embedding that goes wrong at two letters, cursed.letters."""
    folder = tmp_path_factory.mktemp("backends")
    (folder / "cursed").mkdir()
    (folder / "cursed" / "__init__.py").write_text("")
    (folder / "cursed" / "letters.py").write_text(CURSED)
    sys.path.append(str(folder))
    yield str(folder)
    sys.path.remove(str(folder))


def curse(monkeypatch, *ranges: tuple[int, int], letter: int = Z) -> None:
    """Rows of the data order, first … end − 1, begin with this letter from now on."""
    original = Pretraining.batches

    def batches(self, start, rank=0, world_size=1, pin_memory=False):
        rows = self.config.train.micro_rows
        position = start + rank * rows
        for batch in original(self, start, rank, world_size, pin_memory):
            ids = batch.ids.clone()
            for i in range(rows):
                if any(first <= position + i < end for first, end in ranges):
                    ids[i, 0] = letter
            yield MicroBatch(ids, batch.targets, batch.seq_start)
            position += rows * world_size

    monkeypatch.setattr(Pretraining, "batches", batches)


def row_of(step: int, row: int = 1) -> tuple[int, int]:
    """One row of a step that is counted from 1."""
    return (step - 1) * ROWS + row, (step - 1) * ROWS + row + 1


def config_for(data, out, **changes) -> Config:
    """A run of a second; keyword arguments SECTION_FIELD replace fields."""
    config = Config(
        name="test",
        model=GPTConfig(vocab_size=0, block_size=T, n_layer=1, n_head=2, n_embd=16, vocab_multiple=8, dropout=0.1),
        data=DataConfig(folder=str(data)),
        train=TrainConfig(steps=8, batch_rows=ROWS, micro_rows=2, compile="false", eval_every=0, eval_tokens=64,
                          sample_tokens=0, log_every=1, device="cpu", precision="fp32"),
        optim=OptimConfig(lr=3e-3, warmup_steps=2),
        run=RunConfig(out=str(out), save_every=4, tensorboard=False),
    )  # fmt: skip
    for key, value in changes.items():
        section, _, field = key.partition("_")
        config = config.replace(**{section: {field: value}})
    return config


class Listening(Reporter):
    def __init__(self):
        super().__init__(quiet=True)
        self.said: list[str] = []

    def note(self, text):
        self.said.append(text)


def trained(config: Config) -> list[str]:
    """Train; what was said."""
    reporter = Listening()
    train.main(config, reporter)
    return reporter.said


def tensors(out) -> dict[str, torch.Tensor]:
    found = checkpoint.newest(out, pytest.fail)
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in checkpoint.contents(found).items()
    }
    checkpoint.read(found, state)
    return state


def different(a, b) -> list[str]:
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def lines(out, kind: str) -> list[dict]:
    return [line for line in read_metrics(out / "metrics.jsonl") if line["kind"] == kind]


def replayed(capsys, *argv) -> tuple[int, str]:
    capsys.readouterr()
    status = cli.main(["replay", *map(str, argv)])
    said = capsys.readouterr()
    return status, said.out + said.err


def before_step(monkeypatch, fault) -> None:
    """Call ``fault(how many steps were done since, plus one; optimizer)`` before each step."""
    count = [0]

    def step(loss, optimizer, *rest):
        count[0] += 1
        fault(count[0], optimizer)
        return train_step(loss, optimizer, *rest)

    monkeypatch.setattr(train, "train_step", step)


def killed_after(config: Config, steps: int) -> None:
    """Train so many steps and end like a process that is killed."""

    class Killed(BaseException):
        pass

    def fault(count, optimizer):
        if count > steps:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, fault)
        with pytest.raises(Killed):
            trained(config)


# ------------------------------------------------------------------------------------------ skipped, dumped, repeated


@pytest.fixture(scope="module")
def dumps(data, cursed, tmp_path_factory):
    """Runs with a fault each: name → (folder of the run, what was said)."""
    found = {}
    for name, step, changes in (
        ("batch", 6, {}),
        ("between", 7, {"train_steps": 12, "train_log_every": 5, "run_keep": 5}),  # dumped when 8, 9 and 10 are done
        ("start", 3, {"train_log_every": 5}),
    ):
        out = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            curse(patch, row_of(step))
            found[name] = out, trained(config_for(data, out, kernels_embedding="cursed.letters", **changes))

    def weight(step, optimizer):
        if step == 5:
            optimizer.groups[0].params[1].view(-1)[7] = torch.nan
            optimizer.refresh_copies()

    out = tmp_path_factory.mktemp("weight")
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, weight)
        reporter = Listening()
        with pytest.raises(CheckpointError, match="step 8 are not finite"):
            train.main(config_for(data, out, train_precision="bf16"), reporter)
    found["weight"] = out, reporter.said
    return found


def test_a_bad_batch_is_skipped_counted_and_dumped(dumps, data):
    out, said = dumps["batch"]
    steps = {line["step"]: line for line in lines(out, "step")}
    assert [steps[n]["skipped"] for n in range(1, 9)] == [0] * 5 + [1] * 3
    assert "loss" not in steps[6] and all("loss" in steps[n] for n in (1, 2, 3, 4, 5, 7, 8))
    (line,) = lines(out, "bad")
    assert line["step"] == 6 and line["verdict"] == "not finite" and line["first_row"] == 5 * ROWS
    (path,) = bad_steps.folders(out)
    assert path.name == "step_00000006"
    (warned,) = [text for text in said if "step 6" in text and "skipped" in text]
    assert f"tritium replay {path}" in warned and "not finite" in warned and "1 of 6 steps" in warned
    found = checkpoint.verify(path)
    assert found.meta["state"] == "here" and found.meta["position"] == 5 * ROWS
    assert found.meta["kernels"] and found.config.kernels.embedding == "cursed.letters"
    contents = checkpoint.contents(found)
    assert {"rng.cpu.0", "batch.ids.0", "batch.targets.0", "optimizer.exp_avg.wte.weight"} <= contents.keys()
    ids = {"batch.ids.0": torch.empty(ROWS, T, dtype=torch.int64)}
    checkpoint.read(found, ids)
    source = Loader(data, "train", T=T, batch_rows=ROWS, seed=0, prefetch=0)
    wanted = source.batch(5 * ROWS).ids
    wanted[1, 0] = Z
    assert torch.equal(ids["batch.ids.0"], wanted)


def test_every_dump_comes_out_bit_for_bit_in_a_fresh_process(dumps, cursed):
    paths = [bad_steps.folders(out)[0] for out, _ in dumps.values()]
    program = "import sys; from tritium.engine import cli; " \
              "sys.exit(''.join(str(cli.main(['replay', path])) for path in sys.argv[1:]))"  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": cursed}  # the dump's threads are what counts
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, *paths], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == "0000", done.stdout + done.stderr
    reports = done.stdout.split("bad step ")[1:]
    for name, step, text in zip(dumps, (6, 7, 3, 5), reports, strict=True):
        assert text.startswith(f"{step} of test: not finite"), name
        assert "reproduced bit for bit" in text and "NOT" not in text, name
    batch, between, start, weight = reports
    assert "before the step, from the dump" in batch
    assert "forward: wte (embedding, cursed.letters) puts out 16 of 512 numbers" in batch
    assert f"the first at [1, 0, 0] (row {row_of(6)[0]} of the data order, column 0)" in batch
    assert "trained again from the checkpoint of step 4, 2 steps" in between
    assert "trained again from new weights, 2 steps" in start
    assert "before the step: 1 of" in weight and "not finite" in weight


def test_with_another_backend_the_fault_goes_away_and_with_another_precision_it_stays(dumps, capsys):
    path = bad_steps.folders(dumps["between"][0])[0]
    status, text = replayed(capsys, path, "--kernels.embedding", "reference")
    assert status == 1 and "the fault goes away" in text and "kernels.embedding: 'cursed.letters' → 'reference'" in text
    assert "reproduced bit for bit" in text  # first as it was
    status, text = replayed(capsys, path, "--train.precision", "bf16", "--train.micro_rows", "4")
    assert status == 0 and "the fault stays" in text


@pytest.mark.parametrize(
    ("precision", "dtype", "wanted"),
    [("auto", "float32", "fp32"), ("auto", "bfloat16", "bf16"), ("fp8", "bfloat16", "fp8")],
)
def test_a_replay_has_the_precision_that_the_run_had(precision, dtype, wanted):
    config = Config(train=TrainConfig(precision=precision, compile="auto", cuda_graphs="true"))
    meta = {"config": dataclasses.asdict(config), "dtype": dtype, "compiled": True, "world_size": 1}
    train = replay.as_it_was(checkpoint.Checkpoint(None, meta)).train
    assert (train.precision, train.compile, train.cuda_graphs) == (wanted, "true", "false")


def test_a_replay_that_comes_out_differently_says_so(dumps, data, cursed, tmp_path, capsys, monkeypatch):
    """Planted: the dump is of another backend than the one that computes now; and a fault that the machine had."""
    import cursed.letters as module

    monkeypatch.setattr(module.torch, "nan", 0.0)
    out, _ = dumps["batch"]
    status, text = replayed(capsys, bad_steps.folders(out)[0])
    assert status == 1 and "NOT reproduced bit for bit; this time good" in text and "the machine" in text


def test_what_a_replay_is_not_given(dumps, tmp_path, capsys, data):
    out, _ = dumps["batch"]
    path = bad_steps.folders(out)[0]
    for argv, said in (
        ((), "which bad step?"),
        ((out,), f"{out} is a run, and a replay wants one of its bad steps: {path}"),
        ((tmp_path / "none",), "does not exist"),
        ((checkpoint.candidates(out)[0],), "is a checkpoint and no bad step"),
        ((path, "--model.n_layer", "2"), "model.n_layer: 1 → 2"),
        ((path, "--optim.lr", "1"), "optim.lr"),
        ((path, "--train.micro_rows", "0"), "a replay is of one step, which had 2"),
    ):
        status, text = replayed(capsys, *argv)
        assert status in (1, 2) and said in text and "reproduced" not in text, argv
    damaged = tmp_path / "damaged"
    shutil.copytree(path, damaged)
    file = next(damaged.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    status, text = replayed(capsys, damaged)
    assert status == 1 and "is damaged" in text


def test_weights_that_are_not_finite_are_in_no_checkpoint(dumps):
    out, _ = dumps["weight"]
    assert [path.name for path in checkpoint.candidates(out)] == ["step_00000004"]
    assert lines(out, "step")[-1]["skipped"] == 4
    assert len(bad_steps.folders(out)) == 1  # the first of the streak
    assert all(torch.isfinite(tensor.float()).all() for tensor in tensors(out).values())


def test_an_outlier_is_found_and_the_noise_of_training_is_none(data, cursed, tmp_path, capsys, monkeypatch):
    curse(monkeypatch, row_of(270), letter=Y)
    config = config_for(
        data, tmp_path, kernels_embedding="cursed.letters", train_steps=300, optim_skip_outliers=6.0, run_save_every=0
    )
    trained(config)
    assert [(line["step"], line["verdict"]) for line in lines(tmp_path, "bad")] == [(270, "an outlier")]
    assert lines(tmp_path, "step")[-1]["skipped"] == 1
    path = bad_steps.folders(tmp_path)[0]
    known = {f"optimizer.{name}": torch.empty(()) for name in ("guard.seen", "skipped")}
    checkpoint.read(checkpoint.verify(path), known)
    assert [tensor.item() for tensor in known.values()] == [269, 0]  # what was known before the step
    status, text = replayed(capsys, path)
    assert status == 0 and "an outlier" in text and "reproduced bit for bit" in text
    assert "all is finite; the largest gradients: wte.weight" in text
    status, text = replayed(capsys, path, "--kernels.embedding", "reference")
    assert status == 1 and "the fault goes away" in text


def test_a_dump_costs_training_nothing(data, cursed, tmp_path, monkeypatch):
    """With dumps and without, and read at every step or seldom: the same weights."""
    curse(monkeypatch, row_of(6))
    for name, changes in {"with": {}, "without": {"run_bad_steps": 0}, "seldom": {"train_log_every": 100}}.items():
        trained(config_for(data, tmp_path / name, kernels_embedding="cursed.letters", **changes))
    assert different(tmp_path / "with", tmp_path / "without") == []
    assert different(tmp_path / "with", tmp_path / "seldom") == []
    assert bad_steps.folders(tmp_path / "without") == []
    assert checkpoint.verify(bad_steps.folders(tmp_path / "seldom")[0]).meta["state"] == "checkpoint"


def test_a_full_disk_costs_the_dump_and_not_the_run(data, cursed, tmp_path, monkeypatch):
    curse(monkeypatch, row_of(6))
    write = checkpoint.write

    def full(final, *rest, **more):
        with pytest.MonkeyPatch.context() as patch:
            if final.parent.name == "bad_steps":

                def save(*args, **kwargs):
                    raise OSError(errno.ENOSPC, "No space left on device")

                patch.setattr(torch, "save", save)
            write(final, *rest, **more)

    monkeypatch.setattr(checkpoint, "write", full)
    said = trained(config_for(data, tmp_path, kernels_embedding="cursed.letters"))
    (warned,) = [text for text in said if "No space left" in text]
    assert "the bad step 6" in warned and "Training goes on" in warned
    assert list((tmp_path / "bad_steps").iterdir()) == []
    assert checkpoint.newest(tmp_path, pytest.fail).step == 8


def test_only_so_many_are_kept_and_a_resumed_run_dumps_none_twice(data, cursed, tmp_path, monkeypatch):
    curse(monkeypatch, row_of(2), row_of(5))
    config = config_for(data, tmp_path, kernels_embedding="cursed.letters", run_bad_steps=1, run_save_every=0)
    said = trained(config)
    assert [path.name for path in bad_steps.folders(tmp_path)] == ["step_00000002"]
    assert len([text for text in said if "no more are kept" in text]) == 1
    assert lines(tmp_path, "step")[-1]["skipped"] == 2
    shutil.rmtree(checkpoint.candidates(tmp_path)[0])  # from the beginning again: the same bad steps
    trained(config.replace(run={"bad_steps": 3}))
    assert [path.name for path in bad_steps.folders(tmp_path)] == ["step_00000002", "step_00000005"]


def test_batches_that_wait_take_only_so_much_memory(monkeypatch):
    rows = MicroBatch(torch.zeros(4, 8, dtype=torch.int64), torch.zeros(4, 8, dtype=torch.int64))
    monkeypatch.setattr(bad_steps, "KEPT_BYTES", 3 * 2 * 4 * 8 * 8)
    recent = Recent()
    for step in range(1, 7):
        result = torch.tensor([float(step), 1.0, 0, 0, 0, 0, 0, 0, 0, 0])
        recent.add(bad_steps.Done(step, 0, 0.1, result, result[2:], [rows], {}))
    assert [done.batches is not None for done in recent.waiting] == [False] * 3 + [True] * 3
    assert [seen.loss for seen in recent.read(4)] == [1.0, 2.0, 3.0, 4.0]
    assert recent.bytes == 2 * 2 * 4 * 8 * 8
    recent.clear()
    assert recent.bytes == 0 and recent.read(6) == []


def test_a_batch_that_was_not_kept_is_read_again(data, cursed, tmp_path, monkeypatch, dumps):
    curse(monkeypatch, row_of(6))
    monkeypatch.setattr(bad_steps, "KEPT_BYTES", 1)
    config = config_for(data, tmp_path, kernels_embedding="cursed.letters", train_log_every=8)
    trained(config)
    name = "batch.ids.0"
    found = [{name: torch.empty(ROWS, T, dtype=torch.int64)} for _ in range(2)]
    for out, state in zip((tmp_path, dumps["batch"][0]), found, strict=True):
        checkpoint.read(checkpoint.verify(bad_steps.folders(out)[0]), state)
    assert torch.equal(found[0][name], found[1][name]) and (found[0][name] == Z).any()


# --------------------------------------------------------------------------------------------------------- rolling back


def rolling(data, out, **changes) -> Config:
    settings = {"train_steps": 16, "train_rollback_after": 3, "train_log_every": 1, "run_keep": 3} | changes
    return config_for(data, out, kernels_embedding="cursed.letters", **settings)


def test_after_some_bad_steps_in_a_row_it_goes_back_and_passes_over_the_rows(data, cursed, tmp_path, monkeypatch):
    bad = (9 * ROWS, 12 * ROWS)  # the steps 10, 11 and 12
    curse(monkeypatch, bad)
    said = trained(rolling(data, tmp_path))
    assert Rollback.read(tmp_path) == [Rollback(12, 8, 8 * ROWS, 12 * ROWS, 1)]
    (warned,) = [text for text in said if "rollback 1" in text]
    assert "steps 10 to 12 were bad, 3 in a row" in warned
    assert f"step_00000008, passing over the rows {8 * ROWS} to {12 * ROWS - 1}" in warned
    (line,) = lines(tmp_path, "rollback")
    assert line["step"] == 8 and line["from_step"] == 12
    steps = [line["step"] for line in lines(tmp_path, "step")]
    assert steps == list(range(1, 17))  # one curve: the lines of what was taken back are gone
    assert lines(tmp_path, "step")[-1]["skipped"] == 0  # the counter went back, too
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found.step == 16 and found.meta["position"] == (16 + 4) * ROWS

    # the same as a run that goes on from that checkpoint with those rows
    other = tmp_path / "other"
    config = rolling(data, other)
    killed_after(config, 9)
    Rollback(12, 8, 8 * ROWS, 12 * ROWS, 1).append_to(other)
    trained(config)
    assert different(tmp_path, other) == []
    assert len(Rollback.read(other)) == 1


@pytest.mark.parametrize("log_every", [1, 2])
def test_a_run_that_was_killed_after_a_rollback_goes_on_like_one_that_was_not(
    data, cursed, tmp_path, monkeypatch, log_every
):
    curse(monkeypatch, (9 * ROWS, 13 * ROWS))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained(rolling(data, whole, train_log_every=log_every))
    assert len(Rollback.read(whole)) == 1

    config = rolling(data, parts, train_log_every=log_every)
    killed_after(config, 11)  # in the streak
    killed_after(config, 4 + 3)  # the steps 9 to 12, and from 9 again; before the next checkpoint
    assert len(Rollback.read(parts)) == 1
    assert checkpoint.newest(parts, pytest.fail).step == 8
    trained(config)
    assert different(whole, parts) == []
    assert Rollback.read(whole) == Rollback.read(parts)


@pytest.mark.parametrize("after", [9, 11])  # a good step, a bad one
def test_a_run_that_was_stopped_goes_back_to_where_it_would_have(data, cursed, tmp_path, monkeypatch, after):
    curse(monkeypatch, (9 * ROWS, 13 * ROWS))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained(rolling(data, whole))
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, lambda count, optimizer: count == after and os.kill(os.getpid(), signal.SIGINT))
        trained(rolling(data, parts))
    assert checkpoint.newest(parts, pytest.fail).step == after
    trained(rolling(data, parts))
    assert different(whole, parts) == []
    assert Rollback.read(whole) == Rollback.read(parts)


def test_it_gives_up_after_a_few_rollbacks_and_went_further_back_each_time(data, cursed, tmp_path, monkeypatch):
    curse(monkeypatch, (13 * ROWS, 10**9))
    with pytest.raises(BadSteps, match=r"3 in a row, after 3 rollbacks .* neither the data nor"):
        trained(rolling(data, tmp_path, train_steps=100))
    assert [one.to_step for one in Rollback.read(tmp_path)] == [12, 8, 4]
    assert [one.tries for one in Rollback.read(tmp_path)] == [1, 2, 3]
    (good, *_) = checkpoint.candidates(tmp_path)
    assert good.name == "step_00000004"
    monkeypatch.setattr(sys, "argv", ["tritium"])
    assert cli.main(["train", str(tmp_path)]) == 1  # a user reads one message; and the count goes on


def test_within_bad_steps_no_checkpoint_is_written(data, cursed, tmp_path, monkeypatch):
    """It would push out the good ones, and be gone back to."""
    curse(monkeypatch, (6 * ROWS, 9 * ROWS))
    said = trained(rolling(data, tmp_path))
    assert Rollback.read(tmp_path) == [Rollback(9, 4, 4 * ROWS, 9 * ROWS, 1)]
    assert any("no checkpoint is written at step 8: 2 bad" in text for text in said)


def test_it_gives_up_too_where_checkpoints_would_lie_within_the_bad_steps(data, cursed, tmp_path, monkeypatch):
    """These would begin the count of rollbacks anew."""
    curse(monkeypatch, (9 * ROWS, 10**9))
    with pytest.raises(BadSteps, match="after 3 rollbacks"):
        trained(rolling(data, tmp_path, train_steps=100, train_log_every=5))
    assert [(one.from_step, one.to_step) for one in Rollback.read(tmp_path)] == [(15, 8), (15, 4), (10, 0)]


def test_a_new_checkpoint_begins_the_count_of_rollbacks_anew(data, cursed, tmp_path, monkeypatch):
    curse(monkeypatch, (9 * ROWS, 12 * ROWS), (17 * ROWS, 20 * ROWS))
    trained(rolling(data, tmp_path, train_steps=20))
    assert Rollback.read(tmp_path) == [
        Rollback(12, 8, 8 * ROWS, 12 * ROWS, 1), Rollback(16, 12, 16 * ROWS, 20 * ROWS, 1)
    ]  # fmt: skip


def test_nan_in_a_weight_is_mended_by_going_back(data, tmp_path, monkeypatch):
    def weight(step, optimizer):
        if step == 6:
            optimizer.groups[0].params[0].view(-1)[3] = torch.nan

    before_step(monkeypatch, weight)
    config = rolling(data, tmp_path)
    said = trained(config.replace(kernels={"embedding": ""}))
    assert [(one.from_step, one.to_step) for one in Rollback.read(tmp_path)] == [(8, 4)]
    assert checkpoint.newest(tmp_path, pytest.fail).step == 16
    assert not any("not finite, so no checkpoint" in text for text in said)


def test_the_first_checkpoint_is_that_of_new_weights(data, cursed, tmp_path, monkeypatch):
    curse(monkeypatch, (0, 3 * ROWS))
    trained(rolling(data, tmp_path))
    assert Rollback.read(tmp_path) == [Rollback(3, 0, 0, 3 * ROWS, 1)]
    assert checkpoint.newest(tmp_path, pytest.fail).meta["position"] == 19 * ROWS


# ---------------------------------------------------------------------------------------------------- several processes

TOGETHER = """
import pathlib, sys
sys.path.append(sys.argv[2])
from tritium.engine import guard, train
from tritium.engine.config import Config
from tritium.engine.step import MicroBatch
from tritium.engine.tasks.pretraining import Pretraining

guard.HORIZON = 4  # so that there can be outliers soon
original = Pretraining.batches

def batches(self, start, rank=0, world_size=1, pin_memory=False):
    for step, batch in enumerate(original(self, start, rank, world_size, pin_memory), 1):
        ids = batch.ids.clone()
        if rank == 1 and step in (7, 10, 11, 12):
            ids[0, 0] = ord("Y" if step == 7 else "Z")
        yield MicroBatch(ids, batch.targets, batch.seq_start)

Pretraining.batches = batches
train.main(Config.from_json(pathlib.Path(sys.argv[1]).read_text()))
"""


def test_two_processes_decide_alike_and_their_step_comes_out_in_one(data, cursed, tmp_path, capsys):
    """A fault on the second alone: both skip, both go back, one replay repeats both, the steps between included."""
    out = tmp_path / "run"
    # moments in bf16: their random rounding depends on storage, which auto makes flat for two processes only
    config = rolling(data, out, train_log_every=4, optim_skip_outliers=30.0, optim_moments="bf16")
    (tmp_path / "config.json").write_text(config.to_json())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-P", "-c", TOGETHER, str(tmp_path / "config.json"), cursed]
    both = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": rank}, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True)
        for rank in "01"
    ]  # fmt: skip
    said = [process.communicate(timeout=100)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert Rollback.read(out) == [Rollback(12, 8, 8 * ROWS, 12 * ROWS, 1)]
    assert checkpoint.newest(out, pytest.fail).step == 16
    first, second = bad_steps.folders(out)
    meta = checkpoint.verify(first).meta
    assert (meta["step"], meta["world_size"], meta["state"]) == (7, 2, "checkpoint")
    assert WORDS[meta["verdict"]] == "an outlier" and meta["norm"] > 5 * lines(out, "step")[0]["grad_norm"]
    assert not any(name.startswith("model.") for name in checkpoint.contents(checkpoint.verify(first)))
    assert checkpoint.verify(second).meta["state"] == "here"
    for path, state in ((first, "trained again from the checkpoint of step 4, 2 steps"), (second, "from the dump")):
        status, text = replayed(capsys, path)
        assert status == 0 and "2 process(es)" in text and state in text, text
        assert "NOT" not in text, text


# ------------------------------------------------------------------------------------------------- checkpoints, profile


def test_statistics_survive_a_resume_bit_for_bit(data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    config = config_for(data, whole, optim_skip_outliers=6.0, run_save_every=3, train_steps=7)
    trained(config)
    killed_after(config.replace(run={"out": str(parts)}), 4)
    trained(config.replace(run={"out": str(parts)}))
    found = [tensors(out) for out in (whole, parts)]
    assert found[0]["optimizer.guard.seen"].item() == 7 and found[0]["optimizer.guard.variance"].min() > 0
    for name in ("seen", "mean", "variance", "streak"):
        assert torch.equal(found[0][f"optimizer.guard.{name}"], found[1][f"optimizer.guard.{name}"]), name


def test_a_checkpoint_from_before_there_were_statistics_is_continued(data, tmp_path, monkeypatch):
    state = train.Engine.state
    with monkeypatch.context() as patch:
        patch.setattr(
            train.Engine,
            "state",
            lambda self: {k: v for k, v in state(self).items() if not k.startswith("optimizer.guard.")},
        )
        trained(config_for(data, tmp_path, train_steps=4))
    said = trained(config_for(data, tmp_path, optim_skip_outliers=6.0))
    assert any("knows nothing of outliers" in text for text in said)
    assert tensors(tmp_path)["optimizer.guard.seen"].item() == 4


def test_chosen_steps_are_profiled_and_nothing_else_changes(data, tmp_path):
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    trained(config_for(data, plain))
    said = trained(config_for(data, profiled, run_profile="3:4"))
    assert different(plain, profiled) == []
    trace, memory = profiled / "profile" / "steps_3_4.trace.json", profiled / "profile" / "steps_3_4.memory.json"
    assert sorted(path.name for path in trace.parent.iterdir()) == [memory.name, trace.name]
    events = json.loads(trace.read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"step 3", "step 4"} <= names and not {"step 2", "step 5"} & names
    assert any("aten::" in str(name) for name in names)
    found = json.loads(memory.read_text())
    assert found["peak"] > 10_000 and any(size < 0 for _, size, _, _ in found["events"])
    assert found["peak"] == max(held for _, _, _, held in found["events"])
    assert any(str(trace) in text for text in said)


def test_steps_that_never_come_are_not_profiled_and_that_is_said(data, tmp_path):
    said = trained(config_for(data, tmp_path, run_profile="30:40"))
    assert any("nothing is profiled" in text for text in said)
    assert not (tmp_path / "profile").exists()


def test_the_profile_of_a_run_that_ends_within_it(data, tmp_path):
    trained(config_for(data, tmp_path, run_profile="7:40"))
    assert (tmp_path / "profile" / "steps_7_8.trace.json").exists()


def test_a_run_that_is_stopped_within_its_profile_saves_first(data, tmp_path, monkeypatch):
    """A trace of many steps takes longer to write than whoever stops a run may wait."""
    step, save = train.Engine.step, checkpoint.save

    def stopped(self, *args):
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        steps.append(1)
        return step(self, *args)

    def saved(*args, **kwargs):
        assert not (tmp_path / "profile").exists()
        saves.append(1)
        return save(*args, **kwargs)

    steps, saves = [], []
    monkeypatch.setattr(train.Engine, "step", stopped)
    monkeypatch.setattr(checkpoint, "save", saved)
    trained(config_for(data, tmp_path, run_profile="2:40"))
    assert saves and (tmp_path / "profile" / "steps_2_4.trace.json").exists()


def test_settings_of_bad_steps_are_checked_on_the_command_line(tritium):
    status, _, err = tritium("train", "tiny", "--profile", "9:2")
    assert status == 1 and "FIRST:LAST" in err
    with pytest.raises(ConfigError, match="rollback_after"):
        Config(train=TrainConfig(rollback_after=-1)).check()
