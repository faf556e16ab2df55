"""linear_cross_entropy by Apple's cut-cross-entropy (arXiv:2411.09009). Written against cut-cross-entropy 25.1.1.

Logits exist a tile at a time, in the forward pass and again in the backward pass. Its filter, which leaves out tiles of
the gradient whose softmax is small, is off: with it the gradient is another one.
"""

import torch
from torch import Tensor

from tritium.kernels.cross_entropy.reference import check_options
from tritium.kernels.op import KernelError
from tritium.kernels.site import Site, triton_unavailable

UNPROVEN = "never run on a GPU: only its calls have been checked, against cut-cross-entropy 25.1.1's signatures"


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
    """See the reference. ``label_smoothing`` and ``z_loss`` must be 0; ``chunk`` means nothing here."""
    from cut_cross_entropy import linear_cross_entropy as loss_of

    check_options(label_smoothing, z_loss, softcap)
    for name, value in (("label_smoothing", label_smoothing), ("z_loss", z_loss)):
        if value:
            raise KernelError(_lacks(name))
    weight = weight[:vocab_size].to(x.dtype).contiguous()
    if not with_grad:
        x, weight = x.detach(), weight.detach()
    if not bool((targets != ignore_index).any()):  # it would launch kernels over no row; it waits for the host anyway
        return 0.0 * (x.float().sum() + weight.float().sum())
    return loss_of(
        x.contiguous(), weight, targets, ignore_index=ignore_index, softcap=softcap or None, reduction="sum",
        filter_eps=None,
    )  # fmt: skip


def _lacks(option: str) -> str:
    return f"cut-cross-entropy has no {option}; set {option}=0, or choose triton or reference"


def unsupported(site: Site) -> str | None:
    if site.machine.version("cut-cross-entropy") is None:
        return "needs the package cut-cross-entropy, which is not installed; pip install cut-cross-entropy"
    if site.device != "cuda":
        return f"cut-cross-entropy's kernels run on GPUs and this site is on {site.device}; choose reference"
    if site.dtype not in (torch.float16, torch.bfloat16):
        dtype = str(site.dtype).removeprefix("torch.")
        return (
            f"cut-cross-entropy has a backward for float16 and bfloat16 alone, this site is in {dtype}; choose triton"
        )
    for option in ("label_smoothing", "z_loss"):
        if site.option(option, 0.0):
            return _lacks(option)
    if site.compiled:
        return "cut-cross-entropy finds the counted rows on the host, which one graph cannot; set compile=false"
    if 0 in site.shape.values():
        return (
            f"cut-cross-entropy launches no kernel for an empty tensor, this has {dict(site.shape)}; choose reference"
        )
    return triton_unavailable(site)
