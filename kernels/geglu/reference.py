"""geglu: y = gelu(gate) · up, the gated MLP's activation with GELU for SiLU (arXiv:2002.05202)."""

import torch.nn.functional as F
from torch import Tensor


def geglu(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    """gate and up (..., F) → (..., F) in their dtype; approximate: "tanh" or "none", as gelu's."""
    return F.gelu(gate, approximate=approximate) * up
