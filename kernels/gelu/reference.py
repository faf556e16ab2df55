"""gelu: y = x · Φ(x), exactly ("none") or by the tanh approximation that GPT-2 was trained with ("tanh")."""

import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor, approximate: str = "tanh") -> Tensor:
    """x (...) → (...) in x's dtype."""
    return F.gelu(x, approximate=approximate)
