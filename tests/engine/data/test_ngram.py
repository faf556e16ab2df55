"""The baselines against hand computation, and as probability distributions."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tritium.engine.data import ngram
from tritium.engine.data.errors import DataError
from tritium.engine.data.ngram import Bigram, Unigram, baselines, discount_of
from tritium.engine.data.prepare import prepare
from tritium.engine.data.shards import open_dataset


def test_unigram_by_hand():
    # counts 3, 1, 2, 0: n₁ = 1, n₂ = 1, so d = 1 / 3; three kinds free 3 d = 1 of 6, spread over 4 ids: 1/24 each.
    model = Unigram(np.array([3, 1, 2, 0]))
    expected = [(3 - 1 / 3) / 6 + 1 / 24, (1 - 1 / 3) / 6 + 1 / 24, (2 - 1 / 3) / 6 + 1 / 24, 1 / 24]
    assert 2 ** model.log2(np.arange(4)) == pytest.approx(expected)


def test_bigram_by_hand():
    # a b a b a c: pairs ab 2, ba 2, ac 1, so n₁ = 1, n₂ = 2, d = 1 / 5.
    model = Bigram(np.array([0, 1, 0, 1, 0, 2]), 4)
    assert model.discount == pytest.approx(1 / 5)
    # Preceding kinds: a 1, b 1, c 1; no twos, so e = 1 / 2: q(x) = (1 - 1/2) / 3 + (1/2 · 3 / 3) / 4, q(unseen) = 1/8.
    q = [0.5 / 3 + 1 / 8] * 3 + [1 / 8]
    assert model.lower.probabilities == pytest.approx(q)
    after_a = [0.2 * 2 / 3 * q[0], 1.8 / 3 + 0.2 * 2 / 3 * q[1], 0.8 / 3 + 0.2 * 2 / 3 * q[2], 0.2 * 2 / 3 * q[3]]
    assert 2 ** model.log2(np.zeros(4, int), np.arange(4)) == pytest.approx(after_a)
    after_b = [1.8 / 2 + 0.2 / 2 * q[0], 0.1 * q[1], 0.1 * q[2], 0.1 * q[3]]
    assert 2 ** model.log2(np.ones(4, int), np.arange(4)) == pytest.approx(after_b)
    assert 2 ** model.log2(np.full(4, 3), np.arange(4)) == pytest.approx(q)  # never seen before anything


@settings(deadline=None, derandomize=True, max_examples=50)
@given(hnp.arrays(np.int64, st.integers(2, 200), elements=st.integers(0, 12)), st.integers(13, 20))
def test_probabilities_sum_to_one(tokens, vocab_size):
    everything = np.arange(vocab_size)
    assert Unigram(np.bincount(tokens, minlength=vocab_size)).probabilities.sum() == pytest.approx(1)
    model = Bigram(tokens, vocab_size)
    for before in range(vocab_size):
        p = 2 ** model.log2(np.full(vocab_size, before), everything)
        assert p.sum() == pytest.approx(1)
        assert (p > 0).all()


def test_discount():
    assert discount_of(np.array([1, 1, 2, 5])) == pytest.approx(2 / 4)
    assert discount_of(np.array([1, 1])) == discount_of(np.array([2, 7])) == 0.5


def test_large_ids_do_not_overflow():
    tokens = np.array([50256, 0, 50256, 50255, 50256, 0], np.uint16)
    p = 2 ** Bigram(tokens, 50257).log2(np.full(50257, 50256, np.uint16), np.arange(50257))
    assert p.sum() == pytest.approx(1)
    assert p[0] > 0.4 > p[1]


def test_a_markov_source_is_measured_at_its_entropy():
    rng = np.random.default_rng(0)
    move = rng.random((200_001, 1)) < 0.9  # after i comes i + 1 (of 8) with 9 in 10, else any
    steps = np.where(move[:, 0], 1, rng.integers(0, 8, 200_001))
    tokens = np.cumsum(steps) % 8
    p_next, p_other = 0.9 + 0.1 / 8, 0.1 / 8
    entropy = -(p_next * math.log2(p_next) + 7 * p_other * math.log2(p_other))
    model = Bigram(tokens[:100_000], 8)
    assert -model.log2(tokens[100_000:-1], tokens[100_001:]).mean() == pytest.approx(entropy, abs=0.02)
    assert -Unigram(np.bincount(tokens[:100_000])).log2(tokens[100_000:]).mean() == pytest.approx(3, abs=0.01)


def test_baselines_of_a_folder(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("".join(f"the cat {i % 7} sat on the mat\n" for i in range(4000)))
    prepare(
        tmp_path / "a.txt", tmp_path / "data", tokenizer="bytes", separator="\n", val_fraction=0.2, say=lambda _: None
    )
    dataset = open_dataset(tmp_path / "data")
    found = baselines(dataset)
    # By the definition, over all validation tokens.
    train, val = (dataset.split(name) for name in ("train", "val"))
    train, val = train.tokens(0, len(train)), val.tokens(0, len(val))
    bits = -Bigram(train, 257).log2(val[:-1], val[1:]).mean()
    assert found["bigram"] == pytest.approx(bits * len(val) / dataset.manifest.splits["val"].bytes)
    assert found["bigram"] < 0.7 * found["unigram"]
    # Sampled, nearly the same; the sample has the size it should.
    assert len(ngram._sample(dataset.split("train"), 6400)) == 6400
    sampled = baselines(dataset, train_tokens_max=20_000, val_tokens_max=5_000)
    assert sampled["bigram"] == pytest.approx(found["bigram"], rel=0.1)


def test_too_little_text():
    with pytest.raises(DataError, match="at least 2"):
        Bigram(np.array([1]), 4)
    with pytest.raises(DataError, match="at least one"):
        Unigram(np.zeros(4, int))
