"""torchtitan's Llama 3 model on one device: torch.compile, fused AdamW; its trainer and its parallelism stay outside.

It has Llama's parts and no others, so a GPT-2 is compared at its size with those, and tritium has an arm of just that
model. Attention is its ScaledDotProductAttention: its own trainer takes FlexAttention over packed documents, which
rows of one text each do not need. Written against torchtitan 0.3.0 (torchtitan.models.llama3, .common).
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tritium.benchmarks import peers
from tritium.benchmarks.peers import Training, Variant, fast_bf16
from tritium.engine.config import GPTConfig, OptimConfig

NAME = "torchtitan"
COMPLEX = "complex rope"  # Llama 3's in torchtitan; its other form turns pairs of real numbers

PARTS = {
    "ln_1": "attention_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attention.qkv_linear.wqkv",
    "attn.c_proj": "attention.wo",
    "mlp.c_fc": "feed_forward.w1",  # the gate, and below it w3
    "mlp.c_proj": "feed_forward.w2",
}


def why_not(device: str = "cpu") -> str | None:
    reason = peers.missing("torchtitan")
    if reason is not None:
        return reason
    try:
        importlib.import_module("torchtitan.models.llama3.model")
    except Exception as error:  # it follows torch's nightly builds, and may fail in any way beside another torch
        return (
            f"torchtitan cannot be imported beside torch {torch.__version__}: {type(error).__name__}: {error}; "
            "install a torchtitan of this torch's age"
        )
    return None


def fit(model: GPTConfig) -> tuple[GPTConfig, str]:
    fitted = dataclasses.replace(
        peers.plainly_trained(model), position="rope", rope_fraction=1.0, norm="rms_norm", activation="swiglu",
        bias=False, qk_norm=False,
    )  # fmt: skip
    return fitted, "" if fitted == model else "Llama's parts"


def variants(device: str) -> list[Variant]:
    """Precisions, table sizes and forms of the rotation that a user would try on this device."""
    if device == "cuda":
        return [Variant("bf16", "high", True), Variant("bf16", "high", True, extra=COMPLEX)]
    return [
        Variant(precision, padded=padded, extra=extra)
        for precision in ("fp32", *(["bf16"] if fast_bf16(device) else []))
        for padded, extra in ((True, ""), (False, ""), (True, COMPLEX))
    ]


def build(
    model: GPTConfig, variant: Variant = Variant(), device: str = "cpu", optim: OptimConfig = OptimConfig()
) -> Training:
    """A Llama3Model of the (fitted) model's shape, ready to train."""
    from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
    from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock

    C, D, H, G = model.n_embd, model.head_width, model.n_head, model.kv_heads
    V = model.padded_vocab_size if variant.padded else model.vocab_size
    init = {"weight": lambda weight: torch.nn.init.normal_(weight, std=model.init_std)}
    ones = {"weight": torch.nn.init.ones_}
    form = ComplexRoPE if COMPLEX in variant.extra else CosSinRoPE
    rope = form.Config(dim=D, max_seq_len=model.block_size, theta=model.rope_theta)

    def norm() -> object:
        return RMSNorm.Config(normalized_shape=C, eps=model.norm_eps, param_init=ones)

    layers = [
        Llama3TransformerBlock.Config(
            attention_norm=norm(), ffn_norm=norm(),
            attention=make_gqa_config(
                dim=C, n_heads=H, n_kv_heads=G, fuse_qkv=True, wqkv_param_init=init, wo_param_init=init,
                inner_attention=ScaledDotProductAttention.Config(), rope=rope,
            ),
            feed_forward=make_ffn_config(
                dim=C, hidden_dim=model.hidden_width, w1_param_init=init, w2w3_param_init=init
            ),
        )
        for _ in range(model.n_layer)
    ]  # fmt: skip
    config = Llama3Model.Config(
        dim=C, vocab_size=V, layers=layers, enable_weight_tying=model.tie_head, norm=norm(),
        tok_embeddings=Embedding.Config(num_embeddings=V, embedding_dim=C, param_init=init),
        lm_head=Linear.Config(in_features=C, out_features=V, param_init=init),
    )  # fmt: skip
    with torch.device(device):
        module = config.build().train()
    module.init_states()

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        logits = module(ids).flatten(0, 1)[:, : model.vocab_size]
        return F.cross_entropy(logits, targets.flatten()).float()

    def rename(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        renamed = peers.rename(weights, PARTS, blocks="layers", others={"wte": "tok_embeddings", "ln_f": "norm"})
        for name in list(renamed):
            if ".w1." in name:
                renamed[name], renamed[name.replace(".w1.", ".w3.")] = renamed[name].chunk(2)
            elif ".wqkv." in name:
                q, k, v = renamed[name].split((H * D, G * D, G * D))
                if form is ComplexRoPE:
                    q, k = (_adjacent(rows, D) for rows in (q, k))
                renamed[name] = _grouped(q, k, v, G, D)
        return renamed

    return Training(module, loss, rename, variant, device, optim)


def _adjacent(rows: Tensor, D: int) -> Tensor:
    """Rows of heads that turn channel d with d + D/2 → of heads that turn neighbours."""
    return rows.reshape(-1, 2, D // 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


def _grouped(q: Tensor, k: Tensor, v: Tensor, G: int, D: int) -> Tensor:
    """All q, all k, all v → for each key/value head its query heads, itself, its value."""
    heads = [rows.reshape(G, -1, D, rows.shape[-1]) for rows in (q, k, v)]
    return torch.cat(heads, dim=1).reshape(-1, q.shape[-1])
