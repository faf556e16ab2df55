"""transformers' GPT2LMHeadModel with Liger's kernels in it: LayerNorm, and the head fused with the loss.

Liger patches no GPT-2 by itself (liger_kernel.transformers.monkey_patch knows none), so its two parts that a GPT-2 has
a use for are put in by hand, as its documentation shows for a model of one's own. Written against liger-kernel 0.8.5
and never run on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tritium.benchmarks import peers
from tritium.benchmarks.peers import Training, Variant, huggingface
from tritium.engine.config import GPTConfig, OptimConfig

NAME = "transformers + Liger"
fit = huggingface.fit


def why_not(device: str = "cpu") -> str | None:
    reason = huggingface.why_not(device) or peers.missing("liger-kernel")
    if reason is None and device != "cuda":
        return f"Liger's kernels are compiled by Triton for GPUs and this device is {device}; use --device cuda"
    return reason


def variants(device: str) -> list[Variant]:
    """Exact vocabulary, since Liger's loss counts every row of the table; eager, as Liger is run, and compiled."""
    return [
        Variant("bf16", "high", False, "false", huggingface.CAUSAL),
        Variant("bf16", "high", False, "default", huggingface.CAUSAL),
    ]


def build(
    model: GPTConfig, variant: Variant = Variant(padded=False), device: str = "cuda", optim: OptimConfig = OptimConfig()
) -> Training:
    """A GPT2LMHeadModel of the model's shape with Liger's layers, ready to train."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerLayerNorm

    if variant.padded:
        raise ValueError(f"{variant}: Liger's loss counts the padding of the vocabulary; use padded=False")
    module = huggingface.gpt2(model, model.vocab_size, huggingface.register_causal_sdpa(), device)
    transformer = module.transformer
    for layer in transformer.h:
        for name in ("ln_1", "ln_2"):
            setattr(layer, name, _liger(getattr(layer, name), LigerLayerNorm, device))
    transformer.ln_f = _liger(transformer.ln_f, LigerLayerNorm, device)
    criterion = LigerFusedLinearCrossEntropyLoss()

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        x = transformer(input_ids=ids, use_cache=False).last_hidden_state
        return criterion(transformer.wte.weight, x.flatten(0, 1), targets.flatten()).float()

    return Training(module, loss, huggingface.rename, variant, device, optim)


def _liger(norm: nn.LayerNorm, kind: type[nn.Module], device: str) -> nn.Module:
    """Liger's layer of the same width and ε; its weights are fresh, as all are until ``load``."""
    with torch.device(device):
        return kind(norm.normalized_shape[0], eps=norm.eps, bias=True)
