"""linear in fp8 by torchao's recipe rowwise: a scale for every row and column (kernels/lib/torchao_linear.py)."""

from torch import Tensor

from tritium.kernels.lib import torchao_linear
from tritium.kernels.site import Site

PRECISION = torchao_linear.PRECISION
UNPROVEN = torchao_linear.UNPROVEN


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See the reference; C and F are multiples of 16."""
    return torchao_linear.linear(x, weight, bias, "rowwise")


def unsupported(site: Site) -> str | None:
    return torchao_linear.unsupported(site)
