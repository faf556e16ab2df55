"""relu2 by Liger's Triton kernel. Written against liger-kernel 0.8.5 (liger_kernel.ops)."""

from torch import Tensor

from tritium.kernels.lib import liger
from tritium.kernels.site import Site

UNPROVEN = liger.UNPROVEN


def relu2(x: Tensor) -> Tensor:
    """See the reference."""
    from liger_kernel.ops import LigerReLUSquaredFunction

    return LigerReLUSquaredFunction.apply(x.reshape(1) if x.dim() == 0 else x).reshape(x.shape)


def unsupported(site: Site) -> str | None:
    return liger.unavailable(site, "F")
