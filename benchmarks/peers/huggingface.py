"""transformers' GPT2LMHeadModel set up to be fast: SDPA, torch.compile, fused AdamW, no dropout, no cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritium.benchmarks import peers
from tritium.benchmarks.peers import AUTOTUNE, Training, Variant, fast_bf16
from tritium.engine.config import GPTConfig, OptimConfig

NAME = "transformers"

# the peer's own option: whose loss, and whether SDPA is told "causal" or handed the mask that transformers builds.
# Under torch.compile transformers makes that mask (torch < 2.14), which keeps SDPA from skipping the upper triangle;
# registering an attention function of one's own, which transformers documents, avoids it
OWN_LOSS = "its loss"
CAUSAL = "mask-free sdpa"
CAUSAL_OWN_LOSS = f"{CAUSAL}, {OWN_LOSS}"


fit = peers.gpt2


def why_not(device: str = "cpu") -> str | None:
    return peers.missing("transformers")


def variants(device: str) -> list[Variant]:
    """Precisions, table sizes, attentions, losses and compilations that a user would try on this device."""
    if device == "cuda":
        return [
            Variant("bf16", "high", padded, extra=extra)
            for padded, extra in ((True, CAUSAL), (False, CAUSAL), (False, CAUSAL_OWN_LOSS))
        ]
    return [
        Variant(precision, padded=padded, compile=mode, extra=extra)
        for precision in ("fp32", *(["bf16"] if fast_bf16(device) else []))
        for padded, mode, extra in (
            (True, "default", CAUSAL),
            (False, "default", CAUSAL),
            (False, "default", CAUSAL_OWN_LOSS),
            (False, "default", OWN_LOSS),
            (True, AUTOTUNE, CAUSAL),
        )
    ]


def register_causal_sdpa() -> str:
    """Register SDPA without a mask: transformers builds none for an attention function it does not know."""
    from transformers import AttentionInterface

    def causal_sdpa(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):  # type: ignore[no-untyped-def]
        assert attention_mask is None, "transformers built a mask, so this variant is not what its name says"
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling, is_causal=True)
        return y.transpose(1, 2).contiguous(), None

    AttentionInterface.register("causal_sdpa", causal_sdpa)
    return "causal_sdpa"


def gpt2(model: GPTConfig, V: int, attention: str, device: str) -> Any:
    """A GPT2LMHeadModel of the model's shape with V rows in its table, in training mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=V, n_positions=model.block_size, n_embd=model.n_embd, n_layer=model.n_layer, n_head=model.n_head,
        layer_norm_epsilon=model.norm_eps, activation_function="gelu_new", resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, use_cache=False, bos_token_id=None, eos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    config._attn_implementation = attention
    with torch.device(device):
        module = GPT2LMHeadModel(config).train()
    module.loss_type = "ForCausalLM"  # left unset it is found anew, with a log line, in every forward: a graph break
    return module


def build(
    model: GPTConfig, variant: Variant = Variant(), device: str = "cpu", optim: OptimConfig = OptimConfig()
) -> Training:
    """A GPT2LMHeadModel of the model's shape, randomly initialised, ready to train."""
    if variant.padded and OWN_LOSS in variant.extra:
        raise ValueError(f"{variant}: its loss counts the padding of the vocabulary; use padded=False")
    attention = register_causal_sdpa() if CAUSAL in variant.extra else "sdpa"
    module = gpt2(model, model.padded_vocab_size if variant.padded else model.vocab_size, attention, device)

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        if OWN_LOSS in variant.extra:
            return module(input_ids=ids, labels=targets, shift_labels=targets, use_cache=False).loss
        logits = module(input_ids=ids, use_cache=False).logits.flatten(0, 1)[:, : model.vocab_size]
        return F.cross_entropy(logits, targets.flatten()).float()

    return Training(module, loss, rename, variant, device, optim)


def rename(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The common naming → GPT2LMHeadModel's."""
    return {f"transformer.{name}": value for name, value in weights.items()}
