"""Cases of global_norm. K tensors · P elements of the largest.

Options (facts about the tensors): empty (False): one tensor has no elements; scale (1.0): of the elements.
"""

import torch

from tritium.kernels.adamw import cases as adamw
from tritium.kernels.case import Budget, Case, Goal

CASES = (
    Case("one_element", {"K": 1, "P": 1}),
    Case("no_tensors", {"K": 0, "P": 0}),
    Case("empty_tensor", {"K": 3, "P": 12}, {"empty": True}),
    Case("odd", {"K": 5, "P": 131}),
    Case("zeros", {"K": 2, "P": 40}, {"scale": 0.0}),
    Case("small", {"K": 2, "P": 90}, {"scale": 1e-12}),
    Case("large_values", {"K": 2, "P": 90}, {"scale": 1e12}),
    Case("several_tiles", {"K": 3, "P": 70_001}),
    *(Case(f"gpt2_{name}", {"K": K, "P": P}, large=True) for name, K, P in
      (("124m", 148, 50304 * 768), ("1558m", 580, 50304 * 1600))),
)  # fmt: skip


def inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    scale = case.options.get("scale", 1.0)
    shapes = adamw.shapes(case)
    return {"tensors": [(torch.randn(s, generator=generator) * scale).to(device, dtype) for s in shapes]}


def _elements(case: Case) -> int:
    return sum(torch.Size(s).numel() for s in adamw.shapes(case))


def flops(case: Case) -> int:
    """A square and an addition an element."""
    return 2 * _elements(case)


def flops_backward(case: Case) -> int:
    """None: it has no gradient."""
    return 0


def bytes(case: Case, dtype: torch.dtype) -> int:
    """Every element is read once."""
    return dtype.itemsize * _elements(case)


def bytes_backward(case: Case, dtype: torch.dtype) -> int:
    """None: it has no gradient."""
    return 0


BUDGETS = (Budget("_norm", registers=48, threads=1280, needs=("wide loads",)),)
GOALS = (Goal("*", "forward", 2.85, "TB/s"),)
