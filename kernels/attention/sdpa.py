"""What the four SDPA backends share: layout, masks, heads, and the sentences of refusal.

``F.scaled_dot_product_attention`` takes (B, H, T, D); the transposes are views. Its ``is_causal`` aligns to the
top left, ours to the bottom right, so it is used where both agree (Tq = Tk), and is not needed where nothing hides
(Tq = 1). Everything else that hides keys (window, documents, causal with 1 < Tq ≠ Tk) becomes a boolean mask
(B or 1, 1, Tq, Tk), built here: in a compiled model the layers share one.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tritium.kernels.attention.reference import check_options
from tritium.kernels.op import KernelError
from tritium.kernels.site import Site

_FUSED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def run(
    kernel: str | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_start: Tensor | None,
    causal: bool,
    scale: float | None,
    window: int,
    softcap: float,
    dropout: float,
) -> Tensor:
    """attention by torch's kernel ``kernel`` ("flash", "efficient", "cudnn"), or by torch's own choice (None)."""
    check_options(softcap, dropout)
    if softcap > 0.0 or dropout > 0.0:
        raise KernelError(_REFUSALS["softcap" if softcap > 0.0 else "dropout"])
    H, G, Tq, Tk = q.shape[2], k.shape[2], q.shape[1], k.shape[1]
    square = causal and Tq == Tk and seq_start is None and window == 0
    mask = None if square else _mask(q, k, seq_start, causal, window)
    if mask is not None and kernel == "flash" and q.is_cuda:
        raise KernelError(
            f"torch's flash kernel takes no mask, and Tq={Tq}, Tk={Tk}, window={window} needs one; {_OTHERS}"
        )
    # the fused kernels take any strides but the last axis's; the transposes are views
    q, k, v = ((t if t.stride(-1) == 1 else t.contiguous()).transpose(1, 2) for t in (q, k, v))
    if H != G and (kernel == "efficient" or mask is not None):  # the kernels that take masks have no grouped heads
        k, v = k.repeat_interleave(H // G, dim=1), v.repeat_interleave(H // G, dim=1)
    if scale is not None and scale <= 0.0:  # torch's kernels scale after the mask: -inf becomes +inf or NaN
        q, scale = (-q, -scale) if scale < 0.0 else (q * 0.0, 1.0)
    grouped = k.shape[1] != H
    with sdpa_kernel(_FUSED[kernel]) if kernel else contextlib.nullcontext():
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=square, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2)


def _mask(q: Tensor, k: Tensor, seq_start: Tensor | None, causal: bool, window: int) -> Tensor | None:
    """Which keys each query sees, (B or 1, 1, Tq, Tk) bool, or None where it sees all."""
    Tq, Tk = q.shape[1], k.shape[1]
    if seq_start is None and window == 0 and (not causal or Tq == 1):
        return None
    p = torch.arange(Tq, device=q.device)[:, None] + (Tk - Tq)
    j = torch.arange(Tk, device=q.device)[None, :]
    seen = j <= p if causal else torch.ones(Tq, Tk, dtype=torch.bool, device=q.device)
    if window > 0:
        seen = seen & (p - j < window)
    seen = seen[None, None]
    if seq_start is not None:
        seen = seen & (j >= seq_start[:, :, None])[:, None]
    return seen


_OTHERS = "choose sdpa, sdpa_efficient, sdpa_cudnn or flex"
_REFUSALS = {
    "softcap": "SDPA has no soft cap on its scores; choose flex, triton or reference, or set softcap=0",
    "dropout": "SDPA draws dropout from the global generator, so a call could not be repeated from its seed tensor; "
    "set dropout=0, or choose triton or reference",
}


def unsupported(site: Site, kernel: str | None) -> str | None:
    """Why torch's ``kernel`` cannot serve the site, or None. What the site does not name is judged when called."""
    for option, sentence in _REFUSALS.items():
        if site.option(option, 0.0):
            return sentence
    B, Tq, Tk = (site.shape.get(letter) for letter in ("B", "Tq", "Tk"))
    if site.device == "cuda" and 0 in (B, Tq, Tk):
        return f"torch's fused kernels take no empty batch, this site has B={B}, Tq={Tq}, Tk={Tk}; choose reference"
    if kernel is None or (kernel == "flash" and site.device == "cpu"):
        return None
    names = {"flash": "flash", "efficient": "memory-efficient", "cudnn": "cuDNN"}
    own = f"torch's {names[kernel]} attention"
    if site.device != "cuda":
        return f"{own} is for GPUs and this site is on {site.device}; choose sdpa or sdpa_flash"
    if site.machine.capability < (50 if kernel == "efficient" else 80):
        return f"{own} is not built for {site.machine.arch}; choose sdpa"
    dtypes = ["float16", "bfloat16"] + (["float32"] if kernel == "efficient" else [])
    dtype = str(site.dtype).removeprefix("torch.")
    if dtype not in dtypes:
        return f"{own} computes in {' or '.join(dtypes)}, this site in {dtype}; choose sdpa"
    D, most = site.shape.get("D", 8), {"flash": 256, "cudnn": 128, "efficient": 65536}[kernel]
    if most < D or (kernel == "cudnn" and D % 8 != 0):
        return f"{own} takes D ≤ {most} (cuDNN: a multiple of 8), this has D={D}; choose sdpa"
    if site.deterministic and site.needs_grad and kernel != "flash":
        return f"{own} adds in no fixed order backwards; choose sdpa_flash, or set deterministic=false"
    if kernel == "cudnn" and Tk == 1:
        return f"{own} takes no single key, this site has Tq={Tq}, Tk={Tk}; choose sdpa"
    causal = site.option("causal", True)
    if kernel == "flash":
        shape = f"causal Tq={Tq} on Tk={Tk}" if causal and Tq not in (Tk, 1) else None
        hidden = "documents" if site.option("documents") else "a window" if site.option("window") else shape
        return f"{own} takes no mask, and {hidden} needs one; {_OTHERS}" if hidden else None
    if causal and Tq is not None and Tk is not None and Tq > Tk:
        return f"{own} promises nothing for queries that see no key, and Tq={Tq} on Tk={Tk} has some; choose sdpa"
    if site.option("documents") == "anywhere":
        return f"{own} promises nothing for queries that see no key, as documents starting anywhere have; choose sdpa"
    return None
