"""attention by the flash-attn package. Written against flash-attn 2.8.3 (flash_attn_func, flash_attn_varlen_func).

Its causal mask is aligned to the bottom right, a row that sees nothing gives zeros, and window (left, right) counts
keys besides the diagonal's: all as in the reference. Documents become sequences of their own through ``prepare``.
"""

import torch
from torch import Tensor

from tritium.kernels.attention.reference import check_options
from tritium.kernels.op import KernelError
from tritium.kernels.site import Site

UNPROVEN = "never run on a GPU: only its calls have been checked, against flash-attn 2.8.3's signatures"


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
    import flash_attn

    check_options(softcap, dropout)
    if dropout > 0.0:
        raise KernelError(_DROPOUT)
    options = {
        "softmax_scale": scale,
        "causal": causal,
        "window_size": (window - 1 if window > 0 else -1, 0 if causal and window > 0 else -1),
        "softcap": softcap,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if seq_start is None:
        return flash_attn.flash_attn_func(q, k, v, **options)
    B, T, H, D = q.shape
    if k.shape[1] != T or not causal:
        raise KernelError(_DOCUMENTS)
    flat = (t.reshape(B * T, t.shape[2], D) for t in (q, k, v))
    return flash_attn.flash_attn_varlen_func(*flat, seq_start, seq_start, T, T, **options).reshape(B, T, H, D)


def prepare(seq_start: Tensor) -> Tensor:
    """seq_start (B, T) → the sequences' boundaries in B·T tokens, int32, ascending, as flash-attn takes them.

    Their number depends on the data, so the host waits for it once. It is rounded up to a power of two by empty
    sequences at the end, so that a compiled model sees few sizes.
    """
    B, T = seq_start.shape
    first = seq_start == torch.arange(T, device=seq_start.device, dtype=seq_start.dtype)
    begins = first.flatten().nonzero()[:, 0].to(torch.int32)
    size = 1 << int(begins.numel()).bit_length()
    return torch.nn.functional.pad(begins, (0, size - begins.numel()), value=B * T)


_DROPOUT = (
    "flash-attn draws dropout from the global generator, so a call could not be repeated from its seed tensor; "
    "set dropout=0, or choose triton or reference"
)
_DOCUMENTS = (
    "flash-attn takes documents only for causal attention with as many queries as keys; choose flex or reference"
)


def unsupported(site: Site) -> str | None:
    if site.machine.version("flash-attn") is None:
        return "needs the package flash-attn, which is not installed; pip install flash-attn"
    if site.device != "cuda":
        return f"flash-attn's kernels run on GPUs and this site is on {site.device}; choose sdpa_flash"
    if site.machine.capability < 80:
        return f"flash-attn needs compute capability 8.0 or later, this is {site.machine.arch}; choose sdpa"
    if site.dtype not in (torch.float16, torch.bfloat16):
        dtype = str(site.dtype).removeprefix("torch.")
        return f"flash-attn computes in float16 and bfloat16, this site in {dtype}; choose sdpa"
    if site.option("dropout", 0.0):
        return _DROPOUT
    if site.shape.get("D", 8) > 256:
        return f"flash-attn takes heads of at most 256 channels, this has D={site.shape['D']}; choose sdpa"
    if site.option("documents") and site.compiled:
        return "flash-attn's kernel takes the number of documents from the host, which one graph cannot; choose flex"
    if site.option("documents") and (not site.option("causal", True) or site.shape.get("Tq") != site.shape.get("Tk")):
        return _DOCUMENTS
    if site.option("documents") == "anywhere":
        return "documents that do not follow one another are no sequences for flash-attn; choose flex, sdpa or triton"
    if 0 in (site.shape.get("B"), site.shape.get("Tq"), site.shape.get("Tk")):
        return f"flash-attn launches no kernel for an empty tensor, this site has {dict(site.shape)}; choose reference"
    return None
