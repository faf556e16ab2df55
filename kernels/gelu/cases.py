"""Cases of gelu. N rows (the product of the leading axes) · F width.

Options: the op's own approximate; spread (2.0) of x; extremes (False): EXTREMES are among its values.
"""

import math

import torch

from tritium.kernels.case import Budget, Case

# either side of where an exponential overflows or a term vanishes, and far beyond
EXTREMES = (1e4, -1e4, 300.0, -300.0, 90.0, -90.0, 33.0, -33.0, 12.0, -12.0, 5.5, -5.5, 1e-4, -1e-4, 0.0, -0.0)

CASES = (
    Case("one", {"F": 1}),
    Case("scalar", {}),
    Case("no_rows", {"N": 0, "F": 8}),
    Case("odd", {"N": 7, "F": 33}),
    Case("exact", {"N": 5, "F": 65}, {"approximate": "none"}),
    Case("three_axes", {"B": 2, "T": 3, "F": 40}),
    Case("vector_exact", {"F": 30}, {"approximate": "none"}),
    Case("several_tiles", {"N": 3, "F": 300}),
    Case("far_tails", {"N": 4, "F": 64}, {"spread": 40.0}),
    Case("far_tails_exact", {"N": 4, "F": 64}, {"spread": 40.0, "approximate": "none"}),
    Case("extremes", {"N": 4, "F": 24}, {"extremes": True, "spread": 40.0}),
    Case("extremes_exact", {"N": 4, "F": 24}, {"extremes": True, "approximate": "none"}),
    *(
        Case(f"gpt2_{name}", {"N": 16384, "F": 4 * C}, large=True)
        for name, C in {"124m": 768, "350m": 1024, "774m": 1280, "1558m": 1600}.items()
    ),
)


def inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(axes(case), generator=generator) * case.options.get("spread", 2.0)
    if case.options.get("extremes"):
        x.view(-1)[: len(EXTREMES)] = torch.tensor(EXTREMES)
    return {"x": x.to(device, dtype).requires_grad_(), "approximate": case.options.get("approximate", "tanh")}


def axes(case: Case) -> tuple[int, ...]:
    """The shape of x."""
    return tuple(case.shape[letter] for letter in ("B", "T", "N", "F") if letter in case.shape)


def flops(case: Case) -> int:
    """8 per element: the cubic 4, tanh (or erf) 1, and 3 around it."""
    return 8 * math.prod(axes(case))


def flops_backward(case: Case) -> int:
    """14 per element: the forward's 5 again, the derivative 8, times dy."""
    return 14 * math.prod(axes(case))


def bytes(case: Case, dtype: torch.dtype) -> int:
    """Read x, write y."""
    return 2 * dtype.itemsize * math.prod(axes(case))


def bytes_backward(case: Case, dtype: torch.dtype) -> int:
    """Read x and dy, write dx."""
    return 3 * dtype.itemsize * math.prod(axes(case))


BUDGETS = (Budget("_unary_*", registers=64, threads=1024, needs=("wide loads", "wide stores")),)
