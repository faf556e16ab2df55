"""torchao's fp8 linear (package torchao): whether it is here, and its function on plain tensors, for the backends that
call it. Written against torchao 0.18.0 (torchao.float8).

Of a recipe all is torchao's but the scales of ``tensorwise``: powers of two, as in its other recipes and in our own
fp8. Its function makes all gradients whether they are wanted or not, and adds the bias in a pass of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritium.kernels.lib import fp8
from tritium.kernels.site import Site

PRECISION = fp8.PRECISION
UNPROVEN = "never run on a GPU: held to the contract on a CPU, where torchao 0.18.0 emulates the products"


@torch._dynamo.assume_constant_result
def _recipe(name: str, emulate: bool) -> tuple[Any, Any]:
    """torchao's settings for its function: of the three products, and of all."""
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig

    config = dataclasses.replace(
        Float8LinearConfig.from_recipe_name(name), emulate=emulate, round_scales_to_power_of_2=True
    )
    gemms = (config.gemm_config_output, config.gemm_config_grad_input, config.gemm_config_grad_weight)
    return LinearMMConfig(*(ScaledMMConfig(emulate, gemm.use_fast_accum) for gemm in gemms)), config


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, recipe: str) -> Tensor:
    """x (..., C), weight (F, C), bias (F,) or None → (..., F)."""
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

    if x.numel() == 0:  # has no largest number
        return F.linear(x, weight, bias)
    products, config = _recipe(recipe, not x.is_cuda)
    rows = x.reshape(-1, x.shape[-1])  # as a matrix: its rounded tensors copy no other that lies with gaps
    y = matmul_with_hp_or_float8_args.apply(rows, weight.t(), products, config)
    return (y if bias is None else y + bias).view(*x.shape[:-1], weight.shape[0])


def unsupported(site: Site) -> str | None:
    if site.machine.version("torchao") is None:
        return (
            "needs the package torchao, which is not installed; pip install torchao, or choose fp8_tensorwise or "
            "fp8_rowwise, which need torch alone"
        )
    return fp8.unsupported(site, ("C", "F"))
