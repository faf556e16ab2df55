"""Evaluation: the mean loss of a model over a validation split, in nats per token, as perplexity and as bits per byte.

``validation_loss`` is what the training loop and ``tritium evaluate`` both call. Bits per byte = nats per token
/ ln 2 × tokens of the split / bytes of its text: unlike a loss per token it compares models whose tokenizers
differ.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

IGNORED = -100  # target of a place that predicts nothing: the ops' ``ignore_index``


class Batch(Protocol):
    """ids and targets (B, T) int64; seq_start (B, T) int32, the index in the row where each token's document starts."""

    @property
    def ids(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def seq_start(self) -> Tensor: ...


@dataclass(frozen=True)
class Evaluation:
    """A model's figures on a validation split. loss: nats per token over ``tokens`` targets.

    baselines: bits per byte of the unigram and bigram models of the training split, where asked for.
    """

    loss: float
    tokens: int
    bits_per_byte: float
    baselines: Mapping[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700.0 else math.inf


def validation_loss(
    model: torch.nn.Module, batches: Iterable[Batch], device: torch.device, documents: bool = False
) -> tuple[float, int]:
    """(sum of losses in nats, number of targets) over ``batches``; the mean is their quotient.

    model: ``model(ids, targets, seq_start)`` → the sum of its losses, () fp32; in eval mode meanwhile (no
    dropout, kernels bound for evaluation), afterwards as it was. documents: attention stays inside each
    document of a row. The host waits for the device once, at the end. ValueError when there is no target at
    all, which has no mean.
    """
    total = torch.zeros((), device=device, dtype=torch.float64)
    tokens = torch.zeros((), device=device, dtype=torch.int64)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                ids = batch.ids.to(device, non_blocking=True)
                targets = batch.targets.to(device, non_blocking=True)
                seq_start = batch.seq_start.to(device, non_blocking=True) if documents else None
                total += model(ids, targets, seq_start)
                tokens += (targets != IGNORED).sum()
    finally:
        model.train(training)
    if tokens.item() == 0:
        raise ValueError("a validation loss is a mean over targets, and these batches have none; give it more text")
    return total.item(), int(tokens.item())


def evaluate(
    model: torch.nn.Module,
    data: str | pathlib.Path,
    device: torch.device,
    *,
    tokenizer: dict[str, Any],
    T: int,
    batch_rows: int = 8,
    vocab_size: int | None = None,
    documents: bool = False,
    limit_tokens: int = 0,
    baselines: bool = True,
) -> Evaluation:
    """Evaluate on the validation split of the prepared folder ``data``, in rows of T tokens.

    tokenizer: identity of the model's tokenizer. limit_tokens: about so many tokens, spread over the split; 0: all.
    baselines: also fit the unigram and bigram models of the training split. DataError when the folder is
    damaged, has no validation text, or was made with another tokenizer, whose ids mean other text.
    """
    from tritium.engine.data import ngram
    from tritium.engine.data.loader import evaluation_batches
    from tritium.engine.data.shards import open_dataset
    from tritium.engine.data.tokenizer import check_same_tokenizer

    dataset = open_dataset(data)
    check_same_tokenizer(dataset.manifest.tokenizer, tokenizer, "the model")
    batches = evaluation_batches(dataset, "val", T, batch_rows, limit_tokens or None, vocab_size=vocab_size)
    total, tokens = validation_loss(model, batches, device, documents)
    return Evaluation(
        loss=total / tokens,
        tokens=tokens,
        bits_per_byte=dataset.split("val").bits_per_byte(total / tokens),
        baselines=ngram.baselines(dataset) if baselines else {},
    )
