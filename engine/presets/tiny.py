"""tiny: learns to write English-looking text in a few minutes on two CPU cores. The smallest preset."""

from tritium.engine.config import Config, DataConfig, GPTConfig, OptimConfig, RunConfig, TrainConfig


def config() -> Config:
    return Config(
        name="tiny",
        model=GPTConfig(vocab_size=0, block_size=256, n_layer=4, n_head=4, n_embd=256, vocab_multiple=64),
        data=DataConfig(tokenizer="bpe:4096"),
        train=TrainConfig(steps=400, batch_rows=16, micro_rows=16, eval_every=100, eval_tokens=32768, sample_every=200),
        optim=OptimConfig(lr=2e-3, warmup_steps=40, weight_decay=0.1),
        run=RunConfig(save_every=100, require_bigram=True),
    )
