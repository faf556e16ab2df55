"""What a user gets wrong besides flags' names: text that is not UTF-8, seeds out of range, a damaged config.json."""

import dataclasses
import io
import json
import re
import shutil
import sys

import pytest

from tritium.engine import cli, presets
from tritium.engine.config import Config

UINT64_MAX = (1 << 64) - 1


# ---------------------------------------------------------------------------------------------------------------- text


def test_a_prompt_that_is_not_utf_8(tritium, run_folder):
    status, out, err = tritium("sample", run_folder, "--prompt", b"caf\xe9".decode("utf-8", "surrogateescape"))
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    for said in ("--prompt must be UTF-8", "byte 0xe9 after 'caf'", "iconv"):
        assert said in err


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # of standard input: a locale's, and C.UTF-8's
def test_a_prompt_on_standard_input_that_is_not_utf_8(tritium, run_folder, monkeypatch, errors):
    given = io.TextIOWrapper(io.BytesIO("thé caf".encode() + b"\xe9 x"), "utf-8", errors)
    monkeypatch.setattr(sys, "stdin", given)
    status, out, err = tritium("sample", run_folder, "--prompt", "-")
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    for said in ("standard input (--prompt -) must be UTF-8", "byte 0xe9 after 'thé caf'", "iconv"):
        assert said in err


def test_a_separator_that_is_not_utf_8(tritium, tmp_path):
    (tmp_path / "a.txt").write_text("a b")
    separator = b"\xa7".decode("utf-8", "surrogateescape")
    status, out, err = tritium("prepare", "a.txt", "--separator", separator, "--tokenizer", "bytes", "--out", "o")
    assert (status, out) == (2, "")
    assert "--separator must be UTF-8" in err
    assert "byte 0xa7" in err


# --------------------------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize("seed", [UINT64_MAX + 1, -(1 << 63) - 1, 99999999999999999999999])
@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (["sample", "RUN", "--seed"], "--seed"),
        (["train", "tiny", "--train.seed"], "--train.seed"),
        (["train", "tiny", "--data.seed"], "--data.seed"),
        (["prepare", "a.txt", "--out", "o", "--tokenizer", "bytes", "--seed"], "--seed"),
        (["kernels", "check", "reference", "--op", "gelu", "--device", "cpu", "--seed"], "--seed"),
    ],
)
def test_seeds_out_of_range(tritium, trained, run_folder, tmp_path, argv, flag, seed):
    (tmp_path / "a.txt").write_text("some text")
    status, out, err = tritium(*(run_folder if word == "RUN" else word for word in argv), seed)
    assert (status, out) == (2, "")
    assert f"{flag} must be from -" in err
    assert f"not {seed}" in err
    assert trained == []


def test_seeds_at_the_ends_of_the_range(tritium, trained, run_folder, monkeypatch):
    ask = ("sample", run_folder, "--prompt", "a", "--tokens", 1, "--device", "cpu", "--seed")
    for seed in (UINT64_MAX, -(1 << 63)):
        assert tritium(*ask, seed)[0] == 0
        assert tritium("train", "tiny", "--train.seed", seed, "--data.seed", seed)[0] == 0
    status, _, err = tritium(*ask, UINT64_MAX, "--num", 2)  # the second sample's seed is one more
    assert status == 2
    assert f"to {UINT64_MAX - 1}" in err
    monkeypatch.setenv("WORLD_SIZE", "2")  # each process draws its dropout from the seed plus its rank
    many = ("train", "tiny", "--train.batch_rows", 64, "--train.seed")
    assert tritium(*many, UINT64_MAX - 1)[0] == 0
    assert tritium(*many, UINT64_MAX)[0] == 2


def test_a_stored_seed_out_of_range(tritium, trained, tmp_path):
    tiny = presets.load("tiny")
    (tmp_path / "run").mkdir()
    stored = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, seed=1 << 70))
    (tmp_path / "run" / "config.json").write_text(stored.to_json())
    status, _, err = tritium("train", "run")
    assert status == 2
    assert f"--train.seed must be from -{1 << 63} to {UINT64_MAX}, not {1 << 70}" in err


# --------------------------------------------------------------------------------------------------------- config.json

DAMAGED = {
    "empty": "",
    "cut": '{"name": "sma',
    "binary": "\x00\x01",
    "list": "[1]",
    "section": '{"model": 5}',
    "text for int": '{"train": {"steps": "abc"}}',
    "bool for int": '{"train": {"steps": true}}',
    "null": '{"optim": {"lr": null}}',
    "text for list": '{"data": {"sources": "a.txt"}}',
    "numbers in list": '{"kernels": {"override": [1]}}',
    "unknown word": '{"model": {"norm": "batch"}}',
    "number for text": '{"run": {"out": 3}}',
    "deep": "[" * 100_000,
}


@pytest.fixture
def copied(run_folder, tmp_path):
    """A run that may be damaged."""
    return shutil.copytree(run_folder, tmp_path / "copied")


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_config_is_replaced_by_the_checkpoints(tritium, trained, copied, text):
    (copied / "config.json").write_text(text)
    status, _, err = tritium("train", copied, "--train.steps", 11)
    assert status == 0, err
    assert len(err.splitlines()) == 1
    assert f"warning: {copied}/config.json" in err
    assert f"{copied}/checkpoints/step_00000007" in err
    config = trained[-1]
    assert (config.name, config.model.n_embd, config.train.steps, config.run.out) == ("small", 16, 11, str(copied))


@pytest.mark.parametrize("text", [DAMAGED["empty"], DAMAGED["text for int"]])
@pytest.mark.parametrize("verb", ["sample", "evaluate"])
def test_inference_does_not_need_the_config(tritium, copied, verb, text):
    (copied / "config.json").write_text(text)
    status, out, err = tritium(verb, copied, *(["--tokens", 3] if verb == "sample" else []))
    assert status == 0, err
    assert out


def test_the_config_is_named_with_its_wrong_field(tritium, trained, copied):
    (copied / "config.json").write_text(DAMAGED["text for int"])
    assert 'train.steps wants a whole number, not "abc"' in tritium("train", copied)[2]


def test_whole_numbers_are_numbers(tritium, trained, copied):
    values = dataclasses.asdict(Config())
    values["optim"]["lr"] = 1
    (copied / "config.json").write_text(json.dumps(values))
    assert tritium("train", copied)[::2] == (0, "")
    assert trained[-1].optim.lr == 1


def test_a_missing_config_too(tritium, trained, copied):
    status, _, err = tritium("train", copied)
    assert status == 0
    assert "holds no config.json" in err
    assert trained[-1].name == "small"


def test_a_damaged_config_without_a_good_checkpoint(tritium, trained, copied):
    (copied / "config.json").write_text("")
    next((copied / "checkpoints").glob("*/run.json")).write_text("{")
    status, _, err = tritium("train", copied)
    assert status == 1
    for said in (f"{copied}/config.json", "no checkpoint", "is damaged: SHA-256", "--run.out"):
        assert said in err
    shutil.rmtree(copied / "checkpoints")
    status, _, err = tritium("train", copied)
    assert status == 1
    for said in (f"{copied}/config.json", "no checkpoint", "--run.out"):
        assert said in err
    assert trained == []


def test_a_field_that_nobody_knows_names_the_file(tritium, trained, copied):
    """Not replaced: whoever wrote it meant something."""
    (copied / "config.json").write_text('{"train": {"stps": 9}}')
    status, _, err = tritium("train", copied)
    assert status == 1
    for said in (f"{copied}/config.json", "no field stps", "remove"):
        assert said in err
    assert trained == []


# ---------------------------------------------------------------------------------------------------------------- rest


@pytest.mark.parametrize(("step", "steps", "suggested"), [(500, 500, 1000), (300, 100, 600), (0, 9, 18)])
def test_the_next_command_trains_on_from_where_the_run_is(tritium, trained, step, steps, suggested):
    trained.step = step
    out = tritium("train", "tiny", "--train.steps", steps)[1]
    assert f"--train.steps {suggested}\n" in out


def test_prepare_says_what_an_interruption_costs(tritium, monkeypatch):
    from tritium.engine.data.prepare import SHARD_TOKENS

    monkeypatch.setenv("COLUMNS", "200")
    words = " ".join(tritium("prepare", "--help")[1].split())
    assert f"goes on after the last finished shard ({SHARD_TOKENS:,} tokens)" in words
    assert "where it stopped" not in words


def test_prepare_takes_folders_of_a_quoted_glob(tritium, tmp_path):
    for i in range(2):
        (tmp_path / f"x/fold{i}").mkdir(parents=True)
        (tmp_path / f"x/fold{i}/a.txt").write_text(f"text {i}")
    ask = ("--tokenizer", "bytes", "--val-fraction", "0.5")
    status, quoted, err = tritium("prepare", tmp_path / "x/fold*", *ask, "--out", "quoted")
    assert status == 0, err
    expanded = tritium("prepare", tmp_path / "x/fold0", tmp_path / "x/fold1", *ask, "--out", "expanded")[1]
    figures = r"(\w+) +([\d,]+) tokens, (\d+) documents"
    assert re.findall(figures, quoted) == re.findall(figures, expanded) != []


def test_an_unknown_tokenizer_gets_the_nearest(tritium, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    status, _, err = tritium("prepare", "a.txt", "--tokenizer", "byts", "--out", "o")
    assert status == 1
    assert re.search(r"'byts' is neither known nor a file .*; the nearest are bytes, ", err)


def test_the_remedy_of_a_failed_preparation_works_as_printed(tritium, tmp_path):
    """One document: `train` says which `prepare` to call, and that one, pasted, makes the folder."""
    import shlex

    (tmp_path / "mine.txt").write_text("one\n\ntwo\n\nthree")
    ask = ("train", "tiny", "--data.sources", "mine.txt", "--data.tokenizer", "bytes")
    status, _, err = tritium(*ask, "--run.no-tensorboard", "--train.device", "cpu")
    assert status == 1
    (command,) = re.findall("`(tritium prepare [^`]+)`", err)
    assert cli.main(shlex.split(command)[1:]) == 0
    status, _, err = tritium(*ask, "--run.no-tensorboard", "--train.device", "cpu")
    assert status == 1
    assert "separator was '\\n\\n', now None" in err
    assert "--data.folder data/mine-bytes" in err
    (command,) = re.findall("`(tritium prepare [^`]+ --overwrite)`", err)
    (tmp_path / "mine.txt").write_text("line\n" * 50_000)  # several pieces
    assert cli.main(shlex.split(command)[1:]) == 0
