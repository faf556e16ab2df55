"""attention by F.scaled_dot_product_attention, with the kernel that torch chooses."""

from torch import Tensor

from tritium.kernels.attention import sdpa
from tritium.kernels.site import Site


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
    """See the reference."""
    return sdpa.run(None, q, k, v, seq_start, causal, scale, window, softcap, dropout)


def unsupported(site: Site) -> str | None:
    return sdpa.unsupported(site, None)
