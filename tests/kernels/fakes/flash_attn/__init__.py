"""flash_attn 2.8.3's functions for tests: its signatures and stated rules, computed by the reference on any device."""

import itertools

import torch

from tritium.kernels.attention.reference import attention


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """q (B, Tq, H, D), k and v (B, Tk, G, D); window_size (left, right) inclusive, -1: none; bottom-right aligned."""
    _check(q, k, v, dropout_p, alibi_slopes, deterministic, return_attn_probs)
    left, right = window_size
    assert isinstance(left, int)
    assert right == (0 if causal and left >= 0 else -1), "this fake knows only windows that look back"
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return attention(q, k, v, None, causal, scale, left + 1 if left >= 0 else 0, softcap)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """q (total, H, D), k and v (total, G, D); cu_seqlens int32, from 0 to the total."""
    assert q.dim() == k.dim() == v.dim() == 3
    for lengths in (cu_seqlens_q, cu_seqlens_k):
        assert lengths.dtype == torch.int32
        assert lengths.dim() == 1
        assert lengths.is_contiguous()
        assert lengths[0] == 0
        assert lengths[-1] == len(q)
    assert block_table is None
    bounds = cu_seqlens_q.tolist()
    assert bounds == cu_seqlens_k.tolist()
    pieces = []
    for begin, end in itertools.pairwise(bounds):
        assert 0 <= end - begin <= min(max_seqlen_q, max_seqlen_k)
        part = slice(begin, end)
        pieces.append(
            flash_attn_func(
                q[None, part], k[None, part], v[None, part], dropout_p, softmax_scale, causal, window_size, softcap,
                alibi_slopes, deterministic, return_attn_probs,
            )[0]
        )  # fmt: skip
    return torch.cat(pieces)


def _check(q, k, v, dropout_p, alibi_slopes, deterministic, return_attn_probs):
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.dtype == k.dtype == v.dtype
    assert q.shape[2] % k.shape[2] == 0
    assert q.shape[-1] <= 256
    assert (dropout_p, alibi_slopes, return_attn_probs) == (0.0, None, False)
    assert isinstance(deterministic, bool)
