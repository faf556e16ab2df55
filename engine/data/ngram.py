"""Unigram and bigram baselines over token ids: what a language model has to beat before it has learned anything about
context.

Both are smoothed by interpolated absolute discounting, the bigram after Kneser and Ney (1995): every seen pair gives up
a discount d, and the mass so freed goes to a lower-order distribution, in which a token weighs as many different tokens
as it has followed.

    p(w | v) = max(c(v w) − d, 0) / c(v) + d · n(v ·) / c(v) · q(w)      q(w) for a v never seen
    q(w)     = max(n(· w) − e, 0) / n(· ·) + e · |{w : n(· w) > 0}| / n(· ·) / V

with c counts, n(v ·) the kinds of tokens seen after v, n(· w) before w, n(· ·) the kinds of pairs. The unigram is the
second line with counts for kinds. Discounts are n₁ / (n₁ + 2 n₂) of the training counts (Ney, Essen and Kneser 1994).
Nothing is fitted on validation text.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from tritium.engine.data.errors import DataError
from tritium.engine.data.shards import Dataset, Split, open_dataset

TRAIN_TOKENS_MAX = 8_000_000
VAL_TOKENS_MAX = 2_000_000
BLOCKS = 64


class Unigram:
    """Interpolated absolute discounting towards the uniform distribution over V ids."""

    def __init__(self, counts: np.ndarray):
        """`counts` (V,): how often each id was seen, or, inside a bigram, after how many different ids."""
        total = counts.sum()
        if total == 0:
            raise DataError("An n-gram model needs at least one training token, got none.")
        discount = discount_of(counts[counts > 0])
        uniform = discount * np.count_nonzero(counts) / total / len(counts)
        self.probabilities = np.maximum(counts - discount, 0) / total + uniform

    def log2(self, tokens: np.ndarray) -> np.ndarray:
        """(N,) log₂ probability of each of `tokens` (N,)."""
        return np.log2(self.probabilities[tokens])


class Bigram:
    """Interpolated Kneser–Ney over pairs that follow one another in `tokens` (N,); ids below `vocab_size`."""

    def __init__(self, tokens: np.ndarray, vocab_size: int):
        if len(tokens) < 2:
            raise DataError(f"A bigram model needs at least 2 training tokens, got {len(tokens)}.")
        self.vocab_size = vocab_size
        self.pairs, self.pair_counts = np.unique(_pairs(tokens[:-1], tokens[1:], vocab_size), return_counts=True)
        first, second = self.pairs // vocab_size, self.pairs % vocab_size
        self.discount = discount_of(self.pair_counts)
        self.contexts = np.bincount(first, self.pair_counts, vocab_size)
        self.followers = np.bincount(first, minlength=vocab_size)
        self.lower = Unigram(np.bincount(second, minlength=vocab_size))

    def log2(self, before: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """(N,) log₂ probability of each of `tokens` (N,) after the one in `before` (N,)."""
        wanted = _pairs(before, tokens, self.vocab_size)
        place = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        counts = np.where(self.pairs[place] == wanted, self.pair_counts[place], 0)
        contexts = self.contexts[before]
        seen = contexts > 0
        total = np.where(seen, contexts, 1)
        backing_off = np.where(seen, self.discount * self.followers[before] / total, 1.0)
        return np.log2(
            np.maximum(counts - self.discount, 0) * seen / total + backing_off * self.lower.probabilities[tokens]
        )


def baselines(
    folder: str | Path | Dataset, train_tokens_max: int = TRAIN_TOKENS_MAX, val_tokens_max: int = VAL_TOKENS_MAX
) -> dict[str, float]:
    """{"unigram": bits per byte, "bigram": bits per byte}: fitted on the training split, evaluated on validation.

    Splits longer than the limits are sampled: 64 blocks at equal distances. Bits per byte = mean bits per predicted
    token · tokens of the split / bytes of its text, end-of-text tokens counted: the measure `Split.bits_per_byte` gives
    for a model's loss. Raises `DataError`.
    """
    dataset = folder if isinstance(folder, Dataset) else open_dataset(folder)
    vocab_size = dataset.manifest.tokenizer["vocab_size"]
    train = _sample(dataset.split("train"), train_tokens_max)
    val = _sample(dataset.split("val"), val_tokens_max)
    if len(val) < 2:
        raise DataError(
            f"The validation split has {len(val)} token, at least 2 are needed to predict one. Prepare more text."
        )
    unigram = Unigram(np.bincount(train, minlength=vocab_size))
    bigram = Bigram(train, vocab_size)
    to_bits_per_byte = dataset.split("val").bits_per_byte(math.log(2))
    return {
        "unigram": float(-unigram.log2(val[1:]).mean() * to_bits_per_byte),
        "bigram": float(-bigram.log2(val[:-1], val[1:]).mean() * to_bits_per_byte),
    }


def discount_of(counts: np.ndarray) -> float:
    """n₁ / (n₁ + 2 n₂) where nₖ of the positive `counts` are k; ½ where that says nothing (no ones, or ones only)."""
    ones, twos = int((counts == 1).sum()), int((counts == 2).sum())
    return ones / (ones + 2 * twos) if ones and twos else 0.5


def _pairs(before: np.ndarray, tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    return before.astype(np.int64) * vocab_size + tokens


def _sample(split: Split, limit: int) -> np.ndarray:
    """(N,) int64, N ≤ limit. Pairs across two blocks are kept: one in a hundred thousand at the default limits."""
    if len(split) <= limit:
        return split.tokens(0, len(split)).astype(np.int64)
    size = max(1, limit // BLOCKS)
    starts = [i * (len(split) - size) // (BLOCKS - 1) for i in range(BLOCKS)]
    return np.concatenate([split.tokens(start, start + size) for start in starts]).astype(np.int64)
