"""linear_cross_entropy by Liger's FusedLinearCrossEntropy. Written against liger-kernel 0.8.5 (liger_kernel.ops).

Logits exist a chunk of rows at a time, and both gradients are made in the forward pass.
"""

import torch
from torch import Tensor

from tritium.kernels.cross_entropy.reference import check_options
from tritium.kernels.lib import liger
from tritium.kernels.site import Site

UNPROVEN = liger.UNPROVEN


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
    """See the reference. ``chunk`` is Liger's own to choose; the weight's gradient is added up in fp32 and rounded to
    x's dtype once."""
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    check_options(label_smoothing, z_loss, softcap)
    weight = weight[:vocab_size].to(x.dtype)
    if not with_grad:
        x, weight = x.detach(), weight.detach()
    elif torch.is_grad_enabled() and weight.requires_grad and not x.requires_grad:
        x = x.detach().requires_grad_()  # Liger makes no gradient of the weight where x needs none
    loss, *_ = LigerFusedLinearCrossEntropyFunction.apply(
        x.contiguous(), weight.contiguous(), targets, None, None, ignore_index, z_loss, label_smoothing, "sum",
        softcap or None, False, torch.float32,
    )  # fmt: skip
    return loss


def unsupported(site: Site) -> str | None:
    reason = liger.unavailable(site)
    if reason is None and site.compiled:
        return "Liger's fused cross-entropy counts the targets on the host, which one graph cannot; set compile=false"
    return reason
