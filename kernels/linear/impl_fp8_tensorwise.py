"""linear in fp8 (kernels/lib/fp8.py): one scale a matrix, gradients that arrive in e5m2.

Never what auto means.
"""

from torch import Tensor

from tritium.kernels.lib import fp8
from tritium.kernels.site import Site

PRECISION = fp8.PRECISION


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See the reference; C and F are multiples of 16, and all three products are in fp8."""
    return fp8.linear(x, weight, bias, rowwise=False, gradients=fp8.E5M2)


def unsupported(site: Site) -> str | None:
    return fp8.unsupported(site, ("C", "F"))
