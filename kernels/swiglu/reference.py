"""swiglu: y = silu(gate) · up, the gated MLP's activation."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up (..., F) → (..., F) in their dtype."""
    return F.silu(gate) * up
