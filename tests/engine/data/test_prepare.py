"""Preparation: the same bytes for every number of workers and after every kind of interruption; nothing good is ever
lost."""

import contextlib
import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tritium.engine.data import corpus
from tritium.engine.data import prepare as module
from tritium.engine.data.errors import DataError
from tritium.engine.data.prepare import PreparationInterrupted, Progress, is_prepared, prepare
from tritium.engine.data.shards import open_dataset
from tritium.engine.data.tokenizer import train_bpe

OPTIONS = {"tokenizer": "bytes", "val_fraction": 0.1, "shard_tokens": 997}


def quiet(_: str) -> None:
    pass


def run(source, out, **options):
    return prepare(source, out, **{**OPTIONS, "say": quiet, **options})


def write_documents(path: Path, count: int, size: int = 60) -> Path:
    with open(path, "w") as file:
        for i in range(count):
            file.write(json.dumps({"text": f"{i}: " + f"word{i * i % 101} " * (i * 7 % max(1, size // 4))}) + "\n")
    return path


@pytest.fixture
def source(tmp_path) -> Path:
    return write_documents(tmp_path / "a.jsonl", 150)


def content(folder: Path) -> dict[str, str]:
    """Every file and its hash: what two runs must agree on."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def small_batches(monkeypatch):
    monkeypatch.setattr(module, "BATCH_BYTES", 500)


def texts(out: Path) -> dict[str, list[str]]:
    dataset = open_dataset(out)
    found = {}
    for name in ("train", "val"):
        split = dataset.split(name)
        data = split.tokens(0, len(split))
        ends = np.flatnonzero(data == 256)
        found[name] = [bytes(part[:-1].astype(np.uint8)).decode() for part in np.split(data, ends + 1)[:-1]]
    return found


# ---- what comes out


def test_every_document_lands_in_one_split_by_its_hash(source, tmp_path):
    run(source, tmp_path / "out", val_fraction=0.3)
    found = texts(tmp_path / "out")
    given = [json.loads(line)["text"] for line in source.read_text().splitlines()]
    assert sorted(found["train"] + found["val"]) == sorted(given)
    assert 25 <= len(found["val"]) <= 65
    # Reordering or adding documents moves none to the other side; another seed does.
    lines = source.read_text().splitlines()
    source.write_text("\n".join(lines[::-1] + ['{"text": "one more"}']))
    run(source, tmp_path / "reordered", val_fraction=0.3)
    assert set(found["val"]) <= set(texts(tmp_path / "reordered")["val"]) <= {*found["val"], "one more"}
    run(source, tmp_path / "seed", val_fraction=0.3, seed=1)
    assert set(texts(tmp_path / "seed")["val"]) != set(found["val"])


def test_manifest_says_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("b").mkdir()
    Path("b/x.txt").write_text("one\n\ntwo\n\nthree\n\n\n\nfour")
    Path("a.jsonl").write_text('{"body": "é"}\n{"body": ""}\n')
    manifest = run(["b", "a.jsonl"], "out", separator="\n\n", field="body", val_fraction=0.2)
    assert [s["name"] for s in manifest.sources] == ["b/x.txt", "a.jsonl"]
    assert manifest.sources[1] == {
        "name": "a.jsonl",
        "bytes": 28,
        "sha256": hashlib.sha256(Path("a.jsonl").read_bytes()).hexdigest(),
    }
    splits = manifest.splits.values()
    assert sum(split.documents for split in splits) == 5
    assert sum(split.bytes for split in splits) == len("onetwothreefouré".encode())
    assert sum(split.tokens for split in splits) == len("onetwothreefouré".encode()) + 5
    assert manifest.arguments["empty_documents_left_out"] == 2
    assert str(tmp_path) not in Path("out/manifest.json").read_text()


def test_workers_do_not_change_a_byte(source, tmp_path, monkeypatch):
    small_batches(monkeypatch)
    train_bpe([f"word{i} " for i in range(300)], 400).save(tmp_path)
    for tokenizer in (tmp_path / "tokenizer.json", "bpe:300"):
        results = []
        for workers in (0, 1, 2, 3):
            out = tmp_path / f"out_{Path(tokenizer).stem}_{workers}"
            if workers in (1, 3) and tokenizer == "bpe:300":
                continue
            run(source, out, tokenizer=tokenizer, workers=workers)
            results.append(content(out))
        assert all(result == results[0] for result in results)
        assert len(results[0]) > 10


def test_batch_size_does_not_change_tokens(source, tmp_path, monkeypatch):
    run(source, tmp_path / "large")
    small_batches(monkeypatch)
    run(source, tmp_path / "small")
    assert content(tmp_path / "small") == content(tmp_path / "large")


def test_a_shard_may_hold_one_token_and_a_document_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    short = write_documents(tmp_path / "b.jsonl", 8, 16)
    run(short, tmp_path / "one", shard_tokens=1)
    run(short, tmp_path / "all", shard_tokens=10**6)
    assert texts(tmp_path / "one") == texts(tmp_path / "all")
    a, b = (open_dataset(tmp_path / name).split("train") for name in ("one", "all"))
    assert a.document_starts(0, len(a)).tolist() == b.document_starts(0, len(b)).tolist()


def test_few_documents_still_give_one_for_validation(tmp_path):
    (tmp_path / "a.txt").write_text("a#b#c")
    manifest = run(tmp_path / "a.txt", tmp_path / "out", separator="#", val_fraction=0.0001)
    assert (manifest.splits["train"].documents, manifest.splits["val"].documents) == (2, 1)
    text = "".join(f"line {i}\n" for i in range(30_000))
    (tmp_path / "book.txt").write_text(text)
    manifest = run(tmp_path / "book.txt", tmp_path / "book", val_fraction=0.0001, shard_tokens=10**5)
    assert manifest.splits["val"].documents == 1
    assert sum(split.bytes for split in manifest.splits.values()) == len(text)


def test_documents_that_cannot_be_split(tmp_path):
    (tmp_path / "a.txt").write_text("only one")
    with pytest.raises(DataError, match="a single document"):
        run(tmp_path / "a.txt", tmp_path / "out")
    assert run(tmp_path / "a.txt", tmp_path / "none", val_fraction=0).splits["val"].tokens == 0
    (tmp_path / "same.txt").write_text("x#x#x")
    with pytest.raises(DataError, match="none is left for training"):
        run(tmp_path / "same.txt", tmp_path / "same", separator="#")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}')
    with pytest.raises(DataError, match="hold 0 documents"):
        run(tmp_path / "empty.jsonl", tmp_path / "empty")


def test_large_vocabularies_take_four_bytes(source, tmp_path):
    import tokenizers

    library = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "</s>": 1, "word1": 70_000}, unk_token="[UNK]")
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    library.save(str(tmp_path / "t.json"))
    manifest = run(source, tmp_path / "out", tokenizer=tmp_path / "t.json")
    assert manifest.dtype == "<u4"
    assert manifest.splits["train"].max_token_id == 70_000
    split = open_dataset(tmp_path / "out").split("train")
    assert int(split.tokens(0, len(split)).max()) == 70_000


def test_bpe_is_trained_on_training_documents_alone(tmp_path):
    documents = [f"document{i} qzqzqzqz{i}" for i in range(40)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents))
    run(path, tmp_path / "bytes", val_fraction=0.3)
    split = texts(tmp_path / "bytes")
    run(path, tmp_path / "bpe", val_fraction=0.3, tokenizer="bpe:400")
    dataset = open_dataset(tmp_path / "bpe")
    assert dataset.tokenizer.identity == train_bpe(split["train"], 400).identity != train_bpe(documents, 400).identity


def test_bpe_sample_takes_of_each_source_by_size(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BPE_SAMPLE_BYTES", 5_000)
    for name, count in (("big", 900), ("small", 100)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(f'{{"text": "{name} {i:03} {"x" * 80}"}}\n' for i in range(count))
        )
    seen: list[str] = []
    monkeypatch.setattr(module, "train_bpe", lambda sample, size: train_bpe(seen.extend(sample) or seen, size))
    run([tmp_path / "small.jsonl", tmp_path / "big.jsonl"], tmp_path / "out", tokenizer="bpe:300")
    big = sum(text.startswith("big") for text in seen)
    assert 45 <= big <= 55
    assert 4 <= len(seen) - big <= 8


def test_progress(source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PROGRESS_INTERVAL_S", 0.0)
    small_batches(monkeypatch)
    reports: list[Progress] = []
    manifest = run(source, tmp_path / "out", progress=reports.append)
    assert len(reports) > 5
    assert [r.tokens for r in reports] == sorted(r.tokens for r in reports)
    last = reports[-1]
    assert last.bytes == last.bytes_total == source.stat().st_size
    assert last.tokens == sum(split.tokens for split in manifest.splits.values())
    assert (last.documents, last.phase) == (150, "tokens")
    assert last.tokens_per_s > 0


# ---- running again


def test_up_to_date(source, tmp_path, monkeypatch):
    said: list[str] = []
    first = run(source, tmp_path / "out", tokenizer="bpe:300")
    before = content(tmp_path / "out")
    os.utime(source)  # another date, the same text
    with monkeypatch.context() as patch:
        patch.setattr(module._Job, "_one_pass", lambda *_: pytest.fail("tokenized again"))
        assert run(source, tmp_path / "out", tokenizer="bpe:300", say=said.append) == first
    assert said == [f"{tmp_path / 'out'} is up to date"]
    assert content(tmp_path / "out") == before


def test_other_arguments_are_refused_and_overwrite_replaces(source, tmp_path):
    out = tmp_path / "out"
    run(source, out)
    before = content(out)
    for options, says in [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"tokenizer": "bpe:300"}, "tokenizer was 'bytes', now 'bpe:300'"),
        ({"shard_tokens": 500}, "shard_tokens was 997, now 500"),
        ({"separator": "#"}, "separator was None, now '#'"),
    ]:
        with pytest.raises(DataError, match=says):
            run(source, out, **options)
    text = source.read_text()
    source.write_text(text.replace("word1", "word2"))  # the same size
    with pytest.raises(DataError, match="its sources or its tokenizer's file changed"):
        run(source, out)
    source.write_text(text)
    assert content(out) == before
    run(source, out, shard_tokens=5000, overwrite=True)
    run(source, tmp_path / "fresh", shard_tokens=5000)
    assert content(out) == content(tmp_path / "fresh")


def test_folders_that_are_not_ours(source, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"holds 1 files \(thesis.txt"):
            run(source, tmp_path / "mine", overwrite=overwrite)
    assert content(tmp_path / "mine").keys() == {"thesis.txt"}
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/below", "/proc/cannot"):
        with pytest.raises(DataError, match="cannot be made"):
            run(source, out)
    for out in (tmp_path / "out", tmp_path):
        with pytest.raises(DataError, match="lies in the source folder"):
            run(tmp_path, out)


def test_bad_arguments_leave_no_folder(source, tmp_path):
    for options, says in [
        ({"val_fraction": 1.0}, "val_fraction must be"),
        ({"val_fraction": -0.1}, "val_fraction must be"),
        ({"shard_tokens": 0}, "shard_tokens must be"),
        ({"workers": -1}, "workers must be"),
    ]:
        with pytest.raises(DataError, match=says):
            run(source, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    for options, says in [
        ({"tokenizer": "gpt9"}, "neither known"),
        ({"tokenizer": "bpe:3"}, "size in bpe:N"),
        ({"separator": ""}, "separator"),
    ]:
        with pytest.raises(DataError, match=says):
            run(source, tmp_path / "out", **options)
        assert not is_prepared(tmp_path / "out")


def test_a_bad_line_late_in_the_corpus_is_an_error_and_can_be_mended(source, tmp_path, monkeypatch):
    small_batches(monkeypatch)
    good = source.read_text()
    for workers in (0, 2):
        source.write_text(good + "{broken\n")
        out = tmp_path / f"out{workers}"
        with pytest.raises(DataError, match=":151: not valid JSON"):
            run(source, out, workers=workers)
        assert not is_prepared(out)
        source.write_text(good)
        run(source, out)
    assert content(tmp_path / "out0") == content(tmp_path / "out2")


def test_two_at_once(source, tmp_path):
    out = tmp_path / "out"
    seen: list[str] = []

    def second(_: Progress) -> None:
        with pytest.raises(DataError, match="Another process is preparing"):
            run(source, out)
        seen.append("refused")

    run(source, out, progress=second)
    assert seen
    assert is_prepared(out)


def test_a_run_that_failed_before_its_first_shard_leaves_nothing_to_care_about(source, tmp_path):
    good = source.read_text()
    source.write_text("{broken\n" + good)
    with pytest.raises(DataError, match=":1: not valid JSON"):
        run(source, tmp_path / "out")
    source.write_text(good)
    run(source, tmp_path / "out")
    run(source, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


# ---- interruption


def kill_points(source: Path, out: Path, point: int, **options) -> bool:
    """Prepare in a forked process that gets SIGKILL at its `point`-th renaming; whether it got that far."""
    child = os.fork()
    if child == 0:
        count = 0
        replace = os.replace

        def killing(*arguments):
            nonlocal count
            count += 1
            if count == point:
                if point % 2:
                    replace(*arguments)  # odd points: just after, even ones: just before
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*arguments)

        os.replace = killing
        try:
            run(source, out, **options)
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize(
    "options",
    [{}, {"val_fraction": 0.0001}, {"tokenizer": "bpe:280", "shard_tokens": 600}],
    ids=["plain", "second pass", "bpe"],
)
def test_killed_at_every_renaming_and_resumed(tmp_path, monkeypatch, options):
    small_batches(monkeypatch)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a killed process loses nothing that it wrote
    source = write_documents(tmp_path / "a.jsonl", 36)
    run(source, tmp_path / "whole", **options)
    expected = content(tmp_path / "whole")
    point = killed = 0
    while True:
        point += 1
        out = tmp_path / f"out{point}"
        if not kill_points(source, out, point, **options):
            break
        killed += 1
        if point % 5 == 0:
            kill_points(source, out, point // 2 + 1, **options)  # a second time on the way
        run(source, out, **options)
        assert content(out) == expected, f"killed at renaming {point}"
    assert killed > 20


def test_resuming_tokenizes_only_what_is_missing(source, tmp_path, monkeypatch):
    small_batches(monkeypatch)
    tokenized: list[int] = []
    encode = module.Tokenizer.encode_documents
    monkeypatch.setattr(
        module.Tokenizer, "encode_documents", lambda self, t: (tokenized.append(len(t)), encode(self, t))[1]
    )
    run(source, tmp_path / "whole")
    out = tmp_path / "out"
    assert kill_points(source, out, 20)
    assert sum(tokenized) == 150
    tokenized.clear()
    said: list[str] = []
    run(source, out, say=said.append)
    assert 0 < sum(tokenized) < 120
    assert "finished shards: going on from there" in said[0]
    assert content(out) == content(tmp_path / "whole")


def test_resuming_with_other_arguments_or_lost_shards(source, tmp_path):
    out = tmp_path / "out"
    assert kill_points(source, out, 20)
    with pytest.raises(DataError, match=r"unfinished preparation made with other arguments \(seed was 0, now 5\)"):
        run(source, out, seed=5)
    shard = out / ".partial/train_00001.bin"
    data = shard.read_bytes()
    shard.write_bytes(data[:-2])
    with pytest.raises(DataError, match=r"train_00001\.bin was finished by an earlier run and is now missing"):
        run(source, out)
    shard.write_bytes(data)
    run(source, out)
    run(source, tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")
    assert kill_points(source, tmp_path / "again", 20)
    run(source, tmp_path / "again", overwrite=True, seed=5)
    assert open_dataset(tmp_path / "again").manifest.arguments["seed"] == 5


def test_killed_while_replacing_old_data(source, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    run(source, tmp_path / "old")
    run(source, tmp_path / "new", shard_tokens=1500)
    old, new = content(tmp_path / "old"), content(tmp_path / "new")
    kept = replaced = 0
    for point in range(1, 60, 4):
        out = tmp_path / f"out{point}"
        run(source, out)
        if not kill_points(source, out, point, shard_tokens=1500, overwrite=True):
            break
        if is_prepared(out):
            found = {name: digest for name, digest in content(out).items() if not name.startswith(".partial")}
            assert found in (old, new)
            kept += found == old
        else:
            replaced += 1
        run(source, out, shard_tokens=1500, overwrite=is_prepared(out))
        assert content(out) == new
    assert kept > 5
    assert replaced > 2


SCRIPT = """
import sys
from tritium.engine.data import prepare as module
module.BATCH_BYTES = 2000
if __name__ == "__main__":
    try:
        options = {"val_fraction": 0.1, "shard_tokens": 20_000, "workers": int(sys.argv[4])}
        module.prepare(sys.argv[1], sys.argv[2], sys.argv[3], **options)
    except KeyboardInterrupt as error:
        sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> tuple[Path, Path, Path]:
    """(script, source, tokenizer file): seconds of work for two processes."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "script.py").write_text(SCRIPT)
    train_bpe([f"word{i} " for i in range(300)], 300).save(folder)
    return folder / "script.py", write_documents(folder / "a.jsonl", 3_000, 400), folder / "tokenizer.json"


def start(slow, out: Path, workers: int) -> subprocess.Popen:
    script, source, tokenizer = slow
    command = [sys.executable, str(script), str(source), str(out), str(tokenizer), str(workers)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_shards(process: subprocess.Popen, out: Path, count: int) -> None:
    until = time.monotonic() + 60
    while len(list(out.glob(".partial/train_*.idx"))) < count:
        assert process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < until
        time.sleep(0.005)


def alive_in_session(session: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def test_a_real_kill_with_workers(slow, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert start(slow, whole, 0).wait(60) == 0
    killed = start(slow, out, 2)
    wait_for_shards(killed, out, 3)
    killed.kill()
    killed.wait()
    until = time.monotonic() + 20
    while alive_in_session(killed.pid) and time.monotonic() < until:
        time.sleep(0.02)
    assert not alive_in_session(killed.pid), "its workers outlived it"
    assert not is_prepared(out)
    entered = json.loads((out / ".partial/progress.json").read_text())["splits"]
    kept = {entry["shard"]["file"]: 0 for entries in entered.values() for entry in entries}
    assert len(kept) >= 2
    kept = {name: (out / ".partial" / name).stat().st_mtime_ns for name in kept}
    assert start(slow, out, 2).wait(60) == 0
    assert content(out) == content(whole)
    assert all((out / name).stat().st_mtime_ns == mtime for name, mtime in kept.items()), (
        "finished shards were written again"
    )


def test_control_c(slow, tmp_path):
    out = tmp_path / "out"
    process = start(slow, out, 2)
    wait_for_shards(process, out, 2)
    os.killpg(process.pid, signal.SIGINT)  # to the whole group, as a terminal does
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "PreparationInterrupted: Preparation of" in said
    assert "repeat with the same arguments to go on" in said
    assert "Traceback" not in said
    assert (out / ".partial/progress.json").exists()


def workers_of(process: subprocess.Popen) -> list[int]:
    found = []
    for pid in alive_in_session(process.pid):
        with contextlib.suppress(OSError):
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def test_control_c_while_the_workers_start(slow, tmp_path):
    """A worker takes a second to import what it needs, and only then could it say that Ctrl-C is not for it."""
    process = start(slow, tmp_path / "out", 2)
    until = time.monotonic() + 60
    while len(workers_of(process)) < 2:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.005)
    time.sleep(0.1)  # into their imports
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "PreparationInterrupted: Preparation of" in said and "Traceback" not in said, said


def test_interrupts_in_the_process_itself(source, tmp_path, monkeypatch):
    small_batches(monkeypatch)
    monkeypatch.setattr(module, "PROGRESS_INTERVAL_S", 0.0)

    def press(report: Progress) -> None:
        if report.tokens > 5000:
            raise KeyboardInterrupt

    run(source, tmp_path / "whole")
    with pytest.raises(PreparationInterrupted, match=r"[1-9]\d* finished shards are kept"):
        run(source, tmp_path / "out", progress=press)
    run(source, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_worker_that_dies(slow, tmp_path):
    out = tmp_path / "out"
    process = start(slow, out, 2)
    wait_for_shards(process, out, 1)
    workers = workers_of(process)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ended abruptly, most likely for lack of memory (2 processes)" in said


# ---- no room


def test_full_disk_keeps_what_was_complete(source, tmp_path, monkeypatch):
    small_batches(monkeypatch)
    out = tmp_path / "out"
    run(source, out)
    before = content(out)
    run(source, tmp_path / "whole", seed=3)
    write = module._HashedFile.write
    for limit in (0, 3000, 9000):
        written = 0

        def filling(self, data, limit=limit):
            nonlocal written
            written += len(data)
            if written > limit:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(self, data)

        with monkeypatch.context() as patch:
            patch.setattr(module._HashedFile, "write", filling)
            with pytest.raises(
                DataError, match=r"No space to write .*repeat with the same arguments.*complete before is untouched"
            ):
                run(source, out, seed=3, overwrite=True)
        found = {name: digest for name, digest in content(out).items() if not name.startswith(".partial")}
        assert found == before
        open_dataset(out)
    run(source, out, seed=3, overwrite=True)
    assert content(out) == content(tmp_path / "whole")


def test_a_real_limit_on_file_size(source, tmp_path):
    def prepare_limited() -> str:
        try:
            run(source, tmp_path / "out", shard_tokens=10**6)
        except DataError as error:
            return str(error)
        return "no error"

    result: list[str] = []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        thread = threading.Thread(target=lambda: result.append(prepare_limited()))
        thread.start()
        thread.join()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "No space to write" in result[0]
    assert not is_prepared(tmp_path / "out")
    run(source, tmp_path / "out", shard_tokens=10**6)
    assert is_prepared(tmp_path / "out")


# ---- memory

MEASURE = """
import resource, sys
from tritium.engine.data import prepare as module
if __name__ == "__main__":
    options = {"shard_tokens": 1 << 20, "workers": int(sys.argv[4]), "say": lambda _: None}
    module.prepare(sys.argv[1], sys.argv[2], sys.argv[3], **options)
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        print(resource.getrusage(who).ru_maxrss // 1024)
"""


@pytest.mark.parametrize(("suffix", "tokenizer", "workers", "sizes_mb"), [
    ("txt", "bytes", 0, (4, 48)),
    ("jsonl", "bytes", 2, (4, 30)),
    ("jsonl", "trained", 0, (1, 4)),
])  # fmt: skip
def test_memory_does_not_grow_with_the_corpus(tmp_path, suffix, tokenizer, workers, sizes_mb):
    if tokenizer == "trained":
        train_bpe(["ab cd ef"], 258).save(tmp_path)
        tokenizer = str(tmp_path / "tokenizer.json")
    (tmp_path / "measure.py").write_text(MEASURE)
    peaks = []
    for size in sizes_mb:
        path = tmp_path / f"{size}.{suffix}"
        line = (
            ("lorem ipsum " * 30 + "\n").encode()
            if suffix == "txt"
            else (json.dumps({"text": "lorem ipsum " * 30}) + "\n").encode()
        )
        # Not all alike, or all documents would go to one split.
        with open(path, "wb") as file:
            for i in range(size * 2**20 // len(line)):
                file.write(line.replace(b"lorem", b"%05d" % (i % 99_991), 1))
        command = [
            sys.executable,
            str(tmp_path / "measure.py"),
            str(path),
            str(tmp_path / f"out{size}"),
            tokenizer,
            str(workers),
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        peaks.append([int(mb) for mb in said])
        path.unlink()
    growth = [large - small for small, large in zip(*peaks, strict=True)]
    assert max(growth) < 16, f"peaks in MiB (self, children): {peaks}"


def test_imports_are_light():
    script = (
        "import sys\n"
        "import tritium.engine.data.prepare\n"
        "assert not {'torch', 'rich', 'tyro', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_pieces_are_the_documented_constants():
    """Changing one changes the shards of the same arguments, so both are among the arguments that are compared."""
    assert corpus.PIECE_BYTES == 65536
    assert module.BPE_SAMPLE_BYTES == 64 * 2**20
