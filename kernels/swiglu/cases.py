"""Cases of swiglu. N rows (the product of the leading axes) · F width. Options: spread (2.0) of gate."""

import math

import torch

from tritium.kernels.case import Case, Goal

CASES = (
    Case("one", {"F": 1}),
    Case("no_rows", {"N": 0, "F": 8}),
    Case("odd", {"N": 7, "F": 33}),
    Case("three_axes", {"B": 2, "T": 3, "F": 40}),
    Case("many", {"N": 33, "F": 130}),
    Case("far_tails", {"N": 4, "F": 64}, {"spread": 60.0}),
    Case("gpt2_124m", {"N": 16384, "F": 2048}, large=True),
    Case("gpt2_1558m", {"N": 16384, "F": 4352}, large=True),
    Case("llama_8b", {"N": 8192, "F": 14336}, large=True),
)


def inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    gate = torch.randn(axes(case), generator=generator) * case.options.get("spread", 2.0)
    up = torch.randn(axes(case), generator=generator)
    return {"gate": gate.to(device, dtype).requires_grad_(), "up": up.to(device, dtype).requires_grad_()}


def axes(case: Case) -> tuple[int, ...]:
    """The shape of gate and up."""
    return tuple(case.shape[letter] for letter in ("B", "T", "N", "F") if letter in case.shape)


def flops(case: Case) -> int:
    """5 per element: exponential, add, divide, and two products."""
    return 5 * math.prod(axes(case))


def flops_backward(case: Case) -> int:
    """10 per element: the sigmoid 3, silu 1, its derivative 3, and three products."""
    return 10 * math.prod(axes(case))


def bytes(case: Case, dtype: torch.dtype) -> int:
    """Read gate and up, write y."""
    return 3 * dtype.itemsize * math.prod(axes(case))


def bytes_backward(case: Case, dtype: torch.dtype) -> int:
    """Read gate, up and dy, write dgate and dup."""
    return 5 * dtype.itemsize * math.prod(axes(case))


GOALS = (
    Goal("*", "forward", 3.0, "TB/s", "3.05 TB/s (Liger)"),
    Goal("*", "backward", 2.85, "TB/s", "1.94 TB/s (Liger)"),
)
