"""embedding: rows of a table."""

import torch.nn.functional as F
from torch import Tensor


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """ids (...) int64 with 0 ≤ id < V, weight (V, C) → (..., C) in weight's dtype.

    The gradient of weight is the sum over equal ids.
    """
    return F.embedding(ids, weight)
