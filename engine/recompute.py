"""Activation checkpointing: what a block computes again in backward instead of keeping (Chen et al., arXiv:1604.06174).

    none        keep everything
    full        keep each block's input, compute the rest again: about a third more FLOPs, least memory
    selective   keep each block's input and the results of the ops named in ``keep``, compute the cheap rest again

Selective works on what runs below the call sites: the custom ops of our kernels, which carry their op's name, and the
aten ops that stand for an op in its reference. A reference that is several aten ops (attention, rms_norm, rope, …) is
computed again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tritium.engine.config import ConfigError
from tritium.engine.model import GPT, call
from tritium.kernels import ops
from tritium.kernels.autograd import NAMESPACE

POLICIES = ("none", "full", "selective")
KEEPABLE = (
    "attention", "linear", "layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "rope", "gelu", "swiglu",
    "geglu", "relu2",
)  # fmt: skip

# what torch's own kernels are called below the call site
_TORCH = {
    "mm": "linear",
    "addmm": "linear",
    "native_layer_norm": "layer_norm",
    "gelu": "gelu",
    "flex_attention": "attention",
    "_scaled_dot_product_flash_attention": "attention",
    "_scaled_dot_product_flash_attention_for_cpu": "attention",
    "_scaled_dot_product_efficient_attention": "attention",
    "_scaled_dot_product_cudnn_attention": "attention",
    "_scaled_dot_product_fused_attention_overrideable": "attention",
}


def apply(model: GPT, policy: str, keep: Collection[str] = ("attention", "linear")) -> None:
    """Make ``model`` recompute by ``policy`` from now on, in training with gradients only. Raises ConfigError.

    Losses and gradients do not change, dropout included. keep: for "selective", ops whose results are kept.
    """
    if policy not in POLICIES:
        raise ConfigError(f"train.recompute must be one of {', '.join(POLICIES)}, not {policy!r}")
    unknown = [name for name in keep if name not in KEEPABLE]
    if policy == "selective" and unknown:
        raise ConfigError(
            f"train.recompute_keep names {', '.join(unknown)}, which no block computes; "
            f"choose from {', '.join(KEEPABLE)}"
        )
    if policy == "none":
        model.run_block = call
        return
    options: dict[str, Any] = {"preserve_rng_state": model.config.dropout > 0.0}
    if policy == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keeping(frozenset(keep)))

    def run_block(block: nn.Module, *args: Any) -> Tensor:
        if not model.training:
            return block(*args)
        return checkpoint(block, *args, use_reentrant=False, **options)

    model.run_block = run_block


def keeping(keep: frozenset[str]) -> Callable[..., CheckpointPolicy]:
    """The selective policy that keeps the results of the ops in ``keep``."""

    def policy(context: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op_of(function) in keep else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def op_of(function: Any) -> str | None:
    """The op of the catalogue that ``function`` (an OpOverload or higher-order op) computes, or None.

    ``tritium::layer_norm_triton`` and ``aten::native_layer_norm`` → "layer_norm".
    """
    namespace, _, name = function.name().rpartition("::")
    name = name.partition(".")[0]
    if namespace == NAMESPACE:
        # the longest match: linear_cross_entropy_triton is not linear
        return max((op for op in ops.OPS if name == op or name.startswith(op + "_")), key=len, default=None)
    return _TORCH.get(name)
