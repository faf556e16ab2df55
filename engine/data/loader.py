"""Batches of rows from token shards: an order that is a function, a state that is one integer.

**Samples.** Sample i, for i = 0, 1, 2 … without end, is one row of T + 1 consecutive tokens: T inputs, and the same
shifted by one as targets. An epoch is one pass over the split's windows of T tokens, in an order that a keyed
permutation of (seed, epoch) gives with no memory; each epoch lays its windows from another starting place, so that rows
are not cut at the same tokens twice. `sample(i)` needs neither state nor neighbours.

**Ranks.** Micro-step k of a run with W ranks of b rows covers the global samples p + k·W·b … p + (k+1)·W·b − 1 where p
is where it started, and rank r takes the rows r·b … (r+1)·b − 1 of them. An optimizer step of A micro-steps therefore
covers one contiguous range of A·W·b samples, the same one for every factorisation of that number, and the loss does not
depend on how the work is spread.

**State.** `position`, the global index of the next sample to be handed out, the same on every rank. A loader made with
`start_sample=position` goes on from there, also with other ranks or rows. What the background thread has read ahead
does not count.

Shapes: B rows of a batch, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch

from tritium.engine.data.errors import DataError
from tritium.engine.data.shards import Dataset, Split, open_dataset

IGNORED = -100  # target of a place that has none: what torch's cross-entropy ignores by default
_MASK = (1 << 64) - 1
_FEISTEL_ROUNDS = 8


class Batch(NamedTuple):
    """`ids` and `targets` (B, T) int64; `seq_start` (B, T) int32, the index in the row where each token's document
    starts.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    seq_start: torch.Tensor


class Loader:
    """Endless iterator over this rank's batches; see the module for the order. Close it, or use it in a `with`
    statement.

    folder         a prepared folder, or an opened `Dataset`
    T              tokens per row
    batch_rows     B, rows per batch on this rank
    start_sample   global index of the first sample
    shuffle        False: windows in the order they lie on the disk
    pin_memory     put batches into page-locked memory, from which copies to the GPU are asynchronous
    prefetch       batches read ahead by a background thread; 0: none, read when asked
    vocab_size     V of the model; ids at or above it are an error at once

    Raises `DataError` if the split is shorter than a row, if ids do not fit V, or for what `open_dataset` finds.
    """

    def __init__(
        self,
        folder: str | Path | Dataset,
        split: str,
        T: int,
        batch_rows: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_sample: int = 0,
        shuffle: bool = True,
        pin_memory: bool = False,
        prefetch: int = 2,
        vocab_size: int | None = None,
    ):
        for name, value, least in (
            ("T", T, 1),
            ("batch_rows", batch_rows, 1),
            ("start_sample", start_sample, 0),
            ("prefetch", prefetch, 0),
        ):
            if value < least:
                raise DataError(f"{name} must be at least {least}, got {value}.")
        if not 0 <= rank < world_size:
            raise DataError(f"rank must be at least 0 and below world_size {world_size}, got {rank}.")
        if pin_memory and not torch.cuda.is_available():
            raise DataError("pin_memory needs a CUDA device, and none is available. Leave it off on a CPU.")
        dataset = folder if isinstance(folder, Dataset) else open_dataset(folder)
        self.tokens = dataset.split(split)
        self.windows = Windows(len(self.tokens), T, seed, shuffle, f"split {split!r} of {dataset.folder}")
        check_vocabulary(self.tokens, vocab_size)
        self.T = T
        self.batch_rows = batch_rows
        self.rank = rank
        self.world_size = world_size
        self.vocab_size = vocab_size
        self.pin_memory = pin_memory
        self.position = start_sample
        self._ahead = _ReadAhead(self, start_sample, prefetch) if prefetch else None

    @property
    def global_rows(self) -> int:
        """Samples that one micro-step takes on all ranks together."""
        return self.batch_rows * self.world_size

    @property
    def samples_per_epoch(self) -> int:
        return self.windows.per_epoch

    def sample(self, index: int) -> np.ndarray:
        """(T + 1,) ids of global sample `index`."""
        start = self.windows.start(index)
        return self.tokens.tokens(start, start + self.T + 1)

    def batch(self, global_start_index: int) -> Batch:
        """This rank's rows of the micro-step that begins at a global sample index; neither uses nor changes the
        position.
        """
        first = global_start_index + self.rank * self.batch_rows
        starts = [self.windows.start(index) for index in range(first, first + self.batch_rows)]
        return _pinned(_batch(self.tokens, starts, self.T, self.vocab_size), self.pin_memory)

    def batches_for_step(self, step: int, micro_steps: int = 1) -> list[Batch]:
        """This rank's micro-batches of optimizer step `step`, counted from global sample 0, without touching the
        position.
        """
        begin = step * micro_steps * self.global_rows
        return [self.batch(begin + k * self.global_rows) for k in range(micro_steps)]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self._ahead.next() if self._ahead else self.batch(self.position)
        self.position += self.global_rows
        return batch

    def close(self) -> None:
        """Stop the background thread. The loader can still give `batch` and `sample`."""
        if self._ahead:
            self._ahead.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def evaluation_batches(
    folder: str | Path | Dataset,
    split: str,
    T: int,
    batch_rows: int,
    limit_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    vocab_size: int | None = None,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Batches that predict every token of a split but the first exactly once: windows of T tokens side by side, in
    order.

    Places past the end have id = the last id and target `IGNORED`, so that every batch has B rows of T and every rank
    as many batches: weigh losses by the targets that are not ignored. With `limit_tokens`, about that many tokens:
    whole windows at equal distances over the whole split. Ranks share the rows as in `Loader`.
    """
    dataset = folder if isinstance(folder, Dataset) else open_dataset(folder)
    tokens = dataset.split(split)
    check_vocabulary(tokens, vocab_size)
    if len(tokens) < 2:
        raise DataError(
            f"Split {split!r} of {dataset.folder} has {len(tokens)} token, at least 2 are needed to predict one. "
            "Prepare more."
        )
    windows = -(-(len(tokens) - 1) // T)
    chosen = windows if limit_tokens is None else min(windows, max(1, limit_tokens // T))
    starts = [i * windows // chosen * T for i in range(chosen)]
    # Starts beyond the end make rows whose targets are all ignored.
    global_rows = batch_rows * world_size
    starts += [len(tokens)] * (-chosen % global_rows)

    def batches() -> Iterator[Batch]:
        for begin in range(rank * batch_rows, len(starts), global_rows):
            yield _pinned(_batch(tokens, starts[begin : begin + batch_rows], T, vocab_size), pin_memory)

    return batches()


class Windows:
    """Where sample i starts, 0 ≤ start ≤ tokens − T − 1: a pure function of (tokens, T, seed, shuffle, i)."""

    def __init__(self, tokens: int, T: int, seed: int, shuffle: bool, what: str = "the data"):
        if tokens < T + 1:
            raise DataError(
                f"A row of T = {T} tokens and the next one as target needs {T + 1} tokens, {what} has {tokens}: not "
                "one row can be made. Use a smaller T or prepare more text."
            )
        self.T = T
        self.seed = seed
        self.shuffle = shuffle
        windows = (tokens - 1) // T
        # One window less leaves room to move the others.
        self.per_epoch = max(1, windows - 1) if shuffle else windows
        self.room = tokens - self.per_epoch * T  # offsets 0 … room − 1 keep the last target inside

    def start(self, index: int) -> int:
        epoch, window = divmod(index, self.per_epoch)
        if not self.shuffle:
            return window * self.T
        key = _mix(_mix(self.seed & _MASK) ^ epoch)
        return permute(window, self.per_epoch, key) * self.T + _mix(key ^ 1) % self.room


def permute(index: int, n: int, key: int) -> int:
    """The place of `index` in a permutation of 0 … n − 1 that `key` (64 bits) picks; no memory.

    A Feistel network permutes 0 … 2^k − 1 for the smallest 2^k ≥ n; a result of n or more is put through again until it
    is below n (cycle walking, Black and Rogaway 2002), which is a permutation too and takes less than two passes on
    average.
    """
    bits = (n - 1).bit_length()
    if bits == 0:
        return 0
    low_bits = bits // 2
    high_bits = bits - low_bits
    while True:
        # The halves change places every round, and with an even number of rounds end with the widths they began with.
        high, low = index >> low_bits, index & ((1 << low_bits) - 1)
        width = high_bits
        for round_number in range(_FEISTEL_ROUNDS):
            high, low = low, high ^ (_mix(key ^ _mix(round_number << 48 | low)) & ((1 << width) - 1))
            width = bits - width
        index = high << low_bits | low
        if index < n:
            return index


def check_vocabulary(split: Split, vocab_size: int | None) -> None:
    """Raise `DataError` if the split has an id that a model of `vocab_size` ids cannot look up."""
    largest = split.manifest.max_token_id
    if vocab_size is not None and largest >= vocab_size:
        raise DataError(
            f"Token ids must be below the model's vocabulary size V = {vocab_size}, split {split.name!r} of "
            f"{split.folder} has id {largest}: it was made with another tokenizer. Set the model's vocabulary to the "
            "tokenizer's, or prepare the data with the model's tokenizer."
        )


def _mix(x: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014) after adding its increment: 64 bits in, 64 well-mixed
    bits out.
    """
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31


def _batch(tokens: Split, starts: list[int], T: int, vocab_size: int | None) -> Batch:
    B = len(starts)
    rows = np.empty((B, T + 1), np.int64)
    seq_start = np.zeros((B, T), np.int32)
    valid = np.empty(B, np.int64)  # tokens of the row that exist
    for row, start in enumerate(starts):
        stop = min(start + T + 1, len(tokens))
        valid[row] = max(stop - start, 0)
        rows[row, : valid[row]] = tokens.tokens(min(start, stop), stop)
        rows[row, valid[row] :] = rows[row, valid[row] - 1] if valid[row] else 0
        inputs = min(T, int(valid[row]))
        seq_start[row, :inputs] = tokens.seq_start(start, inputs) if inputs else 0
        seq_start[row, inputs:] = seq_start[row, inputs - 1] if inputs else 0
    if vocab_size is not None and (largest := int(rows.max())) >= vocab_size:
        row = int(rows.max(axis=1).argmax())
        raise DataError(
            f"Token id {largest} in the row at token {starts[row]} of split {tokens.name!r} of {tokens.folder} is not "
            f"below the vocabulary size V = {vocab_size}, though the manifest promised so: the shard is damaged. "
            "Verify the folder and restore or prepare it again."
        )
    targets = rows[:, 1:].copy()
    targets[np.arange(1, T + 1) >= valid[:, None]] = IGNORED
    return Batch(torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(targets), torch.from_numpy(seq_start))


def _pinned(batch: Batch, pin_memory: bool) -> Batch:
    return Batch(*(tensor.pin_memory() for tensor in batch)) if pin_memory else batch


class _ReadAhead:
    """A thread that makes batches in order into a bounded queue; what it raises is raised to the consumer."""

    def __init__(self, loader: Loader, start: int, depth: int):
        self.loader = loader
        self.start = start
        self.queue: queue.Queue[Batch | BaseException] = queue.Queue(depth)
        self.stopping = threading.Event()
        self.failure: BaseException | None = None
        self.thread: threading.Thread | None = None

    def next(self) -> Batch:
        if self.failure is not None:
            raise self.failure
        if self.stopping.is_set():
            raise RuntimeError("the loader is closed")
        if self.thread is None:  # at the first batch, so that a loader that is only asked for `batch` has no thread
            self.thread = threading.Thread(target=self._run, name="tritium-loader", daemon=True)
            self.thread.start()
        item = self.queue.get()
        if isinstance(item, BaseException):
            self.failure = item
            raise item
        return item

    def close(self) -> None:
        self.stopping.set()
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _run(self) -> None:
        start = self.start
        while not self.stopping.is_set():
            item: Batch | BaseException
            try:
                item = self.loader.batch(start)
            except BaseException as error:  # handed to the consumer
                item = error
            start += self.loader.global_rows
            while not self.stopping.is_set():
                try:
                    self.queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
