"""flash_attn 2.8.3's cross_entropy_loss for tests: its signature and stated rules, computed by the reference."""

import torch

from tritium.kernels.cross_entropy.reference import cross_entropy


def cross_entropy_loss(
    logits, labels, precomputed_lse=None, label_smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0, ignore_index=-100,
    inplace_backward=False, process_group=None,
):  # fmt: skip
    """logits (N, V), labels (N,) → losses (N,) fp32 that include the z-losses, and the z-losses alone."""
    assert logits.dim() == 2
    assert labels.shape == (len(logits),)
    assert (precomputed_lse, logit_scale, inplace_backward, process_group) == (None, 1.0, False, None)
    arguments = (logits, labels, logits.shape[1], ignore_index, label_smoothing)
    losses = cross_entropy(*arguments, lse_square_scale)
    with torch.no_grad():
        z_losses = losses - cross_entropy(*arguments, 0.0)
    return losses, z_losses
