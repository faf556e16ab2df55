"""Evaluation: the mean it takes, the mode it leaves the model in, and bits per byte against arithmetic done by hand."""

import json
import math

import pytest
import torch

from tritium.engine.config import GPTConfig
from tritium.engine.data.errors import DataError
from tritium.engine.data.loader import Batch
from tritium.engine.data.prepare import prepare
from tritium.engine.data.shards import open_dataset
from tritium.engine.evaluate import evaluate, validation_loss
from tritium.engine.model import GPT

CPU = torch.device("cpu")
NETWORK = GPTConfig(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=16, vocab_multiple=16, init_std=0.2)


def network(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**NETWORK.__dict__, **changes}))


def batches(count=3, B=2, T=16, ignored=5):
    """Random rows; the last ``ignored`` targets of each batch are not counted."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        rows = torch.randint(61, (B, T + 1), generator=generator)
        targets = rows[:, 1:].clone()
        targets.flatten()[-ignored:] = -100
        seq_start = torch.tensor([0] * 6 + [6] * 10, dtype=torch.int32).expand(B, T)
        yield Batch(rows[:, :-1], targets, seq_start)


def by_hand(model, documents=False):
    total, tokens = 0.0, 0
    model.eval()
    with torch.no_grad():
        for ids, targets, seq_start in batches():
            log_p = model(ids, None, seq_start if documents else None).double().log_softmax(-1)
            for row, target in zip(log_p.flatten(0, 1), targets.flatten().tolist(), strict=True):
                if target != -100:
                    total, tokens = total - row[target].item(), tokens + 1
    return total, tokens


@pytest.mark.parametrize("documents", [False, True])
def test_sum_and_count_are_those_of_the_targets_that_count(documents):
    model = network()
    total, tokens = validation_loss(model, batches(), CPU, documents)
    expected, count = by_hand(model, documents)
    assert (tokens, count) == (81, 81)
    assert total == pytest.approx(expected, rel=1e-6)


def test_documents_matter():
    model = network()
    assert validation_loss(model, batches(), CPU, True)[0] != pytest.approx(
        validation_loss(model, batches(), CPU, False)[0], rel=1e-4
    )


def test_dropout_is_off_and_the_mode_comes_back():
    model = network(dropout=0.5).train()
    first = validation_loss(model, batches(), CPU)
    assert first == validation_loss(model, batches(), CPU)
    assert model.training
    assert all(m.training for m in model.modules())
    assert first[0] == pytest.approx(by_hand(model)[0], rel=1e-6)
    model.eval()
    validation_loss(model, batches(), CPU)
    assert not model.training


def test_the_mode_comes_back_after_an_error():
    model = network().train()

    def damaged():
        yield from batches(1)
        raise DataError("a damaged shard")

    with pytest.raises(DataError, match="a damaged shard"):
        validation_loss(model, damaged(), CPU)
    assert model.training


def test_no_gradient_is_kept():
    model = network().train()
    validation_loss(model, batches(), CPU)
    assert all(p.grad is None for p in model.parameters())


def test_a_mean_over_nothing_is_refused():
    for nothing in ([], batches(ignored=32)):
        with pytest.raises(ValueError, match="these batches have none"):
            validation_loss(network(), nothing, CPU)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    texts = [f"the number {i * i} is the square of {i}" for i in range(200)] + ["\u00e9\u00e9"] * 3
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    prepare([folder / "t.jsonl"], folder / "shards", tokenizer="bpe:300", val_fraction=0.2, say=lambda s: None)
    return folder / "shards"


def test_a_model_that_knows_nothing_needs_log2_v_bits_a_token(data):
    dataset = open_dataset(data)
    V, split = dataset.tokenizer.vocab_size, dataset.manifest.splits["val"]
    model = network(vocab_size=V)
    with torch.no_grad():
        model.wte.weight.zero_()
    result = evaluate(model, data, CPU, tokenizer=dataset.tokenizer.identity, T=16, batch_rows=3, vocab_size=V)
    assert result.tokens == split.tokens - 1
    assert result.loss == pytest.approx(math.log(V), rel=1e-6)
    assert result.perplexity == pytest.approx(V, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(math.log2(V) * split.tokens / split.bytes, rel=1e-6)
    assert 0.0 < result.baselines["bigram"] < result.baselines["unigram"] < result.bits_per_byte


def test_batching_does_not_change_the_result_and_a_limit_takes_fewer(data):
    identity = open_dataset(data).tokenizer.identity
    model = network(vocab_size=300)
    one = evaluate(model, data, CPU, tokenizer=identity, T=16, batch_rows=1, baselines=False)
    many = evaluate(model, data, CPU, tokenizer=identity, T=16, batch_rows=64, baselines=False)
    assert (one.tokens, one.baselines) == (many.tokens, {})
    assert one.loss == pytest.approx(many.loss, rel=1e-6)
    assert evaluate(model, data, CPU, tokenizer=identity, T=16, limit_tokens=64, baselines=False).tokens == 64


def test_another_tokenizer_and_too_small_a_table_are_refused(data, tmp_path):
    from tritium.engine.data.tokenizer import load_tokenizer

    model = network(vocab_size=300)
    with pytest.raises(DataError, match="tokenized with bpe"):
        evaluate(model, data, CPU, tokenizer=load_tokenizer("bytes").identity, T=16)
    with pytest.raises(DataError, match="vocabulary size V = 10"):
        evaluate(model, data, CPU, tokenizer=open_dataset(data).tokenizer.identity, T=16, vocab_size=10)
    with pytest.raises(DataError, match="not a prepared data folder"):
        evaluate(model, tmp_path, CPU, tokenizer={}, T=16)


def test_only_the_cross_entropy_is_measured():
    """Label smoothing and z-loss shape the training loss; counted here they would not be bits of text."""
    plain = validation_loss(network(), batches(), CPU)[0]
    assert validation_loss(network(label_smoothing=0.2, z_loss=0.1), batches(), CPU)[0] == pytest.approx(
        plain, rel=1e-6
    )
    split = network(label_smoothing=0.2, z_loss=0.1, fused_loss=False)
    assert validation_loss(split, batches(), CPU)[0] == pytest.approx(plain, rel=1e-6)
