"""add_rms_norm by quack's CuTe kernel. Written against quack-kernels 0.6.5 (quack.rmsnorm with a residual)."""

from torch import Tensor

from tritium.kernels.lib import quack
from tritium.kernels.site import Site

UNPROVEN = quack.UNPROVEN


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """See the reference."""
    from quack import rmsnorm

    y, s = rmsnorm(x.contiguous(), weight, residual=residual.contiguous(), eps=eps, prenorm=True)
    return quack.DenseGradient.apply(y), quack.DenseGradient.apply(s)


def unsupported(site: Site) -> str | None:
    return quack.unavailable(site)
