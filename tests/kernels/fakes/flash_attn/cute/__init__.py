"""flash_attn.cute of flash-attn-4 4.0.0b36 for tests: its signatures and stated rules; it returns (out, lse)."""

import flash_attn


def flash_attn_func(
    q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
    learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
    score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
    block_sparse_tensors_bwd=None, return_lse=False, gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
):  # fmt: skip
    _check(q, k, causal, window_size, softmax_scale)
    window = tuple(-1 if side is None else side for side in window_size)
    y = flash_attn.flash_attn_func(
        q, k, v, softmax_scale=softmax_scale, causal=causal, window_size=window, softcap=softcap,
        deterministic=deterministic,
    )  # fmt: skip
    return y, None


def flash_attn_varlen_func(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None,
    return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
):  # fmt: skip
    assert causal
    window = tuple(-1 if side is None else side for side in window_size)
    y = flash_attn.flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=softmax_scale, causal=causal,
        window_size=window, softcap=softcap, deterministic=deterministic,
    )  # fmt: skip
    return y, None


def _check(q, k, causal, window_size, softmax_scale):
    assert q.shape[1] <= k.shape[1]
    assert q.shape[-1] % 8 == 0
    assert softmax_scale is None or softmax_scale > 0
    left, right = window_size
    assert left is None or left >= 0
    assert right in ((None, 0) if causal else (None,))
