"""What the backends of adamw_8bit ask of their lists of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritium.kernels.adamw import arguments as adamw
from tritium.kernels.lib import dynamic_code


def check(
    backend: str,
    params: Sequence[Tensor],
    copies: Sequence[Tensor],
    grads: Sequence[Tensor],
    codes: Sequence[Sequence[Tensor]],
    scales: Sequence[Sequence[Tensor]],
    device: torch.device,
    dtypes: Sequence[torch.dtype],
) -> None:
    """Raise unless masters are fp32, grads and copies of ``dtypes``, codes uint8, all of the params' shapes, and scales
    fp32, one for 256 elements; everything on ``device`` and the codes and scales contiguous, as they are written there.
    """
    adamw.check(backend, params, copies, grads, params, params, device, dtypes)
    shapes = [p.shape for p in params]
    for name, tensors in zip(("exp_avgs", "exp_avg_sqs"), codes, strict=True):
        if [t.shape for t in tensors] != shapes or any(t.dtype != torch.uint8 or t.device != device for t in tensors):
            raise ValueError(f"adamw_8bit needs {name} as codes of the params' shapes, in uint8 on {device}")
    wanted = [(dynamic_code.blocks(p.numel()),) for p in params]
    for name, tensors in zip(("exp_avg_scales", "exp_avg_sq_scales"), scales, strict=True):
        if [tuple(t.shape) for t in tensors] != wanted or any(
            t.dtype != torch.float32 or t.device != device or not t.is_contiguous() for t in tensors
        ):
            raise ValueError(
                f"adamw_8bit needs {name} contiguous, a scale for {dynamic_code.BLOCK} elements of each param, in "
                f"float32 on {device}"
            )
