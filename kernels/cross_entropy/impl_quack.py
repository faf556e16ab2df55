"""cross_entropy by quack's CuTe kernel. Written against quack-kernels 0.6.5 (quack.cross_entropy)."""

from torch import Tensor

from tritium.kernels.cross_entropy.reference import check_options, check_reduction, reduce
from tritium.kernels.lib import quack
from tritium.kernels.op import KernelError
from tritium.kernels.site import Site

UNPROVEN = quack.UNPROVEN


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
    """See the reference. Padded logits are copied without their padding; the loss has no further terms."""
    from quack import cross_entropy as losses_of

    check_reduction(reduction)
    check_options(label_smoothing, z_loss, softcap)
    for name, value in (("label_smoothing", label_smoothing), ("z_loss", z_loss), ("softcap", softcap)):
        if value:
            raise KernelError(_lacks(name))
    losses = losses_of(logits[:, :vocab_size].contiguous(), targets, ignore_index=ignore_index, reduction="none")
    return reduce(quack.DenseGradient.apply(losses), targets, ignore_index, reduction)


def _lacks(option: str) -> str:
    return f"quack's cross-entropy has no {option}; set {option}=0, or choose triton or reference"


def unsupported(site: Site) -> str | None:
    reason = quack.unavailable(site)
    if reason is not None:
        return reason
    for option in ("label_smoothing", "z_loss", "softcap"):
        if site.option(option, 0.0):
            return _lacks(option)
    if site.option("minus_infinity"):
        return "nothing says what quack's cross-entropy makes of logits of -∞; choose triton or reference"
    return None
