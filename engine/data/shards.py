"""Token shards on disk: a folder that holds all that training needs, checked when it is opened.

    manifest.json                        what is here: counts, checksums, tokenizer identity, sources, arguments
    tokenizer.json                       the tokenizer itself, and
    tokenizer_identity.json              its identity
    train_00000.bin  train_00000.idx …   tokens, and where documents start
    val_00000.bin    val_00000.idx …

A `.bin` is nothing but little-endian token ids, uint16, or uint32 when the vocabulary has more than 65,536. Every
document is followed by the end-of-text id. A split is the concatenation of its shards in order: documents run on from
one shard into the next. An `.idx` is nothing but little-endian int64: for every document that starts in the shard, the
place of its first token in the shard.

`manifest.json` is written last and carries its own checksum: a folder with a sound manifest is complete. Per split it
records the UTF-8 bytes of the documents, so that a loss in nats per token becomes bits per byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tritium.engine.data.errors import DataError
from tritium.engine.data.tokenizer import Tokenizer, load_tokenizer

FORMAT = "tritium-shards"
VERSION = 1
MANIFEST_FILE = "manifest.json"
SPLITS = ("train", "val")
VERIFY_BELOW_BYTES = 1_000_000_000
INDEX_DTYPE = np.dtype("<i8")


@dataclass(frozen=True)
class Shard:
    """One `.bin` and its `.idx`. A document and its bytes are counted in the shard where it starts."""

    file: str
    tokens: int
    documents: int
    bytes: int
    max_token_id: int
    sha256: str
    index_sha256: str

    @property
    def index_file(self) -> str:
        return self.file.removesuffix(".bin") + ".idx"


@dataclass(frozen=True)
class SplitManifest:
    """Counts of a split: tokens (end-of-text ids included), documents, UTF-8 bytes of text, largest id."""

    tokens: int
    documents: int
    bytes: int
    max_token_id: int
    shards: list[Shard]

    @classmethod
    def of(cls, shards: list[Shard]) -> SplitManifest:
        return cls(
            tokens=sum(shard.tokens for shard in shards),
            documents=sum(shard.documents for shard in shards),
            bytes=sum(shard.bytes for shard in shards),
            max_token_id=max((shard.max_token_id for shard in shards), default=-1),
            shards=shards,
        )


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says. `sources` and `arguments` tell how the data came to be."""

    tokenizer: dict[str, Any]
    dtype: str
    shard_tokens: int
    splits: dict[str, SplitManifest]
    sources: list[dict[str, Any]] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes of all shards on disk, indices not counted."""
        return sum(split.tokens for split in self.splits.values()) * np.dtype(self.dtype).itemsize

    def to_json(self) -> bytes:
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return (json.dumps({**content, "sha256": _digest(content)}, indent=1, ensure_ascii=False) + "\n").encode(
            "utf-8"
        )


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a folder, its own checksum and version verified; the shards are not looked at. Raises
    `DataError`.
    """
    path = Path(folder) / MANIFEST_FILE
    if not path.is_file():
        raise DataError(
            f"{folder} is not a prepared data folder: it has no {MANIFEST_FILE}, which is written last. Prepare it, or "
            "finish a run that was interrupted by repeating it: tritium prepare."
        )
    remedy = "Prepare the data again into an empty folder."
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise DataError(f"{path} does not describe {FORMAT}, so nothing in its folder can be read. {remedy}")
        if content["version"] != VERSION:
            raise DataError(
                f"{path} has format version {content['version']}, this version of tritium reads {VERSION}: the shards "
                "may be laid out differently. Prepare the data again, or use the version that wrote it."
            )
        expected = content.pop("sha256")
        if _digest(content) != expected:
            raise DataError(
                f"{path} does not match its own checksum: it was edited or damaged, and its counts cannot be trusted. "
                f"{remedy}"
            )
        splits = {
            name: SplitManifest(**{**split, "shards": [Shard(**shard) for shard in split["shards"]]})
            for name, split in content["splits"].items()
        }
        content = {key: value for key, value in content.items() if key not in ("format", "version")}
        return Manifest(**{**content, "splits": splits})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error!r}). {remedy}") from None


class Split:
    """The tokens of one split as one row, memory-mapped. Picklable; a copy in another process maps the files again."""

    def __init__(self, folder: Path, name: str, manifest: Manifest):
        self.folder = folder
        self.name = name
        self.manifest = manifest.splits[name]
        self.dtype = np.dtype(manifest.dtype)
        self._map()

    def _map(self) -> None:
        shards = self.manifest.shards
        self._tokens = [_mapped(self.folder / shard.file, self.dtype) for shard in shards]
        self._indices = [_mapped(self.folder / shard.index_file, INDEX_DTYPE) for shard in shards]
        self._ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_tokens", "_indices", "_ends")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def __len__(self) -> int:
        return self.manifest.tokens

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """(stop − start,) ids, 0 ≤ start ≤ stop ≤ len; a view of the file where one shard holds them all."""
        parts = [self._tokens[shard][low:high] for shard, _, low, high in self._parts(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """int64 places in the split, start ≤ place < stop, where documents begin."""
        found = []
        for shard, base, low, high in self._parts(start, stop):
            index = self._indices[shard]
            first, last = np.searchsorted(index, (low, high))
            found.append(index[first:last] + base)
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, np.int64), *found])

    def seq_start(self, start: int, T: int) -> np.ndarray:
        """(T,) int32: for each place of the row that begins at `start`, the index in the row where its document starts,
        0 if before it.
        """
        row = np.zeros(T, np.int32)
        starts = self.document_starts(start, start + T) - start
        row[starts] = starts
        return np.maximum.accumulate(row)

    def bits_per_byte(self, nats_per_token: float) -> float:
        """Mean loss per token of this split → bits per byte of its text."""
        return nats_per_token / math.log(2) * self.manifest.tokens / self.manifest.bytes

    def _parts(self, start: int, stop: int) -> list[tuple[int, int, int, int]]:
        """(shard, place of its first token in the split, from, to) for every shard that start … stop touches."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} … {stop} are not within the {len(self)} of split {self.name!r}")
        parts = []
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            end = int(self._ends[shard])
            base = end - self.manifest.shards[shard].tokens
            parts.append((shard, base, start - base, min(stop, end) - base))
            start, shard = min(stop, end), shard + 1
        return parts


class Dataset:
    """An opened data folder: `manifest`, `tokenizer`, `identity`, and `split("train")`, `split("val")`."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder = folder
        self.manifest = manifest
        self._splits: dict[str, Split] = {}

    def split(self, name: str) -> Split:
        """The tokens of a split. Raises `DataError` for one that does not exist or is empty."""
        if name not in self._splits:
            if name not in self.manifest.splits:
                raise DataError(f"{self.folder} has no split {name!r}. Its splits: {', '.join(self.manifest.splits)}.")
            if self.manifest.splits[name].tokens == 0:
                raise DataError(
                    f"Split {name!r} of {self.folder} has no tokens: it was prepared with val_fraction "
                    f"{self.manifest.arguments.get('val_fraction')}. Prepare it again with a fraction above 0."
                )
            self._splits[name] = Split(self.folder, name, self.manifest)
        return self._splits[name]

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a sample index to mean the same tokens: the training split's, in their order."""
        split = self.manifest.splits["train"]
        joined = "".join(shard.sha256 for shard in split.shards)
        return {"train_tokens": split.tokens, "sha256": hashlib.sha256(joined.encode()).hexdigest()}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the shards, loaded from the folder. Raises `DataError` if it is not that one."""
        tokenizer = load_tokenizer(self.folder)
        if tokenizer.identity != self.manifest.tokenizer:
            raise DataError(
                f"The tokenizer in {self.folder} is {tokenizer.identity}, its shards were made with "
                f"{self.manifest.tokenizer}: decoding would give other text. Restore the folder's tokenizer files, or "
                "prepare the data again."
            )
        return tokenizer

    def verify(self) -> None:
        """Read every shard and compare checksums. Raises `DataError` naming the first that differs."""
        for split in self.manifest.splits.values():
            for shard in split.shards:
                for file, expected in ((shard.file, shard.sha256), (shard.index_file, shard.index_sha256)):
                    found = file_sha256(self.folder / file)
                    if found != expected:
                        raise DataError(
                            f"{self.folder / file} has SHA-256 {found}, the manifest says {expected}: some of it was "
                            "changed or damaged, and training on it would go wrong unseen. Copy it again from where "
                            "it was sound, or delete the folder and prepare the data again."
                        )


def open_dataset(folder: str | Path, *, verify: bool | None = None) -> Dataset:
    """Open a prepared folder.

    The manifest, and that every file exists with its size, is checked always; checksums of all tokens with
    `verify=True`, and when `verify` is None and they are less than 1 GB. Raises `DataError`.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    itemsize = np.dtype(manifest.dtype).itemsize
    for split in manifest.splits.values():
        for shard in split.shards:
            _check_size(folder / shard.file, shard.tokens * itemsize)
            _check_size(folder / shard.index_file, shard.documents * INDEX_DTYPE.itemsize)
    dataset = Dataset(folder, manifest)
    if verify or (verify is None and manifest.total_bytes < VERIFY_BELOW_BYTES):
        dataset.verify()
    return dataset


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_size(path: Path, expected: int) -> None:
    remedy = "Copy it again from where it was complete, or delete the folder and prepare the data again."
    if not path.is_file():
        raise DataError(
            f"{path} is missing, the manifest lists it with {expected} bytes: part of the data is gone. {remedy}"
        )
    if (found := os.path.getsize(path)) != expected:
        what = "truncated" if found < expected else "longer than it was written"
        raise DataError(f"{path} is {what}: {found} bytes, the manifest says {expected}. {remedy}")


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r")


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode("utf-8")).hexdigest()
