"""linear in fp8 (kernels/lib/fp8.py): a scale for every row of the left factor and column of the right, all in e4m3.

Never what auto means.
"""

from torch import Tensor

from tritium.kernels.lib import fp8
from tritium.kernels.site import Site

PRECISION = fp8.PRECISION


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See the reference; C and F are multiples of 16, and all three products are in fp8."""
    return fp8.linear(x, weight, bias, rowwise=True, gradients=fp8.E4M3)


def unsupported(site: Site) -> str | None:
    return fp8.unsupported(site, ("C", "F"))
