"""geglu by Liger's Triton kernel. Written against liger-kernel 0.8.5 (liger_kernel.ops)."""

from torch import Tensor

from tritium.kernels.lib import liger
from tritium.kernels.op import KernelError
from tritium.kernels.site import Site

UNPROVEN = liger.UNPROVEN


def geglu(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    """See the reference; ``approximate`` must be "tanh". Contiguous gate and up are copied: Liger writes their
    gradients over them."""
    from liger_kernel.ops import LigerGELUMulFunction

    if approximate != "tanh":
        raise KernelError(_EXACT)
    a, b = liger.own(gate, up), liger.own(up, gate)
    if gate.dim() == 0:
        return LigerGELUMulFunction.apply(a.reshape(1), b.reshape(1)).reshape(())
    return LigerGELUMulFunction.apply(a, b)


_EXACT = "Liger's GEGLU has the tanh approximation alone; set approximate=tanh, or choose triton or reference"


def unsupported(site: Site) -> str | None:
    reason = liger.unavailable(site, "F")
    if reason is None and site.option("approximate", "tanh") != "tanh":
        return _EXACT
    return reason
