"""quack (package quack-kernels): whether it is here, for the backends that call it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritium.kernels.site import Site

UNPROVEN = "never run on a GPU: only its calls have been checked, against quack-kernels 0.6.5's signatures"


def unavailable(site: Site) -> str | None:
    """Why quack's kernels cannot serve the site, or None."""
    if site.machine.version("quack-kernels") is None:
        return "needs the package quack-kernels, which is not installed; pip install quack-kernels"
    if site.device != "cuda":
        return f"quack's kernels run on GPUs and this site is on {site.device}; choose reference"
    if site.machine.capability < 90:
        return f"quack is for compute capability 9.0 or later, this is {site.machine.arch}; choose triton or reference"
    if 0 in site.shape.values():
        return f"quack launches no kernel for an empty tensor, this site has {dict(site.shape)}; choose reference"
    return None


class DenseGradient(torch.autograd.Function):
    """Identity whose backward hands on a contiguous gradient: quack's kernels ask for aligned rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()
