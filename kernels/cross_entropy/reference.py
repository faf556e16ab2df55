"""cross_entropy: -log softmax(logits)[target] for each row, over the real vocabulary only.

With z = softcapped logits of the first ``vocab_size`` columns (later columns are padding for the GEMM: never in the
loss, gradient zero), lse = log Σ exp z, V = vocab_size, ε = label_smoothing:
    loss = (1 - ε)(lse - z[target]) + ε (lse - mean(z)) + z_loss · lse²,      0 for a row whose target is ignore_index.
"""

import torch
from torch import Tensor


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    vocab_size: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """logits (N, Vp) with Vp ≥ vocab_size, targets (N,) int64 in [0, vocab_size) or ignore_index → losses (N,).

    Losses are fp32 (fp64 for fp64).
    softcap c > 0 replaces a logit z by c·tanh(z/c). The caller reduces: ``losses.sum() / count``.
    """
    z = logits[:, :vocab_size].to(torch.promote_types(logits.dtype, torch.float32))
    if softcap > 0.0:
        z = softcap * torch.tanh(z / softcap)
    counted = targets != ignore_index
    lse = torch.logsumexp(z, dim=-1)
    true = z.gather(1, torch.where(counted, targets, 0)[:, None])[:, 0]
    losses = lse - true
    if label_smoothing > 0.0:
        losses = (1.0 - label_smoothing) * losses + label_smoothing * (lse - z.mean(-1))
    if z_loss > 0.0:
        losses = losses + z_loss * lse.square()
    return torch.where(counted, losses, torch.zeros_like(losses))
