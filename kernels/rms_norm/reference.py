"""rms_norm: y = x / √(mean(x²) + eps) · weight over the last axis."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """x (..., C), weight (C,) or None (no scaling) → (..., C) in x's dtype; computed in fp32 (fp64 for fp64 input)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.to(y.dtype)).to(x.dtype)
