"""rms_norm by quack's CuTe kernel. Written against quack-kernels 0.6.5 (quack.rmsnorm)."""

from torch import Tensor

from tritium.kernels.lib import quack
from tritium.kernels.site import Site

UNPROVEN = quack.UNPROVEN


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """See the reference."""
    from quack import rmsnorm

    return quack.DenseGradient.apply(rmsnorm(x.contiguous(), weight, eps=eps))


def unsupported(site: Site) -> str | None:
    return quack.unavailable(site)
