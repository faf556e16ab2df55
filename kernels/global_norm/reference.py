"""global_norm: √Σ‖t‖² over a list of tensors, what gradient clipping compares with its limit. It has no gradient.

Accumulates in fp32 at least. A NaN or an infinity anywhere makes the norm one.
"""

import torch
from torch import Tensor


def global_norm(tensors: list[Tensor]) -> Tensor:
    """Any number of tensors of any shape on one device → the norm, () fp32 (of fp64, fp64);
    0 for none.
    """
    if not tensors:
        return torch.zeros(())
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    norms = torch._foreach_norm([t.detach() for t in tensors], 2, wide)
    return torch.linalg.vector_norm(torch.stack(norms))
