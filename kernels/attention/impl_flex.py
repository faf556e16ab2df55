"""attention by torch's FlexAttention: a Triton kernel that Inductor generates around a mask and a score function.

The kernel visits tiles of 128 × 128 (query, key) pairs. ``_block_mask`` lists for it the tiles with a visible pair and
marks those that are visible throughout, by comparing the tiles' corners: (T/128)² comparisons, where torch's own
``create_block_mask`` evaluates all T² pairs. Tiles that are not marked are masked pair by pair, so a list that is too
long costs time and never correctness. In a compiled model the layers share one table, so there is no ``prepare``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from tritium.kernels.attention.reference import check_options
from tritium.kernels.site import Site

BLOCK = 128


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
    """See the reference. ``dropout`` must be 0."""
    check_options(softcap, dropout)
    Tq, H, Tk, G = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    mask = _block_mask(Tq, Tk, seq_start, causal, window, q.device)
    y = flex_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        score_mod=_capped(softcap) if softcap > 0.0 else None, block_mask=mask, scale=scale, enable_gqa=H != G,
    )  # fmt: skip
    return y.transpose(1, 2)


def _capped(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def _block_mask(
    Tq: int, Tk: int, seq_start: Tensor | None, causal: bool, window: int, device: torch.device
) -> BlockMask | None:
    """The tiles to visit, or None where every query sees every key."""
    if seq_start is None and not causal and window == 0:
        return None

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        p = i + (Tk - Tq)
        visible = j >= 0
        if causal:
            visible = visible & (j <= p)
        if window > 0:
            visible = visible & (p - j < window)
        if seq_start is not None:
            visible = visible & (j >= seq_start[b, i])
        return visible

    rows, columns = -(-Tq // BLOCK), -(-Tk // BLOCK)
    i0 = torch.arange(rows, device=device)[:, None] * BLOCK
    j0 = torch.arange(columns, device=device)[None, :] * BLOCK
    i1, j1 = (i0 + BLOCK - 1).clamp(max=Tq - 1), j0 + BLOCK - 1
    p0, p1 = i0 + (Tk - Tq), i1 + (Tk - Tq)
    some = j0 < Tk
    every = (j1 < Tk) & (i0 + BLOCK <= Tq)
    if causal:
        some, every = some & (j0 <= p1), every & (j1 <= p0)
    if window > 0:
        some, every = some & (p0 - j1 < window), every & (p1 - j0 < window)
    some, every = some.expand(1, rows, columns), every.expand(1, rows, columns)
    if seq_start is not None:
        i = torch.arange(rows * BLOCK, device=device).clamp(max=Tq - 1)
        first, last = torch.aminmax(seq_start[:, i].unflatten(1, (rows, BLOCK)), dim=2, keepdim=True)
        some, every = some & (j1 >= first), every & (j0 >= last)
    partly = some & ~every
    return BlockMask.from_kv_blocks(
        *_listed(partly), *_listed(some & every), BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(Tq, Tk)
    )


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """(B, rows, columns) bool → the number of columns set in each row, and those columns; both with a head axis."""
    counts = tiles.sum(-1, dtype=torch.int32)
    order = torch.argsort(tiles.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[:, None], order[:, None].contiguous()


def unsupported(site: Site) -> str | None:
    if site.option("dropout", 0.0):
        return "FlexAttention has no dropout of attention weights; set dropout=0, or choose triton or reference"
    if site.device == "cpu":
        if site.needs_grad:
            return "FlexAttention has no backward on a CPU; choose sdpa_flash"
        if site.compiled:
            return (
                "Inductor's CPU FlexAttention returns NaN on some shapes (T=40, grouped heads, torch 2.13); choose sdpa"
            )
        return None
    if site.device == "cuda":
        if not site.compiled:
            return "FlexAttention outside torch.compile materialises all scores; set compile=true or choose sdpa"
        if site.machine.capability < 80:
            return f"FlexAttention's kernel needs compute capability 8.0, this is {site.machine.arch}; choose sdpa"
        if site.dtype == torch.float64:
            return "FlexAttention's kernel computes in 32 and 16 bits, this site in float64; choose reference"
        D = site.shape.get("D", 16)
        if D < 16:
            return f"FlexAttention's kernel takes heads of at least 16 channels, this has D={D}; choose sdpa"
    return None
