"""`tritium prepare`: documents → token shards, in several processes, resumable, the same bytes every time.

This process reads the documents, decides each one's split, and writes tokens in document order; worker processes only
tokenize. What is written therefore depends on the documents and the arguments alone, not on how many workers there are
or which one is faster.

**Split.** A document goes to `val` if the hash of (seed, its text) falls into the fraction: the same document always
goes to the same side, equal documents together. If no document does (few documents), the one with the smallest hash
does, found by a second pass.

**Resume.** Work lies in `OUT/.partial` until it is complete. A finished shard is renamed into place, then entered in
`progress.json` with the document the next shard begins in. A later run with the same arguments and unchanged sources
reads the documents again (cheap) and tokenizes only those after that point; at most one unfinished shard per split is
lost. A preparation that fails for a reason in its arguments or sources keeps nothing: whatever mends that makes another
preparation, in whose way it would be. When all is there, files move up into `OUT`, the manifest last, so that `OUT` is
complete or has no manifest. Data that was complete before stays untouched until that moment.

**Memory** is bounded by the number of workers: each holds one batch of about `BATCH_BYTES` of text and another waits
for it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shlex
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import IO, Any

import numpy as np

from tritium.engine.data import corpus, shards
from tritium.engine.data.corpus import Source
from tritium.engine.data.errors import DataError, ReadError
from tritium.engine.data.shards import Manifest, Shard, SplitManifest
from tritium.engine.data.tokenizer import IDENTITY_FILE, TOKENIZER_FILE, Tokenizer, bpe_size, load_tokenizer, train_bpe
from tritium.kernels.interrupts import interrupts_held

SHARD_TOKENS = 1 << 25
BATCH_BYTES = 256 * 1024
BATCH_DOCUMENTS = 4096
BPE_SAMPLE_BYTES = 64 * 1024 * 1024
WORKERS_MAX = 16
WORKER_PAYS_BYTES = 16 * 1024 * 1024  # of source: below it, starting processes takes longer than tokenizing
PROGRESS_INTERVAL_S = 0.1
PARTIAL_FOLDER = ".partial"
PROGRESS_FILE = "progress.json"
PAST_LAST_DOCUMENT = 1 << 62
SEEDS = (-(1 << 63), (1 << 64) - 1)  # what torch's generators take


@dataclass(frozen=True)
class Progress:
    """What `progress` is called with, about ten times a second and once at the end."""

    phase: (
        str  # "tokenizer": training a BPE; "tokens": the main pass; "split": a second one, as no document fell into val
    )
    bytes: int  # of the sources as they lie on disk, written
    bytes_total: int
    tokens: int  # of all splits, those of an earlier run included
    documents: int
    elapsed_s: float
    tokens_per_s: float  # of this run


class PreparationInterrupted(KeyboardInterrupt):
    """Ctrl-C: the message says what is kept and how to go on."""


def prepare(
    sources: str | Path | Iterable[str | Path],
    out: str | Path,
    tokenizer: str | Path = "gpt2",
    field: str = "text",
    separator: str | None = None,
    val_fraction: float = 0.01,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> Manifest:
    """Tokenize `sources` into the folder `out` and return its manifest.

    sources        files, folders, globs, or `demo`; see `corpus`
    tokenizer      `gpt2`, `bytes`, `bpe:N`, a `tokenizer.json`, or a prepared folder to take it from; a BPE is trained
                   on training documents alone, at most 64 MiB: of each source its beginning, in proportion to its size
    field          where JSON lines hold the text
    separator      what separates documents in text files; None: see `corpus`
    val_fraction   of documents, at least one if above 0
    shard_tokens   tokens per file; also what a kill costs at most
    workers        tokenizing processes; None: one per usable core up to 16, none for small sources
    overwrite      replace what `out` holds, if it is a prepared folder
    say            gets sentences for the user, such as the licence of the demo corpus

    A complete folder made with the same arguments and sources is left alone. Raises `DataError` for anything wrong with
    input or folder, `PreparationInterrupted` on Ctrl-C; running again with the same arguments goes on after the last
    finished shard.
    """
    _check_arguments(val_fraction, shard_tokens, workers, seed)
    out = Path(out)
    sources = [sources] if isinstance(sources, (str, Path)) else list(sources)
    _check_apart(out, sources)
    found = corpus.find_sources(sources, leave_out=out)
    if any(source.is_demo for source in found):
        say(corpus.demo_licence())
    arguments: dict[str, Any] = {
        "tokenizer": str(tokenizer),
        "field": field,
        "separator": separator,
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
        "seed": seed,
        "piece_bytes": corpus.PIECE_BYTES,
        "bpe_sample_bytes": BPE_SAMPLE_BYTES,
    }
    with _locked(out):
        job = _Job([str(source) for source in sources], found, out, arguments, tokenizer, workers, progress, say)
        with _explained(job):
            return job.run(overwrite)


def is_prepared(folder: str | Path) -> bool:
    """Whether `folder` holds complete data; an unfinished preparation is not."""
    return (Path(folder) / shards.MANIFEST_FILE).is_file()


class _Job:
    def __init__(
        self,
        specs: list[str],
        sources: list[Source],
        out: Path,
        arguments: dict[str, Any],
        tokenizer_spec: str | Path,
        workers: int | None,
        progress: Callable[[Progress], None] | None,
        say: Callable[[str], None],
    ):
        self.specs = specs
        self.sources = sources
        self.out = out
        self.partial = out / PARTIAL_FOLDER
        self.arguments = arguments
        self.bpe_size = bpe_size(tokenizer_spec)
        self.given_tokenizer = None if self.bpe_size else load_tokenizer(tokenizer_spec)
        self.tokenizer_identity = self.given_tokenizer.identity if self.given_tokenizer else None
        self.total_bytes = sum(source.bytes for source in sources)
        self.workers = _worker_count(workers, self.total_bytes)
        self.progress = progress
        self.say = say
        self.begun_s = time.monotonic()
        self.reported_s = 0.0
        # `threshold`: hashes below it go to val. It is part of the state: a second pass has another.
        self.threshold = int(arguments["val_fraction"] * 2**64)
        self.hash_key = str(arguments["seed"]).encode()
        self.state: dict[str, Any] = {}

    def run(self, overwrite: bool) -> Manifest:
        fingerprint = {
            **self.arguments,
            "tokenizer_identity": self.tokenizer_identity,
            "sources": [[source.name, source.bytes, source.mtime_ns] for source in self.sources],
            "version": shards.VERSION,
        }
        resuming = self._resumable(fingerprint, overwrite)
        if not resuming:
            if (manifest := self._up_to_date(overwrite)) is not None:
                return manifest
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir()
            self.state = {
                "arguments": fingerprint,
                "threshold": self.threshold,
                "splits": {name: [] for name in shards.SPLITS},
            }
        self.threshold = self.state["threshold"]
        if not (self.partial / shards.MANIFEST_FILE).exists():
            try:
                tokenizer = self._tokenizer()
                if not resuming:
                    self.state["dtype"] = tokenizer.dtype.str
                    self._save_state()
                manifest_json = self._tokenize(tokenizer).to_json()
            except ReadError:
                raise
            except DataError:  # repeating it would fail again, and any other preparation would find this one unfinished
                self._drop_partial()
                raise
            _write_atomic(self.partial / shards.MANIFEST_FILE, manifest_json)
        return self._publish()

    def command(self, *more: str) -> str:
        """What to type for this preparation, with ``more`` flags."""
        specs = [shlex.quote(spec) for spec in self.specs]
        flags = {"tokenizer": self.arguments["tokenizer"], "val_fraction": self.arguments["val_fraction"]}
        if self.arguments["field"] != "text":
            flags["field"] = self.arguments["field"]
        if self.arguments["separator"]:
            flags["separator"] = _escaped(self.arguments["separator"])
        if self.arguments["seed"]:
            flags["seed"] = self.arguments["seed"]
        flags["out"] = self.out
        words = [f"--{name} {shlex.quote(str(value))}" for name, value in flags.items()]
        return " ".join(["tritium prepare", *specs[:3], *(["…"] if len(specs) > 3 else []), *words, *more])

    # ---- what is there already

    def _resumable(self, fingerprint: dict[str, Any], overwrite: bool) -> bool:
        path = self.partial / PROGRESS_FILE
        if not path.exists():
            return False
        state = json.loads(path.read_bytes())  # written atomically: it is whole or not there
        differing = {
            key: (state["arguments"].get(key), value)
            for key, value in fingerprint.items()
            if state["arguments"].get(key) != value
        }
        if not differing:
            self.state = state
            self._check_kept()
            kept = sum(len(entries) for entries in state["splits"].values())
            self.say(
                f"{self.out} holds an unfinished preparation with "
                + (f"{_shards(kept)}: going on from there" if kept else "no finished shard: beginning again")
            )
            return True
        if overwrite or not any(state["splits"].values()):  # without a finished shard there is nothing to mix up
            return False
        differences = "; ".join(_difference(key, before, now) for key, (before, now) in differing.items())
        raise DataError(
            f"{self.out} holds an unfinished preparation made with other arguments ({differences}); mixing them would "
            "give wrong data. Repeat it with its own arguments to finish it, choose another folder, or start over: "
            f"delete {self.partial}, or `{self.command('--overwrite')}`."
        )

    def _check_kept(self) -> None:
        itemsize = np.dtype(self.state["dtype"]).itemsize
        for entries in self.state["splits"].values():
            for shard in (Shard(**entry["shard"]) for entry in entries):
                for file, size in ((shard.file, shard.tokens * itemsize), (shard.index_file, shard.documents * 8)):
                    # While complete data is moved up, some files are there already.
                    if not any(
                        (folder / file).exists() and (folder / file).stat().st_size == size
                        for folder in (self.partial, self.out)
                    ):
                        raise DataError(
                            f"{self.partial / file} was finished by an earlier run and is now missing or of another "
                            f"size than {size} bytes: going on would leave a hole. Delete {self.partial} to start over."
                        )

    def _up_to_date(self, overwrite: bool) -> Manifest | None:
        if not (self.out / shards.MANIFEST_FILE).exists():
            # Dot files are ours or nobody's data; anything else could be the user's own.
            others = sorted(path.name for path in self.out.iterdir() if not path.name.startswith("."))
            if others and not self.partial.exists():
                raise DataError(
                    f"{self.out} is not a prepared data folder and holds {len(others)} files ({', '.join(others[:3])}, "
                    "…), which could be lost. Choose a new or empty folder."
                )
            return None
        if overwrite:
            return None
        manifest = shards.open_dataset(self.out).manifest
        differing = {
            key: (manifest.arguments.get(key), value)
            for key, value in self.arguments.items()
            if manifest.arguments.get(key) != value
        }
        before = [(source["name"], source["bytes"], source["sha256"]) for source in manifest.sources]
        # Hashed only where names and sizes agree: the others are known to differ.
        if not differing and [entry[:2] for entry in before] == [
            (source.name, source.bytes) for source in self.sources
        ]:
            now = [(source.name, source.bytes, shards.file_sha256(source.path)) for source in self.sources]
            if now == before and self.tokenizer_identity in (None, manifest.tokenizer):
                self.say(f"{self.out} is up to date")
                return manifest
        differences = (
            "; ".join(_difference(key, *pair) for key, pair in differing.items())
            or "its sources or its tokenizer's file changed"
        )
        raise DataError(
            f"{self.out} holds complete data made with other arguments ({differences}), which is not replaced unasked. "
            f"Train on it as it is with --data.folder {shlex.quote(str(self.out))}, choose another folder, or replace "
            f"it with `{self.command('--overwrite')}` (it stays usable until the new data is complete)."
        )

    # ---- the pass over the documents

    def _tokenizer(self) -> Tokenizer:
        if self.given_tokenizer:
            self.given_tokenizer.save(self.partial)
        elif not (self.partial / IDENTITY_FILE).exists():
            train_bpe(self._bpe_sample(), self.bpe_size or 0).save(self.partial)
        tokenizer = load_tokenizer(self.partial)
        if self.bpe_size and tokenizer.vocab_size < self.bpe_size:
            self.say(f"the corpus is too small for {self.bpe_size} ids: the tokenizer has {tokenizer.vocab_size}")
        return tokenizer

    def _bpe_sample(self) -> Iterator[str]:
        """Training documents, from the beginning of each source, its share of the sample by size."""
        done = 0
        for source in self.sources:
            budget = BPE_SAMPLE_BYTES * source.bytes // self.total_bytes
            for text in self._read(source):
                data = text.encode("utf-8")
                if self._hash(data) >= self.threshold:
                    yield text
                    budget -= len(data)
                    if budget <= 0:
                        break
            done += source.bytes
            self._report("tokenizer", done, 0, 0)

    def _read(self, source: Source, on_block: Callable[[bytes], None] | None = None) -> Iterator[str]:
        arguments = self.arguments
        return corpus.read_documents(
            source, field=arguments["field"], separator=arguments["separator"], on_block=on_block
        )

    def _hash(self, data: bytes) -> int:
        return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=self.hash_key).digest(), "little")

    def _tokenize(self, tokenizer: Tokenizer) -> Manifest:
        while True:
            reading = _Reading()
            entries = self._one_pass(tokenizer, reading)
            documents = {name: sum(entry["documents"] for entry in entries[name]) for name in shards.SPLITS}
            if documents["train"] == 0:
                raise DataError(
                    f"The sources hold {reading.documents} document{'' if reading.documents == 1 else 's'} with any "
                    f"text, and none is left for training with val_fraction {self.arguments['val_fraction']}. "
                    f"{self._remedy()}"
                )
            if documents["val"] > 0 or self.arguments["val_fraction"] == 0:
                break
            if documents["train"] == 1:
                raise DataError(
                    f"The sources hold a single document (a text of up to {corpus.PIECE_BYTES // 1024} KiB is one "
                    f"without a separator), which cannot be both trained on and validated on. {self._remedy()}"
                )
            self.threshold = reading.smallest_hash + 1
            self.state = {**self.state, "threshold": self.threshold, "splits": {name: [] for name in shards.SPLITS}}
            self._save_state()
        return Manifest(
            tokenizer=tokenizer.identity,
            dtype=tokenizer.dtype.str,
            shard_tokens=self.arguments["shard_tokens"],
            splits={name: SplitManifest.of([Shard(**entry) for entry in entries[name]]) for name in shards.SPLITS},
            sources=reading.sources,
            arguments={**self.arguments, "empty_documents_left_out": reading.empty_documents},
        )

    def _remedy(self) -> str:
        """For sources of too few documents."""
        separator = "another separator" if self.arguments["separator"] else "a separator"
        if not self.arguments["separator"]:
            example = self.command("--separator", shlex.quote(_escaped("\n\n")))
            separator += f" that cuts the text into several, such as an empty line (`{example}`)"
        return (
            f"Give more documents, {separator}, or --val_fraction 0, which holds none out (then tritium train has "
            "nothing to validate on)."
        )

    def _one_pass(self, tokenizer: Tokenizer, reading: _Reading) -> dict[str, list[dict[str, Any]]]:
        """Finished shard entries of each split."""
        phase = "tokens" if self.threshold == int(self.arguments["val_fraction"] * 2**64) else "split"
        earlier = sum(entry["tokens"] for entries in self.state["splits"].values() for entry in entries)
        writers = {name: _SplitWriter(self, name, tokenizer.dtype) for name in shards.SPLITS}
        documents = 0
        begun_s = time.monotonic()
        with contextlib.ExitStack() as stack:
            for writer in writers.values():
                stack.callback(writer.close)
            pool = stack.enter_context(_Pool(self.partial, tokenizer, self.workers))
            for batch, tokens, lengths in pool.map(
                self._batches(reading, {name: w.next_document for name, w in writers.items()})
            ):
                in_val = np.array(batch.in_val, bool)
                for name, chosen in (("train", ~in_val), ("val", in_val)):
                    writers[name].append(
                        tokens[np.repeat(chosen, lengths)],
                        lengths[chosen],
                        np.array(batch.indices)[chosen],
                        np.array(batch.sizes)[chosen],
                    )
                documents += len(batch.texts)
                written = sum(writer.position for writer in writers.values())
                self._report(
                    phase,
                    batch.read_bytes,
                    written,
                    documents,
                    (written - earlier) / (time.monotonic() - begun_s + 1e-9),
                )
            for writer in writers.values():
                writer.finish()
        written = sum(writer.position for writer in writers.values())
        self._report(
            phase,
            self.total_bytes,
            written,
            documents,
            (written - earlier) / (time.monotonic() - begun_s + 1e-9),
            last=True,
        )
        return {name: [entry["shard"] for entry in self.state["splits"][name]] for name in shards.SPLITS}

    def _batches(self, reading: _Reading, first_documents: dict[str, int]) -> Iterator[_Batch]:
        """Documents still to be tokenized, in order; all others are read all the same, for the checksums and the
        smallest hash.
        """
        batch = _Batch()
        size = 0
        index = -1
        for source in self.sources:
            reading.begin_source()
            for text in self._read(source, reading.on_block):
                if not text:
                    reading.empty_documents += 1
                    continue
                index += 1
                data = text.encode("utf-8")
                value = self._hash(data)
                reading.documents += 1
                reading.smallest_hash = min(reading.smallest_hash, value)
                in_val = value < self.threshold
                if index < first_documents["val" if in_val else "train"]:
                    continue
                batch.add(text, index, len(data), in_val)
                size += len(data)
                if size >= BATCH_BYTES or len(batch.texts) >= BATCH_DOCUMENTS:
                    batch.read_bytes = reading.read_bytes
                    yield batch
                    batch, size = _Batch(), 0
            reading.sources.append({"name": source.name, "bytes": source.bytes, "sha256": reading.digest.hexdigest()})
        if batch.texts:
            batch.read_bytes = reading.read_bytes
            yield batch

    # ---- state and end

    def add_shard(self, split: str, entry: dict[str, Any]) -> None:
        self.state["splits"][split].append(entry)
        self._save_state()

    def _save_state(self) -> None:
        _write_atomic(self.partial / PROGRESS_FILE, json.dumps(self.state).encode("utf-8"))

    def _publish(self) -> Manifest:
        """Move the complete data up. May be cut off anywhere: the next run finds the manifest in `.partial` and repeats
        this.
        """
        manifest = shards.read_manifest(self.partial)
        files = [
            file
            for split in manifest.splits.values()
            for shard in split.shards
            for file in (shard.file, shard.index_file)
        ]
        files += [TOKENIZER_FILE, IDENTITY_FILE]
        (self.out / shards.MANIFEST_FILE).unlink(missing_ok=True)
        for file in files:
            if (self.partial / file).exists():
                os.replace(self.partial / file, self.out / file)
        for path in self.out.glob("*_*[0-9].*"):
            stem, _, number = path.stem.rpartition("_")
            if (
                stem in shards.SPLITS
                and number.isdigit()
                and path.suffix in (".bin", ".idx")
                and path.name not in files
            ):
                path.unlink()  # a shard of the data that is being replaced
        os.replace(self.partial / shards.MANIFEST_FILE, self.out / shards.MANIFEST_FILE)
        _sync_folder(self.out)
        self._drop_partial()
        return manifest

    def _drop_partial(self) -> None:
        # the state first, so that what a kill leaves of the folder is not taken for unfinished work
        (self.partial / PROGRESS_FILE).unlink(missing_ok=True)
        shutil.rmtree(self.partial)

    def _report(
        self, phase: str, done: int, tokens: int, documents: int, rate: float = 0.0, last: bool = False
    ) -> None:
        now_s = time.monotonic()
        if self.progress and (last or now_s - self.reported_s >= PROGRESS_INTERVAL_S):
            self.reported_s = now_s
            self.progress(Progress(phase, done, self.total_bytes, tokens, documents, now_s - self.begun_s, rate))


class _Reading:
    """What one pass over all documents finds out."""

    def __init__(self) -> None:
        self.documents = 0
        self.empty_documents = 0
        self.read_bytes = 0
        self.smallest_hash = 2**64
        self.sources: list[dict[str, Any]] = []
        self.begin_source()

    def begin_source(self) -> None:
        self.digest = hashlib.sha256()

    def on_block(self, block: bytes) -> None:
        self.digest.update(block)
        self.read_bytes += len(block)


class _Batch:
    """Documents for one worker: texts, their numbers in the corpus, UTF-8 sizes, and whether they are validation."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.indices: list[int] = []
        self.sizes: list[int] = []
        self.in_val: list[bool] = []
        self.read_bytes = 0

    def add(self, text: str, index: int, size: int, in_val: bool) -> None:
        self.texts.append(text)
        self.indices.append(index)
        self.sizes.append(size)
        self.in_val.append(in_val)


class _SplitWriter:
    """Cuts one split's tokens into shards. `position` counts tokens of the split written, `next_document` is the first
    one wanted.
    """

    def __init__(self, job: _Job, split: str, dtype: np.dtype):
        self.job = job
        self.split = split
        self.dtype = dtype
        self.shard_tokens = job.arguments["shard_tokens"]
        entries = job.state["splits"][split]
        self.position = sum(entry["tokens"] for entry in entries)
        self.shard_number = len(entries)
        self.next_document: int = entries[-1]["next_document"] if entries else 0
        written_of_it: int = entries[-1]["next_skip"] if entries else 0
        # Where the next document's first token belongs; its tokens before `position` are in an earlier shard already.
        self.incoming = self.position - written_of_it
        self._open_shard()

    def append(self, tokens: np.ndarray, lengths: np.ndarray, indices: np.ndarray, sizes: np.ndarray) -> None:
        """Documents in order: all their tokens, and for each its length in tokens, its number in the corpus, its size
        in bytes.
        """
        ends = self.incoming + np.cumsum(lengths)
        starts = ends - lengths
        first = self.incoming
        self.incoming += len(tokens)
        while self.position < self.incoming:
            stop = min(self.incoming, self._shard_end)
            part = np.ascontiguousarray(tokens[self.position - first : stop - first])
            begun = slice(*np.searchsorted(starts, (self.position, stop)))
            self._write(part, starts[begun], sizes[begun])
            self.position = stop
            if stop == self._shard_end:
                unfinished = int(np.searchsorted(ends, stop, side="right"))
                if unfinished < len(ends):
                    self._finish_shard(int(indices[unfinished]), stop - int(starts[unfinished]))
                else:
                    self._finish_shard(int(indices[-1]) + 1, 0)
                self._open_shard()

    def finish(self) -> None:
        """The last shard, if any tokens are in it."""
        if self.position > self._shard_start:
            self._finish_shard(PAST_LAST_DOCUMENT, 0)

    def close(self) -> None:
        for file in (self._bin, self._idx):
            with contextlib.suppress(OSError):  # flushing to a full disk fails again; the first error is on its way up
                file.close()

    def _open_shard(self) -> None:
        self._shard_start = self.position
        self._shard_end = self.position + self.shard_tokens
        self._name = f"{self.split}_{self.shard_number:05d}"
        self._bin = _HashedFile(self.job.partial / f"{self._name}.bin.tmp")
        self._idx = _HashedFile(self.job.partial / f"{self._name}.idx.tmp")
        self._documents = self._bytes = 0
        self._max_token_id = -1

    def _write(self, tokens: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> None:
        self._bin.write(tokens.tobytes())
        self._idx.write((starts - self._shard_start).astype(shards.INDEX_DTYPE).tobytes())
        self._documents += len(starts)
        self._bytes += int(sizes.sum())
        self._max_token_id = max(self._max_token_id, int(tokens.max()))

    def _finish_shard(self, next_document: int, next_skip: int) -> None:
        shard = Shard(
            file=f"{self._name}.bin",
            tokens=self.position - self._shard_start,
            documents=self._documents,
            bytes=self._bytes,
            max_token_id=self._max_token_id,
            sha256=self._bin.finish(self.job.partial / f"{self._name}.bin"),
            index_sha256=self._idx.finish(self.job.partial / f"{self._name}.idx"),
        )
        _sync_folder(self.job.partial)
        self.job.add_shard(
            self.split,
            {"shard": asdict(shard), "tokens": shard.tokens, "next_document": next_document, "next_skip": next_skip},
        )
        self.shard_number += 1


class _HashedFile:
    """A file under a temporary name, hashed as it is written; `finish` makes it durable and gives it its name."""

    def __init__(self, path: Path):
        self.path = path
        self.digest = hashlib.sha256()
        self.file: IO[bytes] = open(path, "wb")  # noqa: SIM115

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)

    def finish(self, path: Path) -> str:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.path, path)
        return self.digest.hexdigest()

    def close(self) -> None:
        self.file.close()


class _Pool:
    """Tokenizes batches in `workers` processes, results in order and no more batches in flight than two per worker;
    here if 0.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, workers: int):
        self.tokenizer = tokenizer
        self.in_flight_max = 2 * workers
        self.executor: ProcessPoolExecutor | None = None
        if workers > 0:
            context = multiprocessing.get_context("spawn")
            resource_tracker.ensure_running()
            with interrupts_held():
                self.executor = ProcessPoolExecutor(
                    workers, context, initializer=_start_worker, initargs=(str(folder),)
                )

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        if self.executor:
            self.executor.shutdown(wait=True, cancel_futures=True)

    def map(self, batches: Iterator[_Batch]) -> Iterator[tuple[_Batch, np.ndarray, np.ndarray]]:
        if self.executor is None:
            for batch in batches:
                yield batch, *self.tokenizer.encode_documents(batch.texts)
            return
        waiting: deque[tuple[_Batch, Future[tuple[np.ndarray, np.ndarray]]]] = deque()
        for batch in batches:
            with interrupts_held():  # the first call starts them
                future = self.executor.submit(_tokenize_in_worker, batch.texts)
            waiting.append((batch, future))
            if len(waiting) >= self.in_flight_max:
                batch, future = waiting.popleft()
                yield batch, *future.result()
        while waiting:
            batch, future = waiting.popleft()
            yield batch, *future.result()


_worker_tokenizer: Tokenizer | None = None


def _start_worker(folder: str) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per process
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    _worker_tokenizer = load_tokenizer(folder)


def _die_with(sentinel: int) -> None:
    # A killed parent cannot stop its workers, and the queue they wait on never closes.
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _tokenize_in_worker(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    assert _worker_tokenizer is not None
    return _worker_tokenizer.encode_documents(texts)


def _worker_count(workers: int | None, total_bytes: int) -> int:
    if workers is None:
        if total_bytes < WORKER_PAYS_BYTES:
            return 0
        workers = min(len(os.sched_getaffinity(0)), WORKERS_MAX)
    return 0 if workers == 1 else workers


def _check_arguments(val_fraction: float, shard_tokens: int, workers: int | None, seed: int) -> None:
    if not 0 <= val_fraction < 1:
        raise DataError(
            f"val_fraction must be at least 0 and below 1, got {val_fraction}: nothing would be left to train on. Try "
            "0.01."
        )
    if shard_tokens < 1:
        raise DataError(f"shard_tokens must be at least 1, got {shard_tokens}. The default is {SHARD_TOKENS}.")
    if workers is not None and workers < 0:
        raise DataError(f"workers must be at least 0 (0 and 1: tokenize in this process), got {workers}.")
    if not SEEDS[0] <= seed <= SEEDS[1]:
        raise DataError(f"seed must be from {SEEDS[0]} to {SEEDS[1]}, got {seed}, which no generator takes. Try 0.")


def _check_apart(out: Path, sources: list[str | Path]) -> None:
    for source in sources:
        folder = Path(source).resolve()
        if source != corpus.DEMO and folder.is_dir() and (folder == out.resolve() or folder in out.resolve().parents):
            raise DataError(
                f"The output folder {out} lies in the source folder {source}: its shards would be read as documents by "
                "the next run. Choose a folder outside it."
            )


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise DataError(
            f"The output folder {out} cannot be made: {error}. Choose another one; nothing was changed."
        ) from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise DataError(
            f"Another process is preparing {out} right now; two would destroy each other's shards. Wait for it, or "
            "choose another folder."
        ) from None
    finally:
        os.close(folder)


@contextlib.contextmanager
def _explained(job: _Job) -> Iterator[None]:
    """Turn what may stop a preparation into a message that says what is kept and how to go on."""

    def kept() -> str:
        count = sum(len(entries) for entries in job.state.get("splits", {}).values())
        before = " Data that was complete before is untouched." if (job.out / shards.MANIFEST_FILE).exists() else ""
        if count == 0:
            return (
                f"No shard of {job.arguments['shard_tokens']:,} tokens was finished, so no tokens are kept; repeat "
                f"with the same arguments to begin again.{before}"
            )
        are = "is" if count == 1 else "are"
        return f"{_shards(count)} {are} kept; repeat with the same arguments to go on from there.{before}"

    try:
        yield
    except KeyboardInterrupt:
        raise PreparationInterrupted(f"Preparation of {job.out} was interrupted. {kept()}") from None
    except BrokenProcessPool:
        raise DataError(
            f"A tokenizing process ended abruptly, most likely for lack of memory ({job.workers} processes), or "
            f"because a script calls prepare outside `if __name__ == '__main__':`. Use fewer workers, or one. {kept()}"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DataError(
                f"No space to write {error.filename or job.partial}: {error}. Free some, or choose another disk. "
                f"{kept()}"
            ) from error
        raise DataError(f"Preparing {job.out} failed: {error}. {kept()}") from error


def _shards(count: int) -> str:
    return f"{count} finished shard{'' if count == 1 else 's'}"


def _escaped(separator: str) -> str:
    """As `tritium prepare --separator` reads it."""
    return separator.replace("\n", "\\n").replace("\t", "\\t")


def _difference(key: str, before: object, now: object) -> str:
    if key == "sources":
        return "the sources' names, sizes or dates changed"
    return f"{key} was {before!r}, now {now!r}"


def _write_atomic(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
