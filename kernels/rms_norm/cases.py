"""Cases of rms_norm. N rows (the product of the leading axes) · C width.

Options: weight (True): whether there is one; wide (False): the weight in fp32 beside a narrower x; eps. Values of x:
scale (2) times randn, zero_rows (False): every second row is 0.
"""

import math

import torch

from tritium.kernels.case import Case, Goal
from tritium.kernels.layer_norm import cases as layer_norm

CASES = (
    Case("one_row", {"N": 1, "C": 16}),
    # at a small eps the gradient of x is nothing but what rounding leaves of r·(g - g·x̂²)
    Case("one_column", {"N": 5, "C": 1}, {"eps": 0.1}),
    Case("no_rows", {"N": 0, "C": 24}),
    Case("odd", {"N": 7, "C": 33}),
    Case("no_weight", {"N": 9, "C": 65}, {"weight": False}),
    Case("wide_weight", {"N": 6, "C": 40}, {"wide": True}),
    Case("three_axes", {"B": 2, "T": 3, "C": 48}),
    Case("heads", {"B": 2, "T": 3, "N": 4, "C": 64}),
    Case("heads_no_weight", {"B": 1, "T": 5, "N": 3, "C": 32}, {"weight": False, "eps": 1e-6}),
    Case("vector", {"C": 20}),
    Case("large_eps", {"N": 4, "C": 12}, {"eps": 0.1}),
    Case("many_rows", {"N": 2569, "C": 8}),
    Case("gpt2_width", {"N": 4, "C": 768}),
    Case("zero_rows", {"N": 6, "C": 40}, {"zero_rows": True}),
    Case("large_values", {"N": 5, "C": 72}, {"scale": 1e4}),
    Case("small_values", {"N": 5, "C": 72}, {"scale": 1e-4}),
    Case("tiny_values", {"N": 5, "C": 72}, {"scale": 1e-20}),
    Case("no_weight_zero_rows", {"N": 5, "C": 31}, {"weight": False, "zero_rows": True}),
    Case("wide_large_eps", {"N": 5, "C": 50}, {"wide": True, "eps": 0.1}),
    Case("wide_zero_rows", {"N": 5, "C": 56}, {"wide": True, "zero_rows": True}),
    Case("large_eps_zero_rows", {"N": 5, "C": 34}, {"eps": 0.1, "zero_rows": True}),
    Case("everything", {"B": 2, "T": 5, "C": 100}, {"wide": True, "eps": 0.1, "zero_rows": True}),
    Case("no_weight_everything", {"B": 2, "T": 5, "C": 100}, {"weight": False, "eps": 0.1, "zero_rows": True}),
    Case("huge_width", {"N": 1, "C": 66001}),
    *(Case(f"width_{C}", {"N": N, "C": C}, large=True) for N, C in
      ((16384, 768), (16384, 1024), (16384, 1280), (16384, 1600), (8192, 4096), (8192, 8192))),
    Case("longest_rows", {"N": 1024, "C": 65536}, large=True),
    Case("qk_norm", {"B": 16, "T": 1024, "N": 12, "C": 64}, {"weight": False}, large=True),
)  # fmt: skip


def inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    C, options = case.shape["C"], case.options
    x = values(torch.randn(*leading(case), C, generator=generator), case)
    weight = torch.randn(C, generator=generator) + 1.0
    weight_dtype = torch.promote_types(dtype, torch.float32) if options.get("wide") else dtype
    return {
        "x": x.to(device, dtype).requires_grad_(),
        "weight": weight.to(device, weight_dtype).requires_grad_() if options.get("weight", True) else None,
        "eps": options.get("eps", 1e-5),
    }


def values(x: torch.Tensor, case: Case) -> torch.Tensor:
    """x with the scale that the case asks for, and zeros in every second row where it does."""
    x = x * case.options.get("scale", 2.0)
    if case.options.get("zero_rows"):
        x.view(-1, x.shape[-1])[::2] = 0.0
    return x


def leading(case: Case) -> tuple[int, ...]:
    """The axes before C."""
    return tuple(case.shape[letter] for letter in ("B", "T", "N") if letter in case.shape)


def _elements(case: Case) -> int:
    return math.prod(leading(case)) * case.shape["C"]


def flops(case: Case) -> int:
    """4 per element: square, add, normalise, scale."""
    return 4 * _elements(case)


def flops_backward(case: Case) -> int:
    """10 per element: x̂ 1, dy·w 1, its product with x̂ 2, dx 4, dweight 2."""
    return 10 * _elements(case)


def bytes(case: Case, dtype: torch.dtype) -> int:
    """Read x and weight, write y."""
    return 2 * dtype.itemsize * _elements(case) + _weight(case, dtype)


def bytes_backward(case: Case, dtype: torch.dtype) -> int:
    """Read x, dy and weight, write dx and dweight."""
    return 3 * dtype.itemsize * _elements(case) + 2 * _weight(case, dtype)


def _weight(case: Case, dtype: torch.dtype) -> int:
    if not case.options.get("weight", True):
        return 0
    return case.shape["C"] * (4 if case.options.get("wide") else dtype.itemsize)


BANNED = {("not weight", "weights of another dtype"): "without a weight there is none that could have another dtype"}
BUDGETS = layer_norm.BUDGETS  # the same kernels
GOALS = (
    Goal("width_[48]*", "forward", 0.98, "of copy", "2.9–3.02 TB/s (quack)"),
    Goal("width_*", "forward", 2.75, "TB/s", "2.46–2.75 TB/s (quack)"),
    Goal("width_*", "backward", 2.7, "TB/s", "1.1–1.4 TB/s (Liger, torch)"),
)
