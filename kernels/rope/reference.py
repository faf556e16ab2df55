"""rope: rotary position embedding in the half-split ("NeoX") convention: the pair of channel d is channel d + R/2."""

import torch
from torch import Tensor


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, T, H, D), k (B, T, G, D), cos and sin (T, R/2) or (B, T, R/2) fp32 with R ≤ D → rotated (q, k).

    Only the first R channels turn; the rest pass through. Computed in fp32, returned in the inputs' dtypes.
    """
    return _turn(q, cos, sin), _turn(k, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # one axis for the heads
    a, b, rest = x[..., :half].to(cos.dtype), x[..., half : 2 * half].to(cos.dtype), x[..., 2 * half :]
    return torch.cat(((a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest), dim=-1)
