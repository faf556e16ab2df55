"""layer_norm: y = (x - mean) / √(var + eps) · weight + bias over the last axis."""

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """x (..., C), weight (C,), bias (C,) or None → (..., C) in x's dtype.

    var is the biased variance; statistics in fp32.
    weight and bias may be wider than x (fp32 beside bf16): they are applied in fp32 before
    the result is rounded.
    """
    if weight.dtype == x.dtype:
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    return F.layer_norm(x.to(wide), (x.shape[-1],), weight, bias, eps).to(x.dtype)
