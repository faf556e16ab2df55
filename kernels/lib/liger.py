"""Liger (package liger-kernel): whether it is here, for the backends that call it, and what its callers must know.

Liger saves memory by writing results over what it was given: gradients over activations and over the gradients that
come from above. In the models that it patches nobody reads those again; an op here leaves them as they were, so its
adapters give Liger copies where it would write. That is part of their time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritium.kernels.site import Site, triton_unavailable

UNPROVEN = "never run on a GPU: held to the contract in Triton's interpreter alone, liger-kernel 0.8.5"
WIDEST = 65536  # of a row that its kernels take in one block


def unavailable(site: Site, width: str = "") -> str | None:
    """Why Liger's kernels cannot serve the site, or None. width: the letter of the row that is one block."""
    if site.machine.version("liger-kernel") is None:
        return "needs the package liger-kernel, which is not installed; pip install liger-kernel"
    if site.device != "cuda" and not site.machine.interpreted:
        return f"Liger's kernels run on GPUs and this site is on {site.device}; choose reference"
    if site.shape.get(width, 0) > WIDEST:
        return f"Liger takes rows of at most {WIDEST}, this has {width}={site.shape[width]}; choose triton or reference"
    if 0 in site.shape.values():
        return f"Liger launches no kernel for an empty tensor, this site has {dict(site.shape)}; choose reference"
    return triton_unavailable(site)


def own(tensor: Tensor, *others: Tensor) -> Tensor:
    """``tensor``, or a copy where Liger would write its gradient into it: it copies what is not contiguous itself."""
    written = torch.is_grad_enabled() and any(t.requires_grad for t in (tensor, *others))
    return tensor.clone() if written and tensor.is_contiguous() else tensor


class Fence(torch.autograd.Function):
    """Identity whose backward hands on a copy, so that what comes next may write into its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone(memory_format=torch.contiguous_format)
