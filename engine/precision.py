"""bf16 compute weights beside fp32 masters.

The matrices that GEMMs read (and their biases) live in the model in the compute dtype; the optimizer owns their fp32
masters and writes the copies in the same pass as the update. Embeddings, norms and the head stay fp32: they are read
row-wise or cast inside their op.
"""

from __future__ import annotations

from typing import Any

import torch


def resolve(precision: str, device: torch.device) -> torch.dtype:
    """The compute dtype for "auto", "fp32" or "bf16". auto is bf16 where the device multiplies bf16 matrices in
    hardware.
    """
    if precision == "fp32":
        return torch.float32
    if precision == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def to_compute_dtype(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Put the model's GEMM operands into ``dtype``; returns name → fp32 master for each parameter that was changed."""
    model.compute_dtype = dtype
    masters: dict[str, torch.Tensor] = {}
    if dtype == torch.float32:
        return masters
    chosen = set(model.compute_parameters())
    for name, parameter in model.named_parameters():
        if name in chosen:
            masters[name] = parameter.detach().clone()
            parameter.data = parameter.data.to(dtype)
    return masters
