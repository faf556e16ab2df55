"""Cases of add_rms_norm: those of rms_norm, with a residual of x's shape. N rows · C width.

Options: rms_norm's: weight (True), wide (False: the weight in fp32 beside a narrower x), eps.
"""

import math

import torch

from tritium.kernels.add_layer_norm.cases import fitting
from tritium.kernels.case import Case
from tritium.kernels.rms_norm import cases as rms_norm

CASES = rms_norm.CASES
BANNED = rms_norm.BANNED
BUDGETS = rms_norm.BUDGETS


def inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, object]:
    found = rms_norm.inputs(case, dtype, device, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    residual = rms_norm.values(torch.randn(*rms_norm.leading(case), case.shape["C"], generator=generator), case)
    x = found.pop("x")
    assert isinstance(x, torch.Tensor)
    return {"x": x, "residual": fitting(residual.to(device, dtype), x).requires_grad_(), **found}


def _elements(case: Case) -> int:
    return math.prod(rms_norm.leading(case)) * case.shape["C"]


def flops(case: Case) -> int:
    """rms_norm's, and one add per element."""
    return rms_norm.flops(case) + _elements(case)


def flops_backward(case: Case) -> int:
    """rms_norm's, and one add per element: the gradient that comes along the residual."""
    return rms_norm.flops_backward(case) + _elements(case)


def bytes(case: Case, dtype: torch.dtype) -> int:
    """Read x and residual, write y and s: two tensors more than rms_norm."""
    return rms_norm.bytes(case, dtype) + 2 * dtype.itemsize * _elements(case)


def bytes_backward(case: Case, dtype: torch.dtype) -> int:
    """Read s, dy and ds, write the one gradient that x and residual share: one tensor more than rms_norm."""
    return rms_norm.bytes_backward(case, dtype) + dtype.itemsize * _elements(case)
