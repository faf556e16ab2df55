"""llama_8b: the architecture of Llama 3 8B at its 8192-token context (rotary positions, RMSNorm, SwiGLU, 8 key/value
heads).
"""

from tritium.engine.config import Config, GPTConfig, OptimConfig, TrainConfig


def config() -> Config:
    return Config(
        name="llama_8b",
        model=GPTConfig(
            vocab_size=128256,
            block_size=8192,
            n_layer=32,
            n_head=32,
            n_kv_head=8,
            n_embd=4096,
            mlp_width=14336,
            position="rope",
            rope_theta=500000.0,
            norm="rms_norm",
            activation="swiglu",
            bias=False,
            tie_head=False,
        ),
        train=TrainConfig(steps=10000, batch_rows=128, micro_rows=1, recompute="full"),
        optim=OptimConfig(lr=3e-4, warmup_steps=2000),
    )
