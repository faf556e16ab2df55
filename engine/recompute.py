"""Activation checkpointing: what a block computes again in backward instead of keeping (Chen et al., arXiv:1604.06174).

    none        keep everything
    full        keep each block's input, compute the rest again: about a third more FLOPs, least memory
    selective   keep each block's input and the results of the ops named in ``keep``, compute the cheap rest again

Selective works on what runs below the call sites: the custom ops of our kernels, which carry their op's name, and the
aten ops that stand for an op in its reference. A reference that is several aten ops (attention, rms_norm, rope, …) and
shall be kept becomes one custom op: its result is kept and the inside computed again in its own backward, as our
kernels do.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tritium.engine.config import ConfigError
from tritium.engine.model import GPT, call
from tritium.kernels import op as binding
from tritium.kernels import ops
from tritium.kernels.autograd import NAMESPACE
from tritium.kernels.op import Op

POLICIES = ("none", "full", "selective")
KEEPABLE = (
    "attention", "linear", "layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "rope", "gelu", "swiglu",
    "geglu", "relu2",
)  # fmt: skip

# what torch's own kernels are called below the call site
_TORCH = {
    "mm": "linear",
    "addmm": "linear",
    "_scaled_mm": "linear",  # in fp8
    "native_layer_norm": "layer_norm",
    "gelu": "gelu",
    "flex_attention": "attention",
    "_scaled_dot_product_flash_attention": "attention",
    "_scaled_dot_product_flash_attention_for_cpu": "attention",
    "_scaled_dot_product_efficient_attention": "attention",
    "_scaled_dot_product_cudnn_attention": "attention",
    "_scaled_dot_product_fused_attention_overrideable": "attention",
    "_flash_attn_forward": "attention",  # of the package flash-attn
    "_flash_attn_varlen_forward": "attention",
}
_ONE_ATEN_OP = ("linear", "layer_norm", "gelu")  # the references that have a name in _TORCH


def apply(model: GPT, policy: str, keep: Collection[str] = ("attention", "linear")) -> None:
    """Make ``model`` recompute by ``policy`` from now on, in training with gradients only. Raises ConfigError.

    Losses and gradients do not change, dropout included; with the reference of rms_norm, swiglu, geglu, relu2 or an
    add_* norm in ``keep``, up to the order in which the gradients of a tensor that it reads twice are added. keep: for
    "selective", ops whose results are kept. A model that is to be bound must be bound before.
    """
    if policy not in POLICIES:
        raise ConfigError(f"train.recompute must be one of {', '.join(POLICIES)}, not {policy!r}")
    unknown = [name for name in keep if name not in KEEPABLE]
    if policy == "selective" and unknown:
        raise ConfigError(
            f"train.recompute_keep names {', '.join(unknown)}, which no block computes; "
            f"choose from {', '.join(KEEPABLE)}"
        )
    _keepable(model, frozenset(keep) if policy == "selective" else frozenset())
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


def _keepable(model: GPT, keep: frozenset[str]) -> None:
    """Where a block trains with the reference of an op in ``keep``, give it as one op; elsewhere the reference."""
    for block in model.blocks:
        for _, site in binding.call_sites(block):
            function = named(site.op) if site.op.name in keep else site.op.reference
            backend = site.bound.get("train")
            if backend is not None and backend.name == "reference":
                site.bound["train"] = dataclasses.replace(backend, function=function)
                if model.training:
                    site.enter("train")
            elif not site.bound:
                site.function = function


@functools.cache
def named(op: Op) -> Callable[..., Any]:
    """The op's reference as something with a name that ``op_of`` knows: itself, or the custom op OP_reference."""
    if op.name in _ONE_ATEN_OP:
        return op.reference
    reference = op.reference
    whole = torch.library.custom_op(f"{NAMESPACE}::{op.name}_reference", reference, mutates_args=())
    whole.register_fake(reference)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.constants = [None if isinstance(value, Tensor) else (value,) for value in inputs]

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        values = [next(saved).detach() if constant is None else constant[0] for constant in ctx.constants]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        with torch.enable_grad():
            for i in wanted:
                values[i].requires_grad_()
            results = reference(*values)
        results = results if isinstance(results, tuple) else (results,)
        found: list[Tensor | None] = [None] * len(values)
        for i, gradient in zip(wanted, torch.autograd.grad(results, [values[i] for i in wanted], grads), strict=True):
            found[i] = gradient
        return tuple(found)

    whole.register_autograd(backward, setup_context=setup)
    if op.name == "attention":
        from torch.utils.flop_counter import register_flop_formula

        register_flop_formula(getattr(torch.ops, NAMESPACE).attention_reference)(_attention_flops)
    return whole


def _attention_flops(q: torch.Size, k: torch.Size, *args: object, **kwargs: object) -> int:
    """Two GEMMs over all pairs, which is what the reference computes, causal or not."""
    B, Tq, H, D = q
    return 4 * B * H * Tq * k[1] * D


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
