"""add_rms_norm: the residual add and the norm that follows it: s = x + residual, y = rms_norm(s)."""

from torch import Tensor

from tritium.kernels.rms_norm.reference import rms_norm


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """x and residual (..., C), weight (C,) or None (no scaling) → (y, s), both (..., C) in x's dtype."""
    s = x + residual
    return rms_norm(s, weight, eps), s
