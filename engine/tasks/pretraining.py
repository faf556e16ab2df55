"""Pretraining: predict the next token of a prepared corpus."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tritium.engine.config import Config
from tritium.engine.data.loader import Loader, evaluation_batches
from tritium.engine.data.shards import Dataset, open_dataset
from tritium.engine.model import GPT
from tritium.engine.step import MicroBatch


class Pretraining:
    """Next-token prediction on the folder ``data``; config gives the row length, batch sizes and seed."""

    def __init__(self, config: Config, data: pathlib.Path):
        self.config = config
        self.dataset: Dataset = open_dataset(data)
        self.tokenizer = self.dataset.tokenizer
        self.vocab_size = self.tokenizer.vocab_size
        self.identity = {"task": "pretraining", "tokenizer": self.tokenizer.identity, "data": self.dataset.identity}

    def check(self) -> None:
        """Raise DataError when the data cannot feed this model: rows too long, ids beyond the vocabulary,
        no validation split.
        """
        c = self.config
        Loader(
            self.dataset, "train", T=c.model.block_size, batch_rows=c.train.micro_rows, seed=c.data.seed, prefetch=0,
            vocab_size=c.model.vocab_size,
        )  # fmt: skip
        self.dataset.split("val")  # a run ends with a validation loss: better to miss the split now

    def batches(self, start: int, rank: int = 0, world_size: int = 1, pin_memory: bool = False) -> Iterator[MicroBatch]:
        c = self.config
        loader = Loader(
            self.dataset, "train", T=c.model.block_size, batch_rows=c.train.micro_rows, seed=c.data.seed, rank=rank,
            world_size=world_size, start_sample=start, vocab_size=c.model.vocab_size, pin_memory=pin_memory,
        )  # fmt: skip
        with loader:
            for batch in loader:
                yield MicroBatch(batch.ids, batch.targets, batch.seq_start if c.data.documents else None)

    @staticmethod
    def loss(model: Callable[..., Tensor], batch: MicroBatch) -> Tensor:
        return model(batch.ids, batch.targets, batch.seq_start)

    def evaluate(self, model: torch.nn.Module, device: torch.device, limit_tokens: int = 0) -> dict[str, float]:
        """Nats per token and bits per byte of text over about ``limit_tokens`` validation tokens, evenly spaced
        windows (0: all).
        """
        from tritium.engine.evaluate import validation_loss

        c = self.config
        batches = evaluation_batches(
            self.dataset, "val", T=c.model.block_size, batch_rows=c.train.micro_rows, limit_tokens=limit_tokens or None
        )
        total, tokens = validation_loss(model, batches, device, documents=c.data.documents)
        loss = total / tokens
        return {"val_loss": loss, "val_tokens": tokens, "bits_per_byte": self.dataset.split("val").bits_per_byte(loss)}

    def sample(self, model: GPT, device: torch.device, tokens: int, seed: int = 0, prompt: str = "") -> str:
        """Text the model writes after ``prompt`` (or at the start of a document)."""
        from tritium.engine.generate import generate

        if tokens == 0:
            return ""
        ids = [self.tokenizer.eot, *self.tokenizer.encode(prompt)]
        out = generate(
            model, [ids], max_new_tokens=tokens, temperature=0.8, top_k=200, seed=seed, stop_ids=(self.tokenizer.eot,)
        )
        return prompt + self.tokenizer.decode([i for i in out[0] if i != self.tokenizer.eot])

    def baselines(self) -> dict[str, float]:
        """Bits per byte of the unigram and bigram models of the training tokens on the validation split."""
        from tritium.engine.data.ngram import baselines

        return baselines(self.dataset)
