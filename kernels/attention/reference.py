"""attention: softmax(scale · Q Kᵀ) V, causal, grouped, over documents.

Shapes: B batch, Tq queries, Tk keys, H query heads, G key/value heads (H a multiple of G; query head h reads head
h // (H // G)), D head width.

Query i of row b sees key j when all of these hold, with p = i + Tk - Tq its position (queries are the last Tq ones):
    causal     j ≤ p
    window     window == 0, or p - j < window
    documents  seq_start is None, or j ≥ seq_start[b, i], the key position where that query's document starts; any
               integer, in any order along a row: below 0 it hides nothing, beyond the last key it hides all
A query that sees no key gives zeros, and so does its gradient; a key that no query sees has a gradient of zero.
"""

import math

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_start: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """q (B, Tq, H, D), k and v (B, Tk, G, D) → (B, Tq, H, D) in q's dtype.

    seq_start (B, Tq) int32 or None; scale defaults to 1/√D; softcap c > 0 replaces a score s by c·tanh(s/c);
    dropout: probability of dropping an attention weight, with ``seed`` () int64 on the device: a call is repeatable.
    Scores and softmax are computed in fp32 (fp64 for fp64 input).
    """
    check_options(softcap, dropout)
    B, Tq, H, D = q.shape
    scores, hidden = masked_scores(q, k, seq_start, causal, scale, window, softcap)
    weights = visible_softmax(scores, hidden)
    if dropout > 0.0:
        assert seed is not None, "attention with dropout needs a seed tensor, or the result could not be repeated"
        weights = weights * keep_mask(weights.shape, dropout, seed) / (1.0 - dropout)
    y = torch.einsum("bgrij,bjgd->bigrd", weights, v.to(weights.dtype))
    return y.reshape(B, Tq, H, D).to(q.dtype)


def masked_scores(
    q: Tensor, k: Tensor, seq_start: Tensor | None, causal: bool, scale: float | None, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """(scores, hidden): (B, G, H // G, Tq, Tk) in fp32 (fp64 for fp64 input), and where, to be broadcast, no key may be
    seen."""
    B, Tq, H, D = q.shape
    Tk, G = k.shape[1], k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = torch.einsum("bigrd,bjgd->bgrij", q.to(wide).reshape(B, Tq, G, H // G, D), k.to(wide))
    scores = scores * (1.0 / math.sqrt(D) if scale is None else scale)
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    p = torch.arange(Tq, device=q.device)[:, None] + (Tk - Tq)
    j = torch.arange(Tk, device=q.device)[None, :]
    hidden = torch.zeros(Tq, Tk, dtype=torch.bool, device=q.device)
    if causal:
        hidden = hidden | (j > p)
    if window > 0:
        hidden = hidden | (p - j >= window)
    hidden = hidden[None, None, None]
    if seq_start is not None:
        hidden = hidden | (j < seq_start[:, :, None])[:, None, None]
    return scores, hidden


def visible_softmax(scores: Tensor, hidden: Tensor) -> Tensor:
    """The softmax over what may be seen; zeros in a row where nothing may: its softmax over -inf would be NaN, so the
    minimum stands in and the weights are zeroed afterwards."""
    return torch.softmax(scores.masked_fill(hidden, torch.finfo(scores.dtype).min), dim=-1).masked_fill(hidden, 0.0)


def keep_mask(shape: torch.Size, dropout: float, seed: Tensor) -> Tensor:
    """Bernoulli(1 - dropout) of ``shape``, a pure function of the device tensor ``seed`` and the element's index.

    A 32-bit integer hash (two rounds of multiply-xorshift) per element: no generator state, so it is equal under
    compile, recompute and any launch order.
    """
    index = torch.arange(math.prod(shape), device=seed.device, dtype=torch.int64)
    x = (index ^ (seed * 0x9E3779B1)) & 0xFFFFFFFF
    for multiplier in (0x7FEB352D, 0x846CA68B):
        x = ((x ^ (x >> 16)) * multiplier) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    return (x >= int(dropout * 2**32)).reshape(shape)


def check_options(softcap: float, dropout: float = 0.0) -> None:
    """ValueError unless softcap is finite and not negative and dropout in [0, 1). Shared by the backends."""
    if not 0.0 <= softcap < math.inf:
        raise ValueError(
            f"attention takes a finite softcap of at least 0, it is {softcap}: scores would be uncapped or NaN; "
            "0 leaves it out"
        )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(
            f"attention takes a dropout in [0, 1), it is {dropout}: what is kept is divided by 1 - dropout; "
            "0 leaves it out"
        )
