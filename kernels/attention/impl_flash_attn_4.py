"""attention by flash-attn-4, in CuTe. Written against flash-attn-4 4.0.0b36 (flash_attn.cute: flash_attn_func,
flash_attn_varlen_func).

Its causal mask is aligned to the bottom right and window (left, right) counts keys besides the diagonal's, as in the
reference. Documents become sequences of their own through ``prepare``.
"""

import torch
from torch import Tensor

from tritium.kernels.attention.impl_flash_attn import prepare
from tritium.kernels.attention.reference import check_options
from tritium.kernels.op import KernelError
from tritium.kernels.site import Site

__all__ = ["UNPROVEN", "attention", "prepare", "unsupported"]

UNPROVEN = "never run on a GPU: only its calls have been checked, against flash-attn-4 4.0.0b36's signatures"


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
    """See the reference. ``seq_start`` is what ``prepare`` made of it; ``dropout`` must be 0."""
    from flash_attn import cute

    check_options(softcap, dropout)
    if dropout > 0.0:
        raise KernelError(_DROPOUT)
    options = {
        "softmax_scale": scale,
        "causal": causal,
        "window_size": (window - 1 if window > 0 else None, 0 if causal and window > 0 else None),
        "softcap": softcap,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if seq_start is None:
        return cute.flash_attn_func(q, k, v, **options)[0]
    B, T, H, D = q.shape
    if k.shape[1] != T or not causal:
        raise KernelError(_DOCUMENTS)
    flat = (t.reshape(B * T, t.shape[2], D) for t in (q, k, v))
    y, _ = cute.flash_attn_varlen_func(
        *flat, cu_seqlens_q=seq_start, cu_seqlens_k=seq_start, max_seqlen_q=T, max_seqlen_k=T, **options
    )
    return y.reshape(B, T, H, D)


_DROPOUT = "flash-attn-4 has no dropout; set dropout=0, or choose triton or reference"
_DOCUMENTS = (
    "documents are sequences of their own only for causal attention with as many queries as keys; choose flex or "
    "reference"
)


def unsupported(site: Site) -> str | None:
    if site.machine.version("flash-attn-4") is None:
        return "needs the package flash-attn-4, which is not installed; pip install --pre flash-attn-4"
    if site.device != "cuda":
        return f"flash-attn-4's kernels run on GPUs and this site is on {site.device}; choose sdpa_flash"
    capability, D = site.machine.capability, int(site.shape.get("D", 64))
    if capability < 90:
        return f"flash-attn-4 has a backward for sm_90 and later, this is {site.machine.arch}; choose sdpa"
    if site.dtype not in (torch.float16, torch.bfloat16):
        dtype = str(site.dtype).removeprefix("torch.")
        return f"flash-attn-4 computes in float16 and bfloat16, this site in {dtype}; choose sdpa"
    if site.option("dropout", 0.0):
        return _DROPOUT
    if D % 8 or not (D <= 128 or D == 256 or (capability < 100 and D <= 256)):
        return f"flash-attn-4 takes no heads of D={D} channels on {site.machine.arch}; choose sdpa"
    if D == 256 and capability >= 100 and site.option("softcap", 0.0):
        return f"flash-attn-4 has no softcap for heads of 256 channels on {site.machine.arch}; choose flex or reference"
    if site.compiled:
        return "flash-attn-4 compiles its kernels from Python when they are called, which one graph cannot; choose flex"
    if site.option("documents") and (not site.option("causal", True) or site.shape.get("Tq") != site.shape.get("Tk")):
        return _DOCUMENTS
    if site.option("documents") == "anywhere":
        return "documents that do not follow one another are no sequences for flash-attn; choose flex, sdpa or triton"
    if site.shape.get("Tq", 0) > site.shape.get("Tk", site.shape.get("Tq", 0)):
        return "nothing says what flash-attn-4 gives for a query that sees no key; choose flex or reference"
    scale = site.option("scale")
    if isinstance(scale, float) and scale <= 0.0:
        return f"nothing says that flash-attn-4 takes a scale of {scale}, which is not positive; choose sdpa"
    if 0 in (site.shape.get("B"), site.shape.get("Tq"), site.shape.get("Tk")):
        return f"flash-attn-4 launches no kernel for an empty tensor, this has {dict(site.shape)}; choose reference"
    return None
