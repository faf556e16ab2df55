"""GPT with litgpt's parameter names: q, k, v one below the other; rotation of halves; logits (B, T, padded V)."""

import torch
import torch.nn.functional as F
from torch import nn

from tritium.kernels.rope.reference import rope


def norm(config):
    kind = nn.LayerNorm if config.norm_class_name == "LayerNorm" else nn.RMSNorm
    return kind(config.n_embd, eps=config.norm_eps)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = (config.n_head, config.n_query_groups, config.n_query_groups)
        width = config.n_embd // config.n_head
        self.qkv = nn.Linear(config.n_embd, sum(self.heads) * width, bias=config.bias or config.attn_bias)
        self.proj = nn.Linear(config.n_head * width, config.n_embd, bias=config.bias)

    def forward(self, x, cos, sin):
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, sum(self.heads), -1).split(self.heads, dim=2)
        q, k = rope(q, k, cos, sin)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.proj(y.transpose(1, 2).reshape(B, T, -1))


class GptNeoxMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.approximate = config.gelu_approximate
        self.fc = nn.Linear(config.n_embd, config.intermediate_size, bias=config.bias)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.proj(F.gelu(self.fc(x), approximate=self.approximate))


class LLaMAMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.approximate = config.gelu_approximate
        self.fc_1, self.fc_2 = (nn.Linear(config.n_embd, config.intermediate_size, bias=config.bias) for _ in range(2))
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.proj(F.silu(self.fc_1(x)) * self.fc_2(x))


class GemmaMLP(LLaMAMLP):
    def forward(self, x):
        return self.proj(F.gelu(self.fc_1(x), approximate=self.approximate) * self.fc_2(x))


MLPS = {"GptNeoxMLP": GptNeoxMLP, "LLaMAMLP": LLaMAMLP, "GemmaMLP": GemmaMLP}


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_1, self.attn, self.norm_2 = norm(config), Attention(config), norm(config)
        self.mlp = MLPS[config.mlp_class_name](config)

    def forward(self, x, cos, sin):
        x = x + self.attn(self.norm_1(x), cos, sin)
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=config.lm_head_bias)
        blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.transformer = nn.ModuleDict({"wte": wte, "h": blocks, "ln_f": norm(config)})
        turned = int(config.rotary_percentage * (config.n_embd // config.n_head))
        angle = config.rope_base ** (-torch.arange(0, turned, 2) / turned)
        angle = torch.arange(config.block_size)[:, None] * angle
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, idx):
        x, T = self.transformer.wte(idx), idx.shape[1]
        for block in self.transformer.h:
            x = block(x, self.cos[:T], self.sin[:T])
        return self.lm_head(self.transformer.ln_f(x))
