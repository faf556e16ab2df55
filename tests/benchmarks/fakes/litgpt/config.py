"""The fields that the peer sets; any other is a TypeError, as in litgpt."""

from dataclasses import dataclass


@dataclass
class Config:
    name: str
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    padded_vocab_size: int
    n_query_groups: int
    norm_class_name: str
    norm_eps: float
    parallel_residual: bool
    bias: bool
    attn_bias: bool
    lm_head_bias: bool
    rope_base: int
    rotary_percentage: float
    mlp_class_name: str
    gelu_approximate: str
    intermediate_size: int

    def __post_init__(self):
        assert self.norm_class_name in ("LayerNorm", "RMSNorm")
        assert self.n_head % self.n_query_groups == 0
        assert not self.parallel_residual
        assert not self.lm_head_bias
