"""rope by Liger's Triton kernel. Written against liger-kernel 0.8.5 (liger_kernel.ops)."""

from torch import Tensor

from tritium.kernels.lib import liger
from tritium.kernels.site import Site

UNPROVEN = liger.UNPROVEN


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See the reference. Liger turns in place, forwards and backwards: contiguous q and k, and both gradients, are
    copied first."""
    from liger_kernel.ops import LigerRopeFunction

    turned = 2 * cos.shape[-1]
    if turned == 0:
        return q.clone(), k.clone()
    heads = (t.clone() if t.is_contiguous() else t for t in (q, k))
    q, k = LigerRopeFunction.apply(*(t.transpose(1, 2) for t in heads), cos, sin, None, 1, turned)
    return liger.Fence.apply(q.transpose(1, 2)), liger.Fence.apply(k.transpose(1, 2))


def unsupported(site: Site) -> str | None:
    if site.shape.get("R") == 0:
        return liger.unavailable(site.replace(shape={letter: n for letter, n in site.shape.items() if letter != "R"}))
    return liger.unavailable(site)
