"""cross_entropy by Liger's Triton kernel. Written against liger-kernel 0.8.5 (liger_kernel.ops)."""

import torch
from torch import Tensor

from tritium.kernels.cross_entropy.reference import check_options, check_reduction, reduce
from tritium.kernels.lib import liger
from tritium.kernels.site import Site

UNPROVEN = liger.UNPROVEN


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    vocab_size: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "none",
) -> Tensor:
    """See the reference. The logits are copied: Liger writes their gradient over them, in the forward pass."""
    from liger_kernel.ops import LigerCrossEntropyFunction

    check_reduction(reduction)
    check_options(label_smoothing, z_loss, softcap)
    real = logits[:, :vocab_size].clone(memory_format=torch.contiguous_format)
    losses, *_ = LigerCrossEntropyFunction.apply(
        real, targets, None, ignore_index, z_loss, label_smoothing, "none", softcap or None, False, False, False
    )
    return reduce(losses, targets, ignore_index, reduction)


def unsupported(site: Site) -> str | None:
    reason = liger.unavailable(site)
    if reason is not None:
        return reason
    if site.dtype != torch.float32:
        dtype = str(site.dtype).removeprefix("torch.")
        return f"Liger's cross-entropy rounds each row's loss to {dtype}; use float32 logits or choose triton"
    if site.compiled:
        return "Liger's cross-entropy counts the targets on the host, which one graph cannot; set compile=false"
    return None
