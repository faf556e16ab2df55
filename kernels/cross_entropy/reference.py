"""cross_entropy: -log softmax(logits)[target] for each row, over the real vocabulary only.

With z = softcapped logits of the first ``vocab_size`` columns (later columns are padding for the GEMM: never in the
loss, gradient zero), lse = log Σ exp z, V = vocab_size, ε = label_smoothing:
    loss = (1 - ε)(lse - z[target]) + ε (lse - mean(z)) + z_loss · lse²,      0 for a row whose target is ignore_index.
``reduction``: "none" leaves a loss per row; "sum" adds them; "mean" divides the sum by the number of rows that count,
those whose target is not ignore_index, and is 0 when there is none.
"""

import math

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
    reduction: str = "none",
) -> Tensor:
    """logits (N, Vp) with Vp ≥ vocab_size, targets (N,) int64 in [0, vocab_size) or ignore_index → losses (N,), or ()
    for the reductions "sum" and "mean"; another reduction is a ValueError, and so is an option out of its range.

    Losses are fp32 (fp64 for fp64). softcap c > 0 replaces a logit z by c·tanh(z/c).
    """
    check_reduction(reduction)
    check_options(label_smoothing, z_loss, softcap)
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
    return reduce(torch.where(counted, losses, torch.zeros_like(losses)), targets, ignore_index, reduction)


def reduce(losses: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Losses (N,), 0 where the target is ignore_index → what ``reduction`` makes of them. Shared by the backends."""
    check_reduction(reduction)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / counted_rows(targets, ignore_index)


def counted_rows(targets: Tensor, ignore_index: int) -> Tensor:
    """The number of targets that are not ignore_index, at least one: () int64."""
    return (targets != ignore_index).sum().clamp(min=1)


def check_reduction(reduction: str) -> None:
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"cross_entropy: reduction must be 'none', 'sum' or 'mean', not {reduction!r}")


def check_options(label_smoothing: float, z_loss: float, softcap: float) -> None:
    """ValueError unless label_smoothing is in [0, 1] and z_loss and softcap are finite and not negative. Shared by the
    backends, which take an option that is not above 0 for one that is not there, forward or backward."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(
            f"cross_entropy takes a label_smoothing in [0, 1], it is {label_smoothing}: the target's share would be "
            "none of a distribution's; 0 leaves smoothing out"
        )
    for name, value in (("z_loss", z_loss), ("softcap", softcap)):
        if not 0.0 <= value < math.inf:
            raise ValueError(
                f"cross_entropy takes a finite {name} of at least 0, it is {value}: loss and gradient would be of "
                "different functions, or NaN; 0 leaves it out"
            )
