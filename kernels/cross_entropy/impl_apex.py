"""cross_entropy by NVIDIA apex's xentropy kernel. Written against apex 25.09 (apex.contrib.xentropy).

What its wrapper does and a caller must know, seen in 25.09: it reads ``logits[label]`` before it masks, so labels
must be in range; its backward writes into the upstream gradient; it keeps the log-sum-exp in the logits' dtype unless
those are fp16.
"""

import torch
from torch import Tensor

from tritium.kernels.cross_entropy.reference import check_options, check_reduction, reduce
from tritium.kernels.lib import nvidia_apex
from tritium.kernels.site import Site

UNPROVEN = "never run on a GPU: only its calls have been checked, against apex 25.09's signatures"


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
    """See the reference. ``z_loss`` and ``softcap`` must be 0; padded logits are copied without their padding."""
    from apex.contrib.xentropy import SoftmaxCrossEntropyLoss

    check_reduction(reduction)
    check_options(label_smoothing, z_loss, softcap)
    counted = targets != ignore_index
    labels = torch.where(counted, targets, 0)
    real = logits[:, :vocab_size].contiguous()
    # -1 is no label, so apex masks nothing; where() masks, and its backward gives apex a gradient of its own to write
    # into
    losses = SoftmaxCrossEntropyLoss.apply(real, labels, label_smoothing, -1, logits.dtype == torch.float16)
    return reduce(torch.where(counted, losses, 0.0), targets, ignore_index, reduction)


def unsupported(site: Site) -> str | None:
    reason = nvidia_apex.unavailable(site, "xentropy_cuda")
    if reason is not None:
        return reason
    for option in ("z_loss", "softcap"):
        if site.option(option, 0.0):
            return f"apex's cross-entropy has no {option}; set {option}=0, or choose triton or reference"
    if site.dtype not in (torch.float32, torch.float16):
        dtype = str(site.dtype).removeprefix("torch.")
        return f"apex's cross-entropy rounds the log-sum-exp to {dtype}; use float32 or float16 logits or choose triton"
    if site.option("minus_infinity"):
        return "apex's cross-entropy makes NaN of logits of -∞ (it adds 0 times their sum); choose triton or reference"
    if site.compiled:
        return (
            "apex's cross-entropy reads a tensor on the host backwards, which torch.compile cannot trace; choose triton"
        )
    if 0 in site.shape.values():
        return f"apex launches no kernel for an empty tensor, this site has {dict(site.shape)}; choose reference"
    return None
