"""litgpt's GPT: torch.compile, fused AdamW, its own chunked loss or torch's.

litgpt has no learned positions, so of a GPT-2 it gets one with rotary positions, and tritium an arm of just that
model. Written against litgpt 0.5.13 (litgpt.model, litgpt.config, litgpt.utils).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tritium.benchmarks import peers
from tritium.benchmarks.peers import AUTOTUNE, Training, Variant, fast_bf16
from tritium.engine.config import GPTConfig, OptimConfig

NAME = "litgpt"
OWN_LOSS = "its loss"  # litgpt.utils.chunked_cross_entropy; it counts a padded vocabulary
MLPS = {"gelu": "GptNeoxMLP", "swiglu": "LLaMAMLP", "geglu": "GemmaMLP"}

PARTS = {
    "ln_1": "norm_1",
    "ln_2": "norm_2",
    "attn.c_attn": "attn.qkv",
    "attn.c_proj": "attn.proj",
    "mlp.c_fc": "mlp.fc",  # of a gated MLP fc_1, the gate, and below it fc_2
    "mlp.c_proj": "mlp.proj",
}


def why_not(device: str = "cpu") -> str | None:
    return peers.missing("litgpt")


def fit(model: GPTConfig) -> tuple[GPTConfig, str]:
    """Rotary positions for learned ones, GELU for ReLU², no QK-norm (litgpt's has weights), LayerNorm with its bias."""
    fitted = dataclasses.replace(peers.plainly_trained(model), position="rope", qk_norm=False)
    if fitted.activation not in MLPS:
        fitted = dataclasses.replace(fitted, activation="gelu")
    if fitted.norm == "layer_norm" and not fitted.bias:
        fitted = dataclasses.replace(fitted, bias=True)
    return fitted, "" if fitted == model else "litgpt's parts"


def variants(device: str) -> list[Variant]:
    """Precisions, table sizes, losses and compilations that a user would try on this device."""
    if device == "cuda":
        return [Variant("bf16", "high", True), Variant("bf16", "high", False, extra=OWN_LOSS)]
    return [
        Variant(precision, padded=padded, compile=mode, extra=extra)
        for precision in ("fp32", *(["bf16"] if fast_bf16(device) else []))
        for padded, mode, extra in (
            (True, "default", ""),
            (False, "default", ""),
            (False, "default", OWN_LOSS),
            (True, AUTOTUNE, ""),
        )
    ]


def build(
    model: GPTConfig, variant: Variant = Variant(), device: str = "cpu", optim: OptimConfig = OptimConfig()
) -> Training:
    """A litgpt.GPT of the (fitted) model's shape, ready to train."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    if variant.padded and OWN_LOSS in variant.extra:
        raise ValueError(f"{variant}: its loss counts the padding of the vocabulary; use padded=False")
    config = Config(
        name=NAME, block_size=model.block_size, n_layer=model.n_layer, n_head=model.n_head, n_embd=model.n_embd,
        n_query_groups=model.kv_heads, vocab_size=model.vocab_size,
        padded_vocab_size=model.padded_vocab_size if variant.padded else model.vocab_size,
        norm_class_name="LayerNorm" if model.norm == "layer_norm" else "RMSNorm", norm_eps=model.norm_eps,
        parallel_residual=False, bias=model.bias, attn_bias=model.bias, lm_head_bias=False,
        rope_base=model.rope_theta, rotary_percentage=model.rope_fraction,  # type: ignore[arg-type, unused-ignore]
        mlp_class_name=MLPS[model.activation],  # type: ignore[arg-type, unused-ignore]
        gelu_approximate="tanh", intermediate_size=model.hidden_width,
    )  # fmt: skip
    with torch.device(device):
        module = GPT(config).train()
    module.apply(module._init_weights)
    if model.tie_head:
        module.transformer.wte.weight = module.lm_head.weight  # as litgpt's pretraining does for tie_embeddings

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        logits = module(ids)
        if OWN_LOSS in variant.extra:
            return chunked_cross_entropy(logits, targets).float()
        return F.cross_entropy(logits.flatten(0, 1)[:, : model.vocab_size], targets.flatten()).float()

    gated = model.activation in ("swiglu", "geglu")

    def rename(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        others = {"wte": "transformer.wte", "ln_f": "transformer.ln_f"}
        if model.tie_head:
            others["wte"] = "lm_head"
        renamed = peers.rename(weights, PARTS, blocks="transformer.h", others=others)
        if gated:
            for name in [name for name in renamed if ".mlp.fc." in name]:
                gate, up = renamed.pop(name).chunk(2)
                renamed[name.replace(".fc.", ".fc_1.")], renamed[name.replace(".fc.", ".fc_2.")] = gate, up
        return renamed

    return Training(module, loss, rename, variant, device, optim)
