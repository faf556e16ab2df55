"""Order, shape and ends of batches: a pure function of (seed, sample index), the same for every way of spreading the
work."""

import collections
import itertools
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritium.engine.data import loader as loader_module
from tritium.engine.data.errors import DataError
from tritium.engine.data.loader import IGNORED, Loader, Windows, evaluation_batches, permute
from tritium.engine.data.prepare import prepare
from tritium.engine.data.shards import Dataset, open_dataset

PERMUTATION = [739, 233, 458, 474, 703, 890]
STARTS = [10116, 68932, 39172, 26425]
PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    folder = tmp_path_factory.mktemp("loader")
    texts = [f"{i} " + "x" * (i * 37 % 61) for i in range(400)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(
        folder / "a.jsonl", folder / "data", tokenizer="bytes", val_fraction=0.1, shard_tokens=3000, say=lambda _: None
    )
    return open_dataset(folder / "data")


def equal(a, b) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@PROPERTY
@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
def test_permutation_is_bijective(n, key):
    assert sorted(permute(i, n, key) for i in range(n)) == list(range(n))


def test_permutation_of_a_huge_range():
    n = 10**15 + 37
    found = [permute(i, n, 3) for i in range(2000)]
    assert len(set(found)) == 2000
    assert max(found) < n
    assert 0.45 < np.mean(found) / n < 0.55


def test_permutation_looks_random():
    # Over many keys every place goes everywhere about equally often (n = 5 needs cycle walking), and neighbours part.
    n, keys = 5, 4000
    table = np.zeros((n, n))
    for key in range(keys):
        for i in range(n):
            table[i, permute(i, n, key)] += 1
    assert abs(table / keys - 1 / n).max() < 0.03
    found = np.array([permute(i, 10_000, 1) for i in range(10_000)])
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(found, np.arange(10_000))[0, 1]) < 0.05
    assert (permute(7, 10_000, 1), permute(7, 10_000, 2)) != (permute(8, 10_000, 1), permute(8, 10_000, 2))


def test_the_order_never_changes():
    """Checkpoints hold a sample index alone: another order would repeat some text and skip other."""
    assert [permute(i, 1000, 42) for i in range(6)] == PERMUTATION
    windows = Windows(100_001, 64, seed=7, shuffle=True)
    assert [windows.start(i) for i in (0, 1, 2, 5000)] == STARTS


@PROPERTY
@given(st.integers(2, 5000), st.integers(1, 70), st.integers(0, 2**40), st.booleans(), st.integers(0, 3))
def test_an_epoch_is_a_set_of_disjoint_rows_inside_the_data(tokens, T, seed, shuffle, epoch):
    if tokens < T + 1:
        with pytest.raises(DataError):
            Windows(tokens, T, seed, shuffle)
        return
    windows = Windows(tokens, T, seed, shuffle)
    first = epoch * windows.per_epoch
    starts = sorted(windows.start(i) for i in range(first, first + windows.per_epoch))
    assert starts[0] >= 0
    assert starts[-1] + T + 1 <= tokens
    assert all(b - a == T for a, b in itertools.pairwise(starts))
    assert windows.per_epoch >= max(1, (tokens - 1) // T - 1)


def test_epochs_differ_and_reach_every_token():
    windows = Windows(1000, 64, seed=1, shuffle=True)
    epochs = [[windows.start(e * windows.per_epoch + i) for i in range(windows.per_epoch)] for e in range(200)]
    assert len({tuple(epoch) for epoch in epochs}) == 200
    seen = set()
    for epoch in epochs:
        seen.update(t for start in epoch for t in range(start, start + 65))
    assert seen == set(range(1000))


def test_batches_are_the_samples(dataset):
    T = 48
    split = dataset.split("train")
    whole = split.tokens(0, len(split)).astype(np.int64)
    starts = set(split.document_starts(0, len(split)).tolist())
    with Loader(dataset, "train", T, 4, seed=5, vocab_size=257) as loader:
        for step in range(30):
            batch = next(loader)
            assert [tensor.dtype for tensor in batch] == [torch.int64, torch.int64, torch.int32]
            assert {tuple(tensor.shape) for tensor in batch} == {(4, T)}
            for row in range(4):
                start = loader.windows.start(4 * step + row)
                assert batch.ids[row].tolist() == whole[start : start + T].tolist()
                assert batch.targets[row].tolist() == whole[start + 1 : start + T + 1].tolist()
                assert loader.sample(4 * step + row).tolist() == whole[start : start + T + 1].tolist()
                current, expected = 0, []
                for place in range(T):
                    current = place if start + place in starts else current
                    expected.append(current)
                assert batch.seq_start[row].tolist() == expected
            assert loader.position == 4 * (step + 1)


@PROPERTY
@given(
    st.sampled_from([(1, 12, 1), (2, 6, 1), (3, 2, 2), (2, 3, 2), (12, 1, 1), (1, 1, 12)]),
    st.integers(0, 500),
    st.integers(0, 9),
)
def test_a_step_is_the_same_samples_however_it_is_spread(dataset, spread, start, seed):
    world_size, rows, micro_steps = spread
    reference = Loader(dataset, "train", 16, 12, seed, start_sample=start, prefetch=0)
    loaders = [
        Loader(dataset, "train", 16, rows, seed, rank, world_size, start, prefetch=0) for rank in range(world_size)
    ]
    for _ in range(2):
        parts = [next(loader) for _ in range(micro_steps) for loader in loaders]
        whole = next(reference)
        assert equal([torch.cat(column) for column in zip(*parts, strict=True)], whole)
        assert {loader.position for loader in loaders} == {reference.position}


def test_the_position_is_the_whole_state(dataset):
    with Loader(dataset, "train", 32, 6, seed=3) as loader:
        for _ in range(9):
            next(loader)
        position = loader.position
        expected = [next(loader) for _ in range(80)]  # beyond one epoch
    assert position == 9 * 6
    assert loader.position > loader.samples_per_epoch
    with Loader(dataset, "train", 32, 6, seed=3, start_sample=position) as again:
        assert all(equal(next(again), batch) for batch in expected)
    other = Loader(dataset, "train", 32, 3, seed=3, start_sample=position, prefetch=0)
    assert equal([torch.cat(pair) for pair in zip(next(other), next(other), strict=True)], expected[0])


def test_random_access(dataset):
    with Loader(dataset, "train", 32, 4, seed=3, rank=1, world_size=2) as loader:
        batches = [next(loader) for _ in range(6)]
        assert equal(loader.batch(16), batches[2])
        assert all(equal(a, b) for a, b in zip(loader.batches_for_step(1, micro_steps=3), batches[3:], strict=True))
        assert loader.position == 48
    assert equal(loader.batch(0), batches[0])  # closed, too


def test_seeds_and_order(dataset):
    first = [Loader(dataset, "train", 32, 8, seed, prefetch=0).batch(0) for seed in (0, 0, 1)]
    assert equal(first[0], first[1])
    assert not equal(first[0], first[2])
    straight = Loader(dataset, "train", 32, 8, 0, shuffle=False, prefetch=0)
    assert straight.windows.start(5) == 160
    assert straight.windows.start(straight.samples_per_epoch + 1) == 32


def test_closing_ends_the_thread_and_failures_reach_the_consumer(dataset, monkeypatch):
    def threads():
        return [thread for thread in threading.enumerate() if thread.name == "tritium-loader"]

    loader = Loader(dataset, "train", 32, 4, seed=0)
    assert not threads()
    next(loader)
    assert len(threads()) == 1
    loader.close()
    assert not threads()
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)

    made = loader_module._batch
    calls = collections.Counter()

    def failing(*arguments):
        calls["made"] += 1
        if calls["made"] == 4:
            raise OSError("the disk is gone")
        return made(*arguments)

    monkeypatch.setattr(loader_module, "_batch", failing)
    with Loader(dataset, "train", 32, 4, seed=0) as loader:
        for _ in range(3):
            next(loader)
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                next(loader)
        assert loader.position == 12
    assert not threads()


def test_reading_ahead_is_bounded(dataset, monkeypatch):
    made = loader_module._batch
    calls = collections.Counter()
    monkeypatch.setattr(loader_module, "_batch", lambda *a: (calls.update(["made"]), made(*a))[1])
    with Loader(dataset, "train", 32, 4, seed=0, prefetch=3) as loader:
        next(loader)
        threading.Event().wait(0.3)
        assert calls["made"] == 5  # one handed out, three waiting, one in the thread's hand


@PROPERTY
@given(st.integers(1, 300), st.integers(1, 7), st.integers(1, 3))
def test_evaluation_predicts_every_token_once(dataset, T, rows, world_size):
    split = dataset.split("val")
    whole = split.tokens(0, len(split)).astype(np.int64)
    per_rank = [
        list(evaluation_batches(dataset, "val", T, rows, rank=r, world_size=world_size)) for r in range(world_size)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    assert {tuple(batch.ids.shape) for batches in per_rank for batch in batches} == {(rows, T)}
    ordered = [batch for group in zip(*per_rank, strict=True) for batch in group]
    ids = torch.cat([batch.ids for batch in ordered]).flatten()
    targets = torch.cat([batch.targets for batch in ordered]).flatten()
    counted = targets != IGNORED
    assert targets[counted].tolist() == whole[1:].tolist()
    assert ids[counted].tolist() == whole[:-1].tolist()
    assert all(bool((batch.seq_start <= torch.arange(T)).all()) for batch in ordered)


def test_limited_evaluation_is_spread_over_the_split(dataset):
    split = dataset.split("val")
    T = 16
    windows = -(-(len(split) - 1) // T)
    batches = list(evaluation_batches(dataset, "val", T, 2, limit_tokens=8 * T))
    assert sum(int((batch.targets != IGNORED).sum()) for batch in batches) == 8 * T
    rows = torch.cat([batch.ids for batch in batches])
    expected = [split.tokens(i * windows // 8 * T, i * windows // 8 * T + T).tolist() for i in range(8)]
    assert rows.tolist() == expected


def test_rows_longer_than_the_validation_split_still_evaluate(dataset):
    split = dataset.split("val")
    (batch,) = evaluation_batches(dataset, "val", len(split) * 2, 1)
    assert int((batch.targets != IGNORED).sum()) == len(split) - 1


def test_bad_arguments(dataset, tmp_path):
    tokens = len(dataset.split("train"))
    Loader(dataset, "train", tokens - 1, 1, 0)
    with pytest.raises(DataError, match=rf"T = {tokens} tokens.*has {tokens}: not one row"):
        Loader(dataset, "train", tokens, 1, 0)
    for vocab_size in (256, 100):
        with pytest.raises(DataError, match=rf"V = {vocab_size}, split 'train' of .* has id 256"):
            Loader(dataset, "train", 16, 1, 0, vocab_size=vocab_size)
        with pytest.raises(DataError, match=rf"V = {vocab_size}, split 'val'"):
            evaluation_batches(dataset, "val", 16, 1, vocab_size=vocab_size)
    with pytest.raises(DataError, match="below world_size 2, got 2"):
        Loader(dataset, "train", 16, 1, 0, rank=2, world_size=2)
    for name in ("T", "batch_rows", "start_sample", "prefetch"):
        arguments = {"T": 16, "batch_rows": 1, "seed": 0, name: -1}
        with pytest.raises(DataError, match=f"{name} must be at least"):
            Loader(dataset, "train", **arguments)
    with pytest.raises(DataError, match="not a prepared data folder"):
        Loader(tmp_path, "train", 16, 1, 0)
    if not torch.cuda.is_available():
        with pytest.raises(DataError, match="pin_memory needs a CUDA device"):
            Loader(dataset, "train", 16, 1, 0, pin_memory=True)


def test_an_id_that_the_manifest_did_not_promise(dataset, tmp_path):
    for path in Path(dataset.folder).glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damaged = bytearray((tmp_path / "train_00000.bin").read_bytes())
    damaged[100:102] = (60_000).to_bytes(2, "little")
    (tmp_path / "train_00000.bin").write_bytes(damaged)
    loader = Loader(open_dataset(tmp_path, verify=False), "train", 32, 4, 0, shuffle=False, vocab_size=257)
    with loader, pytest.raises(DataError, match=r"id 60000 in the row at token 32 .* V = 257"):
        next(loader)
