"""gpt2_124m: GPT-2 small (124M parameters) on one GPU or more; about 0.5M tokens a step as in the GPT-3 paper's table
2.1 for this size class.
"""

from tritium.engine.config import Config, GPTConfig, OptimConfig, TrainConfig


def config() -> Config:
    return Config(
        name="gpt2_124m",
        model=GPTConfig(n_layer=12, n_head=12, n_embd=768),
        train=TrainConfig(steps=19073, batch_rows=512, micro_rows=32),
        optim=OptimConfig(lr=6e-4, warmup_steps=700),
    )
