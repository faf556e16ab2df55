"""gpt2_350m: GPT-2 medium (350M parameters) on one GPU or more; about 0.5M tokens a step as in the GPT-3 paper's
table 2.1 for this size class.
"""

from tritium.engine.config import Config, GPTConfig, OptimConfig, TrainConfig


def config() -> Config:
    return Config(
        name="gpt2_350m",
        model=GPTConfig(n_layer=24, n_head=16, n_embd=1024),
        train=TrainConfig(steps=38147, batch_rows=512, micro_rows=16),
        optim=OptimConfig(lr=3e-4, warmup_steps=700),
    )
