"""add_rms_norm by Liger's fused Triton kernel. Written against liger-kernel 0.8.5 (liger_kernel.ops)."""

from torch import Tensor

from tritium.kernels.lib import liger
from tritium.kernels.op import KernelError
from tritium.kernels.rms_norm.impl_liger import CASTING, IN_PLACE, OFFSET
from tritium.kernels.site import Site

UNPROVEN = liger.UNPROVEN


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """See the reference. Needs a weight."""
    from liger_kernel.ops import LigerFusedAddRMSNormFunction

    if weight is None:
        raise KernelError(_NO_WEIGHT)
    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, OFFSET, CASTING, IN_PLACE)


_NO_WEIGHT = "Liger's fused add and RMS norm always has a weight; choose triton or reference"


def unsupported(site: Site) -> str | None:
    reason = liger.unavailable(site, "C")
    if reason is None and not site.option("weight", True):
        return _NO_WEIGHT
    return reason
