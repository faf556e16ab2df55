"""cut_cross_entropy 25.1.1's function for tests: its signature and stated rules, computed by the reference."""

import torch
import torch.nn.functional as F

from tritium.kernels.cross_entropy.reference import cross_entropy


def linear_cross_entropy(
    e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high", impl="cce"
):  # fmt: skip
    assert e.dtype == c.dtype
    assert e.dtype in (torch.float16, torch.bfloat16)
    assert e.is_contiguous()
    assert e.shape[:-1] == targets.shape
    assert e.shape[-1] == c.shape[1]
    assert softcap is None or softcap > 0
    assert (reduction, shift, filter_eps, impl) == ("sum", False, None, "cce")
    assert bool((targets != ignore_index).any()), "its kernels would be launched over no row"
    return cross_entropy(F.linear(e, c), targets, c.shape[0], ignore_index, softcap=softcap or 0.0).sum()
