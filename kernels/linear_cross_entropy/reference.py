"""linear_cross_entropy: the head's GEMM and its loss in one op, so that the (N, V) logits need never exist at once.

loss = Σ over rows of cross_entropy(x Wᵀ). The weight comes in master precision and is cast to x's dtype inside, so that
its gradient is accumulated and returned in the weight's own dtype (a compute-dtype leaf would round it).
"""

import torch
from torch import Tensor

from tritium.kernels.cross_entropy.reference import cross_entropy


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    chunk: int = 0,
    with_grad: bool = True,
) -> Tensor:
    """x (N, C), weight (Vp, C), targets (N,) int64 → the sum of the rows' losses, () fp32 (fp64 for fp64).

    chunk: rows whose logits exist at one time, for backends that chunk; 0 lets them choose. The result is the same.
    with_grad: False promises that no gradient will be asked for, so that evaluation pays for no gradient GEMM.
    The other options are cross_entropy's.
    """
    logits = torch.nn.functional.linear(x, weight.to(x.dtype))
    return cross_entropy(logits, targets, vocab_size, ignore_index, label_smoothing, z_loss, softcap).sum()
