"""attention_lse: attention that also returns the logarithm of each query's sum of exponentials.

With y and lse of two disjoint sets of keys, the attention over their union is

    lse = log(exp lse₁ + exp lse₂)      y = exp(lse₁ - lse) y₁ + exp(lse₂ - lse) y₂

which is how keys in pieces are attended to: a cache of pages, a prefix that others share, a sequence over several
devices. Shapes, and which query sees which key: as attention.
"""

import torch
from torch import Tensor

from tritium.kernels.attention.reference import check_options, masked_scores, visible_softmax


def attention_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_start: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """q (B, Tq, H, D), k and v (B, Tk, G, D) → y (B, Tq, H, D) in q's dtype, lse (B, H, Tq) in fp32 (fp64 for fp64).

    lse is the natural logarithm of Σ exp score over the keys that a query sees, of the scores after scale and softcap;
    -∞ for one that sees none, which then has no gradient, whatever comes back for its lse. The options are attention's.
    """
    check_options(softcap)
    B, Tq, H, D = q.shape
    scores, hidden = masked_scores(q, k, seq_start, causal, scale, window, softcap)
    weights = visible_softmax(scores, hidden)
    y = torch.einsum("bgrij,bjgd->bigrd", weights, v.to(weights.dtype))
    # where all is hidden the minimum stands in, whose derivative is finite, and the result is replaced
    lse = torch.logsumexp(scores.masked_fill(hidden, torch.finfo(scores.dtype).min), dim=-1)
    lse = lse.masked_fill(hidden.all(-1), -torch.inf)
    return y.reshape(B, Tq, H, D).to(q.dtype), lse.reshape(B, H, Tq)
