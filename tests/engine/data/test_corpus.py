"""Reading documents: every form gives the same text, every kind of damage a message that says where."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tritium.engine.data import corpus
from tritium.engine.data.corpus import PIECE_BYTES, find_sources, read_documents
from tritium.engine.data.errors import DataError

COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def read(spec, **options) -> list[str]:
    return [text for source in find_sources(spec) for text in read_documents(source, **options)]


def random_text(size: int, line: int = 80) -> str:
    words = [f"wörd{i * i % 977}" for i in range(size // 7)]
    return "\n".join(" ".join(words[i : i + line // 8]) for i in range(0, len(words), line // 8)) + "\n"


@pytest.mark.parametrize("suffix", COMPRESS)
def test_text_is_kept_exactly(tmp_path, suffix):
    text = "first\r\nsecond\n\n\n  日本語 é \U0001f600\nno end"
    assert read(write(tmp_path / f"a.txt{suffix}", COMPRESS[suffix](text.encode()))) == [text]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines(tmp_path, suffix):
    lines = [{"text": "one\ntwo"}, {"id": 3, "text": ""}, {"text": "é\u0000"}]
    data = ("\n".join(map(json.dumps, lines)) + "\n\n").encode()
    path = write(tmp_path / f"a.jsonl{suffix}", COMPRESS[suffix](data))
    assert read(path) == ["one\ntwo", "", "é\u0000"]
    assert read(write(tmp_path / "b.ndjson", '{"body": "x"}'), field="body") == ["x"]


def test_a_byte_order_mark_is_dropped_and_counted_in_offsets(tmp_path):
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfabc")) == ["abc"]
    with pytest.raises(DataError, match="at byte 5 there"):
        read(write(tmp_path / "b.txt", b"\xef\xbb\xbfab\xffc"))


def test_long_text_comes_in_pieces_cut_at_line_ends(tmp_path):
    text = random_text(5 * PIECE_BYTES)
    pieces = read(write(tmp_path / "a.txt", text))
    assert "".join(pieces) == text
    assert len(pieces) >= 5
    assert all(len(piece.encode()) <= PIECE_BYTES for piece in pieces)
    assert all(piece.endswith("\n") for piece in pieces)
    assert all(len(piece.encode()) > PIECE_BYTES - 200 for piece in pieces[:-1])


@pytest.mark.parametrize("unit", ["x", "é", "日", "\U0001f600", "ab "])
def test_text_without_line_ends_is_cut_between_characters(tmp_path, unit):
    text = unit * (3 * PIECE_BYTES // len(unit.encode())) + "!"
    pieces = read(write(tmp_path / "a.txt", text))
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= PIECE_BYTES for piece in pieces)
    assert len(pieces) >= 3


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(st.text(st.sampled_from("ab#\né"), max_size=6), min_size=1), st.sampled_from(["#", "##", "\n\n", "a#b"])
)
def test_separator_is_str_split(tmp_path_factory, parts, separator):
    text = separator.join(parts) or "x"
    path = write(tmp_path_factory.mktemp("separator") / "a.txt", text)
    expected = text.split(separator)
    assert read(path, separator=separator) == (expected if expected[-1] else expected[:-1])


def test_separator_across_block_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK_BYTES", 3)
    text = "aa<|sep|>b<|sep|><|sep|>cccc<|sep|>é"
    assert read(write(tmp_path / "a.txt", text), separator="<|sep|>") == ["aa", "b", "", "cccc", "é"]
    assert read(write(tmp_path / "a.jsonl", '{"text": "é1"}\n{"text": "2"}')) == ["é1", "2"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_concatenated_compressed_members_are_one_text(tmp_path, suffix):
    parts = [random_text(300_000).encode(), b"", b"last"]
    path = write(tmp_path / f"a.txt{suffix}", b"".join(map(COMPRESS[suffix], parts)))
    assert "".join(read(path)).encode() == b"".join(parts)


def test_folders_globs_and_mixtures(tmp_path):
    write(tmp_path / "b/2.txt", "two")
    write(tmp_path / "b/c/1.jsonl", '{"text": "one"}')
    write(tmp_path / "b/.hidden", "never")
    write(tmp_path / "b/.git/x.txt", "never")
    write(tmp_path / "0.txt", "zero")
    assert read(tmp_path / "b") == ["two", "one"]
    assert read(str(tmp_path / "**/*.txt")) == ["zero", "two"]
    assert read([tmp_path / "b/2.txt", str(tmp_path / "0*")]) == ["two", "zero"]


def test_every_block_of_the_file_is_seen(tmp_path):
    data = gzip.compress(random_text(1_500_000).encode())
    (source,) = find_sources(write(tmp_path / "a.txt.gz", data))
    seen: list[bytes] = []
    assert sum(len(text) for text in read_documents(source, on_block=seen.append)) > 500_000
    assert b"".join(seen) == data


def broken(tmp_path, name, data, says, **options):
    path = write(tmp_path / name, data)
    with pytest.raises(DataError) as caught:
        read(path, **options)
    for words in (str(path), *says):
        assert words in str(caught.value)


def test_bad_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty_folder").mkdir()
    for spec, says in [
        ("nowhere.txt", "does not exist"),
        ("*.nothing", "matches no file"),
        ("empty_folder", "holds no files"),
        ([], "none was given"),
        ("/dev/null", "not a regular file"),
    ]:
        with pytest.raises(DataError, match=says):
            find_sources(spec)
    broken(tmp_path, "empty.txt", b"", ["is empty (0 bytes)"])
    broken(tmp_path, "empty.txt.gz", gzip.compress(b""), ["holds no text once decompressed"])
    broken(tmp_path, "blank.jsonl", b"\n\n  \n", ["holds no JSON objects"])


def test_binary_text_names_the_byte(tmp_path):
    lead = random_text(3 * PIECE_BYTES).encode()
    broken(tmp_path, "nul.txt", lead + b"a\0b", [f"at byte {len(lead) + 1} ", "NUL"])
    broken(tmp_path, "latin1.txt", lead + "é".encode("latin-1") + b"x", [f"at byte {len(lead)} ", "0xe9"])
    broken(tmp_path, "cut.txt", "aé".encode()[:-1], ["at byte 1 ", "0xc3"])
    broken(tmp_path, "first_wins.txt", b"\xff\0", ["at byte 0 ", "0xff"])
    broken(tmp_path, "in.txt.gz", gzip.compress(b"abc\0"), ["at byte 3 of the decompressed text"])
    broken(tmp_path, "separated.txt", b"a#b#c\xffd", ["at byte 5 "], separator="#")
    broken(tmp_path, "utf16.txt", "abc".encode("utf-16-le"), ["at byte 1 ", "NUL"])
    broken(tmp_path, "a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', [f"at byte {14 + 10} "])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_and_damaged_compression(tmp_path, suffix):
    data = COMPRESS[suffix](random_text(700_000).encode())
    for size in (len(data) - 1, len(data) // 2, 3):
        broken(tmp_path, f"cut{size}.txt{suffix}", data[:size], ["truncated", "decompressed bytes are readable"])
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0x10
    broken(tmp_path, f"flipped.txt{suffix}", bytes(flipped), ["not a sound"])
    broken(tmp_path, f"trailing.txt{suffix}", data + b"garbage", ["not a sound"])
    broken(tmp_path, f"plain.txt{suffix}", b"just some text", ["not a sound"])


def test_truncation_reports_what_was_readable(tmp_path):
    text = random_text(700_000).encode()
    data = gzip.compress(text)[:-8]  # all of the text, but not its checksum
    broken(tmp_path, "a.txt.gz", data, [f"first {len(text)} decompressed bytes"])


def test_bad_json_lines_name_the_line(tmp_path):
    good = '{"text": "a"}\n'
    for line, says in [
        ("{", "not valid JSON"),
        ("[1]", "must be a JSON object, this one is a list"),
        ('{"body": "x", "id": 1}', "no field 'text'; its fields: 'body', 'id'"),
        ('{"text": 3}', "must be a string, it is a int"),
        ('{"text": null}', "must be a string, it is a NoneType"),
        (r'{"text": "a\ud800"}', "half a surrogate pair at character 1"),
        ('{"text": ' + "1" * 5000 + "}", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ]:
        broken(tmp_path, "a.jsonl", good * 2 + line + "\n" + good, [":3:", says])


def test_documents_have_a_size_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_BYTES", 1000)
    long = "x" * 2000
    broken(
        tmp_path,
        "a.jsonl",
        json.dumps({"text": "a"}) + "\n" + json.dumps({"text": long}),
        [":2:", "longer than 1000 bytes"],
    )
    broken(tmp_path, "a.txt", "a#" + long, ["no separator '#'", "from byte 2 on"], separator="#")
    with pytest.raises(DataError, match="at least one character"):
        read(write(tmp_path / "b.txt", "a"), separator="")


def test_a_file_that_grows_while_it_is_read(tmp_path):
    path = write(tmp_path / "a.txt", "abc")
    (source,) = find_sources(path)
    write(path, "abcdef")
    with pytest.raises(DataError, match="changed meanwhile"):
        list(read_documents(source))
