"""gpt2_1558m: GPT-2 XL (1558M parameters) on one GPU or more; about 0.5M tokens a step as in the GPT-3 paper's table
2.1 for this size class.
"""

from tritium.engine.config import Config, GPTConfig, OptimConfig, TrainConfig


def config() -> Config:
    return Config(
        name="gpt2_1558m",
        model=GPTConfig(n_layer=48, n_head=25, n_embd=1600),
        train=TrainConfig(steps=152588, batch_rows=512, micro_rows=8),
        optim=OptimConfig(lr=2e-4, warmup_steps=700),
    )
