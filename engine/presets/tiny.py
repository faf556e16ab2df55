"""tiny: learns to write English-looking text in a few minutes on two CPU cores. The smallest preset.

Rotary positions, RMSNorm and ReLU² instead of GPT-2's parts, small batches and a high learning rate: learns fastest
per second here (docs/log.md, 2026-11-23).
"""

from tritium.engine.config import Config, DataConfig, GPTConfig, OptimConfig, RunConfig, TrainConfig


def config() -> Config:
    return Config(
        name="tiny",
        model=GPTConfig(
            vocab_size=0,  # from the tokenizer
            vocab_multiple=64,
            block_size=256,
            n_layer=4,
            n_head=3,
            n_embd=192,
            position="rope",
            norm="rms_norm",
            activation="relu2",
        ),
        data=DataConfig(tokenizer="bpe:1024"),
        train=TrainConfig(steps=500, batch_rows=8, micro_rows=8, eval_every=100, eval_tokens=16384, sample_every=250),
        optim=OptimConfig(lr=4e-3, warmup_steps=40),
        run=RunConfig(save_every=100, require_bigram=True),
    )
