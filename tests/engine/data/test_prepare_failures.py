"""A preparation that failed is not in the way of the next one; what stops one says what to type and what to delete."""

import errno
import json
import re
import shlex
from pathlib import Path

import pytest

from tritium.engine import cli
from tritium.engine.data import corpus
from tritium.engine.data import prepare as module
from tritium.engine.data.corpus import find_sources
from tritium.engine.data.errors import DataError
from tritium.engine.data.prepare import PreparationInterrupted, Progress, is_prepared, prepare
from tritium.engine.data.shards import open_dataset
from tritium.engine.data.tokenizer import load_tokenizer


def run(source, out, **options):
    return prepare(source, out, **{"tokenizer": "bytes", "val_fraction": 0.1, "say": lambda _: None, **options})


def documents(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"text": f"{i} " * 20}) + "\n" for i in range(count)))
    return path


def stopped(source: Path, out: Path, at_tokens: int, monkeypatch, **options) -> str:
    """Ctrl-C at so many tokens; what it says."""

    def press(report: Progress) -> None:
        if report.tokens > at_tokens:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "PROGRESS_INTERVAL_S", 0.0)
        patch.setattr(module, "BATCH_BYTES", 500)
        with pytest.raises(PreparationInterrupted) as caught:
            run(source, out, progress=press, **options)
    return str(caught.value)


@pytest.fixture
def source(tmp_path) -> Path:
    return documents(tmp_path / "a.jsonl", 150)


# ---- failures that repeating cannot mend


def test_one_document_then_more(tmp_path):
    text, out = tmp_path / "mine.txt", tmp_path / "out"
    text.write_text("one document")
    with pytest.raises(DataError, match="a single document"):
        run(text, out)
    assert not (out / ".partial").exists()
    text.write_text("now some more lines\n" * 10_000)
    assert run(text, out).splits["val"].documents >= 1


@pytest.mark.parametrize("options", [{"val_fraction": 0}, {"separator": "\n"}])
def test_one_document_then_the_remedies_it_names(tmp_path, options):
    (tmp_path / "ws.txt").write_text("one\ntwo\nthree, of several")
    with pytest.raises(DataError, match="a single document"):
        run(tmp_path / "ws.txt", tmp_path / "out")
    run(tmp_path / "ws.txt", tmp_path / "out", **options)
    assert is_prepared(tmp_path / "out")


def test_nothing_left_to_train_on_then_more(tmp_path):
    (tmp_path / "same.txt").write_text("x#x#x")
    with pytest.raises(DataError, match="none is left for training"):
        run(tmp_path / "same.txt", tmp_path / "out", separator="#")
    (tmp_path / "same.txt").write_text("x#x#x#y#z")
    run(tmp_path / "same.txt", tmp_path / "out", separator="#", val_fraction=0.4)
    assert is_prepared(tmp_path / "out")


def test_what_was_complete_before_outlives_a_failure(source, tmp_path):
    out = tmp_path / "out"
    before = run(source, out)
    source.write_text(source.read_text() + "{broken\n")
    with pytest.raises(DataError, match=":151: not valid JSON"):
        run(source, out, overwrite=True, shard_tokens=997)
    assert not (out / ".partial").exists()
    assert open_dataset(out).manifest == before


def test_a_source_that_changes_meanwhile_can_be_read_again(source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_BYTES", 500)
    find = corpus.find_sources

    def appending(*arguments, **options):
        found = find(*arguments, **options)
        with source.open("a") as file:
            file.write('{"text": "appended"}\n')
        return found

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "find_sources", appending)
        with pytest.raises(DataError, match="it changed meanwhile"):
            run(source, tmp_path / "out", shard_tokens=997)
    run(source, tmp_path / "out", shard_tokens=997)
    assert is_prepared(tmp_path / "out")


def test_a_disk_that_fails_keeps_the_finished_shards(source, tmp_path, monkeypatch):
    """Repeating may mend this one."""
    out = tmp_path / "out"
    monkeypatch.setattr(module, "BATCH_BYTES", 500)
    with monkeypatch.context() as patch:
        read = corpus._Reader._raw

        def failing(self, file):
            patch.setattr(corpus, "BLOCK_BYTES", 4000)
            for i, block in enumerate(read(self, file)):
                if i == 2:
                    raise OSError(errno.EIO, "Input/output error")
                yield block

        patch.setattr(corpus._Reader, "_raw", failing)
        with pytest.raises(DataError, match="could not be read after"):
            run(source, out, shard_tokens=997)
    assert list((out / ".partial").glob("train_*.bin"))
    said: list[str] = []
    run(source, out, shard_tokens=997, say=said.append)
    assert re.search(r"[1-9]\d* finished shards?: going on from there", said[0])


# ---- an unfinished preparation with other arguments


def commands(error: BaseException | str) -> list[list[str]]:
    return [shlex.split(text) for text in re.findall("`(tritium prepare [^`]+)`", str(error))]


def test_an_unfinished_one_says_what_to_type_and_what_to_delete(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stopped(source, Path("out"), 5000, monkeypatch, shard_tokens=997)
    with pytest.raises(DataError, match="unfinished preparation made with other arguments") as caught:
        run("a.jsonl", "out", seed=3, val_fraction=0.25)
    said = str(caught.value)
    for needed in ("seed was 0, now 3", "delete out/.partial", "--overwrite"):
        assert needed in said
    (command,) = commands(said)
    assert cli.main(command[1:]) == 0, capsys.readouterr().err
    arguments = open_dataset("out").manifest.arguments
    assert (arguments["seed"], arguments["val_fraction"], arguments["tokenizer"]) == (3, 0.25, "bytes")


def test_deleting_what_it_names_is_enough(source, tmp_path, monkeypatch):
    import shutil

    out = tmp_path / "out"
    stopped(source, out, 5000, monkeypatch, shard_tokens=997)
    with pytest.raises(DataError) as caught:
        run(source, out, seed=3)
    shutil.rmtree(re.search(r"delete (\S+\.partial)", str(caught.value))[1])
    run(source, out, seed=3)
    assert is_prepared(out)


def test_complete_data_says_what_to_type(source, tmp_path, capsys):
    out = tmp_path / "out"
    run(source, out)
    spaced = tmp_path / "with space.txt"
    spaced.write_text("a\tb\n\nc\n\nd")
    with pytest.raises(DataError, match="holds complete data made with other arguments") as caught:
        run(spaced, out, separator="\n\n", field="body", val_fraction=0.4)
    assert f"--data.folder {out}" in str(caught.value)
    (command,) = commands(caught.value)
    assert cli.main(command[1:]) == 0, capsys.readouterr().err
    arguments = open_dataset(out).manifest.arguments
    assert (arguments["separator"], arguments["field"], arguments["val_fraction"]) == ("\n\n", "body", 0.4)


def test_many_sources_do_not_fill_the_screen(tmp_path):
    names = [documents(tmp_path / f"{i}.jsonl", 20) for i in range(40)]
    run(names, tmp_path / "out")
    with pytest.raises(DataError) as caught:
        run(names, tmp_path / "out", seed=2)
    assert len(str(caught.value)) < 1200
    assert "2.jsonl … " in str(caught.value)


# ---- interruption: what is kept


def test_an_interruption_before_the_first_shard_says_that_nothing_is_kept(source, tmp_path, monkeypatch):
    said = stopped(source, tmp_path / "out", 1000, monkeypatch, shard_tokens=10**6)
    assert "No shard of 1,000,000 tokens was finished, so no tokens are kept" in said
    assert "go on from there" not in said
    heard: list[str] = []
    run(source, tmp_path / "out", shard_tokens=10**6, say=heard.append)
    assert "no finished shard: beginning again" in heard[0]


def test_an_interruption_after_shards_says_how_many(source, tmp_path, monkeypatch):
    said = stopped(source, tmp_path / "out", 2000, monkeypatch, shard_tokens=997)
    assert re.search(r"[12] finished shards? (is|are) kept", said)


# ---- patterns


def test_folders_of_a_pattern_are_read_as_the_shell_would_give_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x/fold1/b.txt", "x/fold1/a.txt", "x/fold2/deep/c.txt", "x/folder.txt", "x/fold1/.hidden", "x/y.txt"):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)

    def names(*specs: str) -> list[str]:
        return [source.name for source in find_sources(list(specs))]

    expected = names("x/fold1", "x/fold2", "x/folder.txt")
    assert names("x/fold*") == expected
    assert expected == ["x/fold1/a.txt", "x/fold1/b.txt", "x/fold2/deep/c.txt", "x/folder.txt"]
    assert names(str(tmp_path / "x/fold[12]")) == [str(tmp_path / name) for name in expected[:3]]
    assert names("x/**") == names("x")  # a file and its folder both match: once is enough
    Path("x/fold3").mkdir()
    assert names("x/fold*") == expected
    with pytest.raises(DataError, match=r"matches no file .*1 folder.* no files"):
        find_sources("x/fold3*")


def test_a_pattern_never_takes_the_output_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    documents(Path("a.jsonl"), 50)
    first = run("*", "data/out")
    said: list[str] = []
    assert run("*", "data/out", say=said.append) == first
    assert said == ["data/out is up to date"]
    with pytest.raises(DataError, match="lies in the source folder"):
        run("data", "data/out")


# ---- names and seeds


@pytest.mark.parametrize(("name", "nearest"), [("gtp2", "gpt2"), ("byts", "bytes"), ("bpe-4096", "bpe:N")])
def test_unknown_tokenizers_get_the_nearest_first(name, nearest):
    with pytest.raises(DataError, match=rf"neither known nor a file .*; the nearest are {nearest}[ ,]"):
        load_tokenizer(name)


@pytest.mark.parametrize("seed", [1 << 64, -(1 << 63) - 1, 10**80])
def test_seeds_out_of_range(source, tmp_path, seed):
    with pytest.raises(DataError, match=f"seed must be from -{1 << 63} to {(1 << 64) - 1}, got {seed}"):
        run(source, tmp_path / "out", seed=seed)
    assert not (tmp_path / "out").exists()
