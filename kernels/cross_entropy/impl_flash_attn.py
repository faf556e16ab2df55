"""cross_entropy by flash-attn's Triton kernel. Written against flash-attn 2.8.3
(flash_attn.ops.triton.cross_entropy)."""

from torch import Tensor

from tritium.kernels.cross_entropy.reference import check_options, check_reduction, reduce
from tritium.kernels.site import Site, triton_unavailable

UNPROVEN = "never run on a GPU: only its calls have been checked, against flash-attn 2.8.3's signatures"


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
    """See the reference. ``softcap`` must be 0."""
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    check_reduction(reduction)
    check_options(label_smoothing, z_loss, softcap)
    losses, _ = cross_entropy_loss(
        logits[:, :vocab_size],
        targets,
        label_smoothing=label_smoothing,
        lse_square_scale=z_loss,
        ignore_index=ignore_index,
    )
    return reduce(losses, targets, ignore_index, reduction)


def unsupported(site: Site) -> str | None:
    if site.machine.version("flash-attn") is None:
        return "needs the package flash-attn, which is not installed; pip install flash-attn"
    if site.device != "cuda":
        return f"flash-attn's kernels run on GPUs and this site is on {site.device}; choose reference"
    if site.option("softcap", 0.0):
        return "flash-attn's cross-entropy has no softcap; set softcap=0, or choose triton or reference"
    if site.compiled:
        return "flash-attn's cross-entropy reads data pointers, which torch.compile cannot trace; choose triton"
    if 0 in site.shape.values():
        return f"flash-attn launches no kernel for an empty tensor, this site has {dict(site.shape)}; choose reference"
    return triton_unavailable(site)
