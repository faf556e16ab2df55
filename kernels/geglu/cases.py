"""Cases of geglu. N rows (the product of the leading axes) · F width.

Options: the op's own approximate; swiglu's spread, extremes and packed.
"""

import math

import torch

from tritium.kernels.case import Case
from tritium.kernels.swiglu import cases as swiglu
from tritium.kernels.swiglu.cases import BUDGETS, axes, bytes, bytes_backward

__all__ = ["BUDGETS", "CASES", "axes", "bytes", "bytes_backward", "flops", "flops_backward", "inputs"]

CASES = (
    Case("one", {"F": 1}),
    Case("scalar", {}),
    Case("no_rows", {"N": 0, "F": 8}),
    Case("odd", {"N": 7, "F": 33}),
    Case("exact", {"N": 5, "F": 65}, {"approximate": "none"}),
    Case("three_axes", {"B": 2, "T": 3, "F": 40}),
    Case("many", {"N": 33, "F": 130}),
    Case("far_tails", {"N": 4, "F": 64}, {"spread": 40.0}),
    Case("far_tails_exact", {"N": 4, "F": 64}, {"spread": 40.0, "approximate": "none"}),
    Case("several_tiles", {"N": 3, "F": 300}),
    Case("packed", {"N": 9, "F": 48}, {"packed": True}),
    Case("packed_odd", {"B": 2, "T": 3, "F": 33}, {"packed": True, "spread": 40.0}),
    Case("packed_exact", {"N": 5, "F": 40}, {"packed": True, "approximate": "none"}),
    Case("extremes", {"N": 4, "F": 24}, {"extremes": True, "spread": 40.0}),
    Case("extremes_exact", {"N": 4, "F": 24}, {"extremes": True, "approximate": "none"}),
    Case("packed_extremes", {"N": 4, "F": 24}, {"extremes": True, "packed": True}),
    Case("gpt2_124m", {"N": 16384, "F": 2048}, {"packed": True}, large=True),
    Case("gpt2_1558m", {"N": 16384, "F": 4352}, {"packed": True}, large=True),
    Case("llama_8b", {"N": 8192, "F": 14336}, {"packed": True}, large=True),
)


def inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, object]:
    return {
        **swiglu.inputs(case, dtype, device, seed),
        "approximate": case.options.get("approximate", "tanh"),
    }


def flops(case: Case) -> int:
    """gelu's 8 per element, and the product."""
    return 9 * math.prod(axes(case))


def flops_backward(case: Case) -> int:
    """gelu's 14 per element, gelu once more for dup, and three products."""
    return 18 * math.prod(axes(case))
