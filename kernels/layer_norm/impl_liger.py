"""layer_norm by Liger's Triton kernel. Written against liger-kernel 0.8.5 (liger_kernel.ops)."""

from torch import Tensor

from tritium.kernels.lib import liger
from tritium.kernels.op import KernelError
from tritium.kernels.site import Site

UNPROVEN = liger.UNPROVEN


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """See the reference. Needs a bias."""
    from liger_kernel.ops import LigerLayerNormFunction

    if bias is None:
        raise KernelError(_NO_BIAS)
    return LigerLayerNormFunction.apply(x, weight, bias, eps)


_NO_BIAS = "Liger's layer norm always has a bias; choose triton or reference, or set bias=true"


def unsupported(site: Site) -> str | None:
    reason = liger.unavailable(site, "C")
    if reason is None and not site.option("bias", True):
        return _NO_BIAS
    return reason
