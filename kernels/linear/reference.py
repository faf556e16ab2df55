"""linear: y = x Wᵀ + b, the GEMM of every projection."""

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., C), weight (F, C), bias (F,) or None → (..., F), all of one dtype."""
    return F.linear(x, weight, bias)
