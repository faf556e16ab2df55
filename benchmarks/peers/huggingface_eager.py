"""transformers' GPT2LMHeadModel without torch.compile: what most of its users run. SDPA, fused AdamW, no dropout."""

from __future__ import annotations

from tritium.benchmarks.peers import Variant, fast_bf16
from tritium.benchmarks.peers.huggingface import OWN_LOSS, build, fit, why_not

__all__ = ["NAME", "build", "fit", "variants", "why_not"]

NAME = "transformers, eager"


def variants(device: str) -> list[Variant]:
    """Its own loss over the exact vocabulary, and the padded table; eager transformers hands SDPA no mask by itself."""
    precisions = [] if device == "cuda" else ["fp32"]
    precisions += ["bf16"] if device == "cuda" or fast_bf16(device) else []
    matmul = "high" if device == "cuda" else "highest"
    return [
        Variant(precision, matmul, padded, "false", extra)
        for precision in precisions
        for padded, extra in ((True, ""), (False, OWN_LOSS))
    ]
