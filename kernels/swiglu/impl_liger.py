"""swiglu by Liger's Triton kernel. Written against liger-kernel 0.8.5 (liger_kernel.ops)."""

from torch import Tensor

from tritium.kernels.lib import liger
from tritium.kernels.site import Site

UNPROVEN = liger.UNPROVEN


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See the reference. Contiguous gate and up are copied: Liger writes their gradients over them."""
    from liger_kernel.ops import LigerSiLUMulFunction

    a, b = liger.own(gate, up), liger.own(up, gate)
    if gate.dim() == 0:
        return LigerSiLUMulFunction.apply(a.reshape(1), b.reshape(1)).reshape(())
    return LigerSiLUMulFunction.apply(a, b)


def unsupported(site: Site) -> str | None:
    return liger.unavailable(site, "F")
