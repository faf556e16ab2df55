"""gpt2_774m: GPT-2 large (774M parameters) on one GPU or more; about 0.5M tokens a step as in the GPT-3 paper's table
2.1 for this size class.
"""

from tritium.engine.config import Config, GPTConfig, OptimConfig, TrainConfig


def config() -> Config:
    return Config(
        name="gpt2_774m",
        model=GPTConfig(n_layer=36, n_head=20, n_embd=1280),
        train=TrainConfig(steps=76294, batch_rows=512, micro_rows=16),
        optim=OptimConfig(lr=2.5e-4, warmup_steps=700),
    )
