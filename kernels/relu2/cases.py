"""Cases of relu2. N rows (the product of the leading axes) · F width.

Options: extremes (False): EXTREMES are among the values of x.
"""

import math
from typing import Any

import torch

from tritium.kernels.case import Budget, Case

EXTREMES = (200.0, -200.0, -1e4, 1e-4, -1e-4, 0.0, -0.0)

CASES = (
    Case("one", {"F": 1}),
    Case("scalar", {}),
    Case("no_rows", {"N": 0, "F": 8}),
    Case("odd", {"N": 7, "F": 33}),
    Case("three_axes", {"B": 2, "T": 3, "F": 40}),
    Case("many", {"N": 33, "F": 130}),
    Case("several_tiles", {"N": 3, "F": 300}),
    Case("extremes", {"N": 4, "F": 24}, {"extremes": True}),
    *(
        Case(f"gpt2_{name}", {"N": 16384, "F": 4 * C}, large=True)
        for name, C in {"124m": 768, "350m": 1024, "774m": 1280, "1558m": 1600}.items()
    ),
)


def inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(axes(case), generator=generator) * 2.0
    if case.options.get("extremes"):
        x.view(-1)[: len(EXTREMES)] = torch.tensor(EXTREMES)
    return {"x": x.to(device, dtype).requires_grad_()}


def axes(case: Case) -> tuple[int, ...]:
    """The shape of x."""
    return tuple(case.shape[letter] for letter in ("B", "T", "N", "F") if letter in case.shape)


def exact_zeros(case: Case, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Negative inputs give nothing, forward and backward."""
    return {"output": arguments["x"].detach() <= 0, "gradient of x": arguments["x"].detach() <= 0}


def flops(case: Case) -> int:
    """2 per element: compare, square."""
    return 2 * math.prod(axes(case))


def flops_backward(case: Case) -> int:
    """3 per element: compare, 2·max(x, 0), times dy."""
    return 3 * math.prod(axes(case))


def bytes(case: Case, dtype: torch.dtype) -> int:
    """Read x, write y."""
    return 2 * dtype.itemsize * math.prod(axes(case))


def bytes_backward(case: Case, dtype: torch.dtype) -> int:
    """Read x and dy, write dx."""
    return 3 * dtype.itemsize * math.prod(axes(case))


BUDGETS = (Budget("_unary_*", registers=64, threads=1024, needs=("wide loads", "wide stores")),)
