"""attention_lse in Triton: attention's kernels, whose forward has lse anyway and whose backward takes its gradient.

Mathematics: as attention's; ∂lse_i/∂s_ij = p_ij, so ds_ij = p_ij (dp_ij - delta_i + dlse_i): the kernel that makes
delta subtracts dlse, and nothing else changes. Shapes: as attention; lse and dlse (B, H, Tq).

Saved: q, k, v, y, and the lse in base 2, +∞ for blind queries, that the backward's kernels read: 4 bytes a query and
head beside the natural lse that is returned (-∞ for blind ones), and no conversion per tile. Bytes and FLOPs:
attention's and 8 bytes a query and head in either direction; the bound is attention's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tritium.kernels.attention import impl_triton as shared
from tritium.kernels.autograd import differentiable
from tritium.kernels.site import Site

DETERMINISTIC = True


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, seq_start: Tensor | None,
    causal: bool, scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, Tq, H, _ = q.shape
    natural = torch.empty(B, H, Tq, dtype=torch.float32, device=q.device)
    y, lse = shared.forward(q, k, v, seq_start, None, causal, scale, window, softcap, 0.0, natural)
    return y, natural, lse


def _launch_backward(
    dy: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, seq_start: Tensor | None, y: Tensor, lse: Tensor,
    causal: bool, scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return shared.backward(dy, dlse, q, k, v, seq_start, None, y, lse, causal, scale, window, softcap, 0.0)


# ------------------------------------------------------------------------------------------------------------- autograd


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, seq_start: Tensor | None,
    causal: bool, scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, Tq, H, _ = q.shape
    lse = q.new_empty((B, H, Tq), dtype=torch.float32)
    return q.new_empty(q.shape), lse, torch.empty_like(lse)


def _fake_backward(
    dy: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, seq_start: Tensor | None, y: Tensor, lse: Tensor,
    causal: bool, scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return shared.allocate_gradients(q, k, v)


def _flops(
    q_shape: torch.Size, k_shape: torch.Size, v_shape: torch.Size, seq_start: object, causal: bool, scale: float,
    window: int, *args: object, **kwargs: object,
) -> int:  # fmt: skip
    """attention's."""
    return shared.flops(q_shape, k_shape, v_shape, seq_start, None, causal, scale, window)


def _flops_backward(
    dy_shape: torch.Size, dlse_shape: torch.Size, q_shape: torch.Size, k_shape: torch.Size, v_shape: torch.Size,
    seq_start: object, y_shape: object, lse_shape: object, causal: bool, scale: float, window: int,
    *args: object, **kwargs: object,
) -> int:  # fmt: skip
    """attention's."""
    return 2 * shared.flops(q_shape, k_shape, v_shape, seq_start, None, causal, scale, window)


_attention_lse = differentiable(
    "attention_lse_triton",
    forward=_launch_forward,
    backward=_launch_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=lambda args, results: (*args[:4], results[0], results[2], *args[4:]),
    gradients=(0, 1, 2),
    outputs=2,
    flops=_flops,
    flops_backward=_flops_backward,
)


def attention_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_start: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """q (B, Tq, H, D), k and v (B, Tk, G, D), strided views read in place → (B, Tq, H, D) in q's dtype and (B, H, Tq)
    in fp32; the options are the reference's."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _attention_lse(q, k, v, seq_start, causal, scale, window, softcap)


def unsupported(site: Site) -> str | None:
    return shared.unsupported(site)
