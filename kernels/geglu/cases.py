"""Cases of geglu. N rows (the product of the leading axes) · F width.

Options: the op's own approximate; spread (2.0) of gate.
"""

import math

import torch

from tritium.kernels.case import Case

CASES = (
    Case("one", {"F": 1}),
    Case("no_rows", {"N": 0, "F": 8}),
    Case("odd", {"N": 7, "F": 33}),
    Case("exact", {"N": 5, "F": 65}, {"approximate": "none"}),
    Case("three_axes", {"B": 2, "T": 3, "F": 40}),
    Case("many", {"N": 33, "F": 130}),
    Case("far_tails", {"N": 4, "F": 64}, {"spread": 40.0}),
    Case("far_tails_exact", {"N": 4, "F": 64}, {"spread": 40.0, "approximate": "none"}),
    Case("gpt2_124m", {"N": 16384, "F": 2048}, large=True),
    Case("gpt2_1558m", {"N": 16384, "F": 4352}, large=True),
    Case("llama_8b", {"N": 8192, "F": 14336}, large=True),
)


def inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    gate = torch.randn(axes(case), generator=generator) * case.options.get("spread", 2.0)
    up = torch.randn(axes(case), generator=generator)
    return {
        "gate": gate.to(device, dtype).requires_grad_(),
        "up": up.to(device, dtype).requires_grad_(),
        "approximate": case.options.get("approximate", "tanh"),
    }


def axes(case: Case) -> tuple[int, ...]:
    """The shape of gate and up."""
    return tuple(case.shape[letter] for letter in ("B", "T", "N", "F") if letter in case.shape)


def flops(case: Case) -> int:
    """gelu's 8 per element, and the product."""
    return 9 * math.prod(axes(case))


def flops_backward(case: Case) -> int:
    """gelu's 14 per element, gelu once more for dup, and three products."""
    return 18 * math.prod(axes(case))


def bytes(case: Case, dtype: torch.dtype) -> int:
    """Read gate and up, write y."""
    return 3 * dtype.itemsize * math.prod(axes(case))


def bytes_backward(case: Case, dtype: torch.dtype) -> int:
    """Read gate, up and dy, write dgate and dup."""
    return 5 * dtype.itemsize * math.prod(axes(case))
