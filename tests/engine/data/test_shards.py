"""Opening prepared folders: what was written is read back, and every kind of damage is found."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from tritium.engine.data import shards
from tritium.engine.data.errors import DataError
from tritium.engine.data.prepare import prepare
from tritium.engine.data.shards import Manifest, open_dataset, read_manifest
from tritium.engine.data.tokenizer import IDENTITY_FILE, TOKENIZER_FILE, load_tokenizer

DOCUMENTS = [f"document {i}: " + "word " * (i * i % 23) for i in range(60)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    prepare(source, tmp_path / "data", tokenizer="bytes", val_fraction=0.2, shard_tokens=700, say=lambda _: None)
    return tmp_path / "data"


def rewrite(folder: Path, change) -> None:
    """A manifest with other content and a right checksum."""
    content = json.loads((folder / "manifest.json").read_text())
    del content["sha256"]
    change(content)
    (folder / "manifest.json").write_text(json.dumps({**content, "sha256": shards._digest(content)}))


def test_everything_is_there_once_and_in_order(folder):
    dataset = open_dataset(folder)
    found = []
    for name in shards.SPLITS:
        split = dataset.split(name)
        tokens = split.tokens(0, len(split))
        starts = split.document_starts(0, len(split)).tolist()
        assert len(dataset.manifest.splits[name].shards) >= (3 if name == "train" else 1)
        assert starts[0] == 0
        assert len(starts) == dataset.manifest.splits[name].documents
        texts = []
        for start, end in zip(starts, [*starts[1:], len(split)], strict=True):
            assert tokens[end - 1] == 256
            texts.append(bytes(tokens[start : end - 1].astype(np.uint8)).decode())
        assert sum(len(text.encode()) for text in texts) == dataset.manifest.splits[name].bytes
        assert texts == [text for text in DOCUMENTS if text in texts]  # the order is the corpus's
        found += texts
        assert dataset.manifest.splits[name].max_token_id == tokens.max() == 256
    assert sorted(found) == sorted(DOCUMENTS)


def test_ranges_across_shards(folder):
    split = open_dataset(folder).split("train")
    whole, starts = split.tokens(0, len(split)), split.document_starts(0, len(split))
    rng = np.random.default_rng(0)
    for low, high in np.sort(rng.integers(0, len(split) + 1, (300, 2)), axis=1).tolist():
        assert split.tokens(low, high).tolist() == whole[low:high].tolist()
        inside = starts[(starts >= low) & (starts < high)]
        assert split.document_starts(low, high).tolist() == inside.tolist()
        # seq_start by its definition, place by place
        expected = [max([s - low for s in inside.tolist() if s <= place] or [0]) for place in range(low, high)]
        found = split.seq_start(low, high - low)
        assert found.tolist() == expected
        assert found.dtype == np.int32
    with pytest.raises(IndexError):
        split.tokens(0, len(split) + 1)


def test_splits_survive_pickling(folder):
    split = open_dataset(folder).split("train")
    data = pickle.dumps(split)
    assert len(data) < 20_000
    assert pickle.loads(data).tokens(5, 900).tolist() == split.tokens(5, 900).tolist()


def test_the_manifest_round_trips_and_the_folder_is_self_contained(folder):
    manifest = read_manifest(folder)
    assert manifest.to_json() == (folder / "manifest.json").read_bytes()
    assert isinstance(manifest, Manifest)
    dataset = open_dataset(folder)
    assert dataset.tokenizer.identity == manifest.tokenizer == load_tokenizer("bytes").identity
    assert dataset.identity["train_tokens"] == manifest.splits["train"].tokens
    split = dataset.split("val")
    assert split.bits_per_byte(np.log(2)) == pytest.approx(split.manifest.tokens / split.manifest.bytes)


def test_a_flipped_bit_anywhere_is_found(folder):
    files = sorted(path for path in folder.iterdir() if path.is_file())
    assert len(files) >= 11
    rng = np.random.default_rng(0)
    for path in files:
        good = path.read_bytes()
        for place in (0, len(good) - 2, *rng.integers(0, len(good), 5).tolist()):
            bad = bytearray(good)
            bad[place] ^= 0x04
            path.write_bytes(bad)
            with pytest.raises(DataError) as caught:
                _ = open_dataset(folder).tokenizer
            assert path.name in str(caught.value) or "tokenizer" in str(caught.value)
        path.write_bytes(good)
    assert open_dataset(folder, verify=True).tokenizer.vocab_size == 257


def test_when_checksums_are_verified(folder, monkeypatch):
    path = folder / "train_00001.bin"
    bad = bytearray(path.read_bytes())
    bad[10] ^= 1
    path.write_bytes(bad)
    for verify in (None, True):
        with pytest.raises(DataError, match=r"train_00001\.bin has SHA-256"):
            open_dataset(folder, verify=verify)
    open_dataset(folder, verify=False)
    monkeypatch.setattr(shards, "VERIFY_BELOW_BYTES", 100)
    dataset = open_dataset(folder)
    with pytest.raises(DataError, match=r"train_00001\.bin has SHA-256"):
        dataset.verify()


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", ["train_00001.bin", "val_00000.idx"])
def test_missing_truncated_and_longer_files(folder, name, verify):
    path = folder / name
    good = path.read_bytes()
    for data, says in ((good[:-2], "is truncated"), (b"", "is truncated"), (good + b"xx", "is longer")):
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"{name} {says}.*manifest says {len(good)}"):
            open_dataset(folder, verify=verify)
    path.unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        open_dataset(folder, verify=verify)


def test_bad_manifests(folder, tmp_path):
    with pytest.raises(DataError, match="is not a prepared data folder"):
        open_dataset(tmp_path)
    path = folder / "manifest.json"
    good = path.read_text()
    for text, says in [
        ("", "is damaged"),
        (good[: len(good) // 2], "is damaged"),
        ("[]", "does not describe tritium-shards"),
        ('{"format": "other"}', "does not describe tritium-shards"),
        (good.replace('"tokens": 700', '"tokens": 701', 1), "does not match its own checksum"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=says):
            open_dataset(folder)
    path.write_text(good)
    rewrite(folder, lambda content: content.update(version=2))
    with pytest.raises(DataError, match="has format version 2, this version of tritium reads 1"):
        open_dataset(folder)
    path.write_text(good)
    rewrite(folder, lambda content: content["splits"]["train"].pop("bytes"))
    with pytest.raises(DataError, match="is damaged"):
        open_dataset(folder)


def test_another_tokenizer_in_the_folder(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    from tritium.engine.data.tokenizer import train_bpe

    train_bpe(DOCUMENTS, 300).save(other)
    for name in (TOKENIZER_FILE, IDENTITY_FILE):
        (folder / name).write_bytes((other / name).read_bytes())
    with pytest.raises(DataError, match="decoding would give other text"):
        _ = open_dataset(folder).tokenizer


def test_splits_that_are_not_there(folder, tmp_path):
    with pytest.raises(DataError, match="no split 'test'"):
        open_dataset(folder).split("test")
    prepare(tmp_path / "a.jsonl", tmp_path / "all", tokenizer="bytes", val_fraction=0, say=lambda _: None)
    with pytest.raises(DataError, match="no tokens: it was prepared with val_fraction 0"):
        open_dataset(tmp_path / "all").split("val")
