"""GPT-2 in plain PyTorch, as a careful user writes it: packed qkv, SDPA, tied head, torch.compile, fused AdamW."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritium.benchmarks import peers
from tritium.benchmarks.peers import AUTOTUNE, Training, Variant, fast_bf16
from tritium.engine.config import GPTConfig, OptimConfig

NAME = "plain PyTorch"


class Block(nn.Module):
    """Attention and MLP, each behind its LayerNorm, each added to the residual stream."""

    def __init__(self, C: int, H: int, eps: float):
        super().__init__()
        self.H = H
        self.norm1, self.norm2 = nn.LayerNorm(C, eps), nn.LayerNorm(C, eps)
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (z.view(B, T, self.H, -1).transpose(1, 2) for z in self.qkv(self.norm1(x)).split(C, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """ids, targets (B, T) → mean loss. The table has ``rows`` ≥ V rows; the loss leaves the surplus out."""

    def __init__(self, model: GPTConfig, rows: int, upcast: bool):
        super().__init__()
        self.V, self.upcast = model.vocab_size, upcast
        self.wte, self.wpe = nn.Embedding(rows, model.n_embd), nn.Embedding(model.block_size, model.n_embd)
        self.blocks = nn.ModuleList(Block(model.n_embd, model.n_head, model.norm_eps) for _ in range(model.n_layer))
        self.norm = nn.LayerNorm(model.n_embd, model.norm_eps)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.wte.weight).flatten(0, 1)[:, : self.V]
        return F.cross_entropy(logits.float() if self.upcast else logits, targets.flatten()).float()


PARTS = {
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn.c_attn": "qkv",
    "attn.c_proj": "proj",
    "mlp.c_fc": "up",
    "mlp.c_proj": "down",
}


fit = peers.gpt2


def why_not(device: str = "cpu") -> str | None:
    return None


def variants(device: str) -> list[Variant]:
    """Precisions, table sizes, loss precisions and compilations that a user would try on this device."""
    if device == "cuda":
        return [
            Variant("bf16", "high", padded, extra=upcast)
            for padded in (True, False)
            for upcast in ("", "logits upcast")
        ]
    found = [Variant(), Variant(padded=False), Variant(compile=AUTOTUNE)]
    if fast_bf16(device):
        found += [
            Variant("bf16", padded=padded, extra=upcast) for padded in (True, False) for upcast in ("", "logits upcast")
        ]
        found.append(Variant("bf16", compile=AUTOTUNE))
    return found


def build(
    model: GPTConfig,
    variant: Variant = Variant(),
    device: str = "cpu",
    optim: OptimConfig = OptimConfig(),
    attention: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> Training:
    """A GPT-2 of the model's shape, ready to train. attention: a context that selects SDPA's kernel."""
    with torch.device(device):
        module = GPT(
            model, model.padded_vocab_size if variant.padded else model.vocab_size, variant.extra == "logits upcast"
        )
    for parameter in module.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=model.init_std)
    return Training(module, module, partial(peers.rename, parts=PARTS), variant, device, optim, attention)
