"""add_layer_norm: the residual add and the norm that follows it: s = x + residual, y = layer_norm(s)."""

from torch import Tensor

from tritium.kernels.layer_norm.reference import layer_norm


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """x and residual (..., C), weight (C,), bias (C,) or None → (y, s), both (..., C) in x's dtype."""
    s = x + residual
    return layer_norm(s, weight, bias, eps), s
