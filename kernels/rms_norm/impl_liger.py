"""rms_norm by Liger's Triton kernel. Written against liger-kernel 0.8.5 (liger_kernel.ops)."""

from torch import Tensor

from tritium.kernels.lib import liger
from tritium.kernels.site import Site

UNPROVEN = liger.UNPROVEN
OFFSET, CASTING, IN_PLACE = 0.0, "gemma", False  # "gemma" computes all of it in fp32, as the reference does


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """See the reference."""
    from liger_kernel.ops import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, eps, OFFSET, CASTING, IN_PLACE)


def unsupported(site: Site) -> str | None:
    return liger.unavailable(site, "C")
