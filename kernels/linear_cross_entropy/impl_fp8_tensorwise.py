"""linear_cross_entropy with its three products in fp8 (kernels/lib/fp8.py): one scale a matrix. Never what auto means.

The weight is rounded to fp8 from its master precision. The gradient of the logits is softmax less one-hot: one number
near 1 in a row beside thousands near 1/V, for which e4m3 has too short a range, so it is e5m2. All logits exist at
once, as in the reference.
"""

from torch import Tensor

from tritium.kernels.cross_entropy.reference import cross_entropy
from tritium.kernels.lib import fp8
from tritium.kernels.site import Site

PRECISION = fp8.PRECISION


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    chunk: int = 0,
    with_grad: bool = True,
) -> Tensor:
    """See the reference; C and Vp are multiples of 16."""
    logits = fp8.linear(x, weight, None, rowwise=False, gradients=fp8.E5M2)
    return cross_entropy(logits, targets, vocab_size, ignore_index, label_smoothing, z_loss, softcap).sum()


def unsupported(site: Site) -> str | None:
    return fp8.unsupported(site, ("C", "Vp"))
