"""Tokenizers: lossless, the same every time, recognisable, and never fooled by text that spells a special token."""

import json
import os
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tritium.engine.data.errors import DataError
from tritium.engine.data.tokenizer import (
    END_OF_TEXT,
    IDENTITY_FILE,
    TOKENIZER_FILE,
    bpe_size,
    check_same_tokenizer,
    load_tokenizer,
    train_bpe,
)

TEXTS = [f"the cat number {i % 97} sat on the mat, word{i * i % 1009} did not; ünïcode 日本\n" for i in range(2000)]
BPE = train_bpe(TEXTS, 500)
BYTES = load_tokenizer("bytes")
UTF8 = st.text(st.characters(exclude_categories=["Cs"]))


@settings(deadline=None, derandomize=True)
@given(UTF8)
@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
def test_round_trip(tokenizer, text):
    for case in (text, f"{text}{END_OF_TEXT} {text}\n\n"):
        ids = tokenizer.encode(case)
        assert tokenizer.decode(ids) == case
        assert tokenizer.eot not in ids
        assert sum(tokenizer.token_bytes()[ids]) == len(case.encode())


def test_bytes():
    assert BYTES.encode("aé") == [97, 195, 169]
    assert (BYTES.vocab_size, BYTES.eot, BYTES.dtype) == (257, 256, "<u2")
    assert BYTES.decode([97, 256, 195]) == f"a{END_OF_TEXT}\ufffd"


def test_bytes_file_means_the_same_to_the_library(tmp_path):
    BYTES.save(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / TOKENIZER_FILE))
    text = "".join(map(chr, range(1, 1000)))
    assert library.encode(text, add_special_tokens=False).ids == list(text.encode())


def test_bpe_compresses_and_has_the_size_asked_for():
    assert (BPE.vocab_size, BPE.eot) == (500, 499)
    assert len(BPE.encode(TEXTS[0])) < 0.6 * len(TEXTS[0].encode())
    assert train_bpe(["ab"], 5000).vocab_size == 257


def test_documents_are_encodings_with_ends():
    for tokenizer in (BPE, BYTES):
        tokens, lengths = tokenizer.encode_documents([*TEXTS[:5], "", "x"])
        expected = [[*ids, tokenizer.eot] for ids in tokenizer.encode_batch([*TEXTS[:5], "", "x"])]
        assert tokens.tolist() == [i for ids in expected for i in ids]
        assert lengths.tolist() == [len(ids) for ids in expected]
        assert expected[0] == [*tokenizer.encode(TEXTS[0]), tokenizer.eot]
        assert tokens.dtype == tokenizer.dtype


def test_training_does_not_depend_on_threads_or_hash_seed():
    script = (
        "from tritium.engine.data.tokenizer import train_bpe\n"
        "texts = [f'w{i % 311} and {i * i % 1009} or x{i % 17}y{i % 19}' for i in range(3000)]\n"
        "print(train_bpe(texts, 800).identity)"
    )
    said = set()
    for seed, threads in (("1", "1"), ("2", "4")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        said.add(
            subprocess.run(
                [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
            ).stdout
        )
    assert len(said) == 1
    assert "800" in said.pop()


def test_save_and_load(tmp_path):
    for tokenizer in (BPE, BYTES):
        tokenizer.save(tmp_path)
        loaded = load_tokenizer(tmp_path)
        assert loaded.identity == tokenizer.identity
        assert loaded.encode(TEXTS[7]) == tokenizer.encode(TEXTS[7])
        assert loaded.decode(loaded.encode(END_OF_TEXT)) == END_OF_TEXT
        assert loaded.eot not in loaded.encode(END_OF_TEXT)


def test_any_tokenizer_file(tmp_path):
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 7}, unk_token="[UNK]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path / "any.json"
    library.save(str(path))
    with pytest.raises(DataError, match="no end-of-text token"):
        load_tokenizer(path)
    library.add_special_tokens(["</s>"])
    # What would cut, lengthen or decorate documents unseen.
    library.enable_truncation(2)
    library.enable_padding(length=9)
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", library.token_to_id("</s>"))]
    )
    library.save(str(path))
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("a b a b") == [1, 7, 1, 7]
    assert tokenizer.encode_batch(["a b a b", "a"]) == [[1, 7, 1, 7], [1]]
    assert tokenizer.vocab_size == 8  # ids have a gap; the largest is 7
    other = tmp_path / "other.json"
    other.write_text(path.read_text() + "\n")
    assert load_tokenizer(other).identity != tokenizer.identity


def test_identities_tell_tokenizers_apart():
    check_same_tokenizer(BPE.identity, dict(BPE.identity), "the checkpoint")
    for other in (BYTES, train_bpe(TEXTS[:100], 500), train_bpe(TEXTS, 501)):
        with pytest.raises(DataError, match=r"the checkpoint run/step_5 uses .*same ids mean other text"):
            check_same_tokenizer(BPE.identity, other.identity, "the checkpoint run/step_5")


def test_bad_specifications(tmp_path):
    assert bpe_size("bpe:4096") == 4096
    assert bpe_size("gpt2") is None
    for spec in ("bpe:256", "bpe:", "bpe:x", "bpe:-300", "bpe:99999999", "bpe:3e3"):
        with pytest.raises(DataError, match="size in bpe:N"):
            bpe_size(spec)
    with pytest.raises(DataError, match="has none here"):
        load_tokenizer("bpe:1000")
    with pytest.raises(DataError, match="neither known nor a file"):
        load_tokenizer("gpt3")
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json is not a tokenizer\.json"):
        load_tokenizer(tmp_path / "bad.json")


def test_damaged_saved_tokenizer(tmp_path):
    BPE.save(tmp_path)
    good = (tmp_path / TOKENIZER_FILE).read_bytes()
    (tmp_path / TOKENIZER_FILE).write_bytes(good.replace(b'"the"', b'"teh"'))
    with pytest.raises(DataError, match="changed or damaged"):
        load_tokenizer(tmp_path)
    (tmp_path / TOKENIZER_FILE).write_bytes(good)
    identity = json.loads((tmp_path / IDENTITY_FILE).read_text())
    del identity["eot"]
    (tmp_path / IDENTITY_FILE).write_text(json.dumps(identity))
    with pytest.raises(DataError, match="is damaged"):
        load_tokenizer(tmp_path)
