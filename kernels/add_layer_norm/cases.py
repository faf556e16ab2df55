"""Cases of add_layer_norm: those of layer_norm, with a residual of x's shape. N rows · C width.

Options: layer_norm's: bias (True), wide (False: weight and bias in fp32 beside a narrower x), eps.
"""

import math

import torch

from tritium.kernels.case import Case
from tritium.kernels.layer_norm import cases as layer_norm

CASES = layer_norm.CASES
BUDGETS = layer_norm.BUDGETS


def inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, object]:
    found = layer_norm.inputs(case, dtype, device, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    residual = layer_norm.values(torch.randn(*layer_norm.leading(case), case.shape["C"], generator=generator), case)
    x = found.pop("x")
    assert isinstance(x, torch.Tensor)
    return {"x": x, "residual": fitting(residual.to(device, dtype), x).requires_grad_(), **found}


def fitting(residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """residual within what x leaves of its dtype's range: a sum that overflows has no right result (fp16's ends at
    65504, five deviations of the case with large values)."""
    room = (torch.finfo(x.dtype).max - x.detach().abs()) * 0.99
    return residual.clamp(-room, room)


def _elements(case: Case) -> int:
    return math.prod(layer_norm.leading(case)) * case.shape["C"]


def flops(case: Case) -> int:
    """layer_norm's, and one add per element."""
    return layer_norm.flops(case) + _elements(case)


def flops_backward(case: Case) -> int:
    """layer_norm's, and one add per element: the gradient that comes along the residual."""
    return layer_norm.flops_backward(case) + _elements(case)


def bytes(case: Case, dtype: torch.dtype) -> int:
    """Read x and residual, write y and s: two tensors more than layer_norm."""
    return layer_norm.bytes(case, dtype) + 2 * dtype.itemsize * _elements(case)


def bytes_backward(case: Case, dtype: torch.dtype) -> int:
    """Read s, dy and ds, write the one gradient that x and residual share: one tensor more than layer_norm."""
    return layer_norm.bytes_backward(case, dtype) + dtype.itemsize * _elements(case)
