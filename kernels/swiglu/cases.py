"""Cases of swiglu. N rows (the product of the leading axes) · F width.

Options: spread (2.0) of gate; extremes (False): EXTREMES are among the gate's values; packed (False): gate and up are
the halves of one tensor's rows, as a projection gives them.
"""

import math

import torch

from tritium.kernels.case import Budget, Case, Goal

# either side of where an exponential overflows or a term vanishes, and far beyond
EXTREMES = (1e4, -1e4, 300.0, -300.0, 90.0, -90.0, 33.0, -33.0, 12.0, -12.0, 5.5, -5.5, 1e-4, -1e-4, 0.0, -0.0)

CASES = (
    Case("one", {"F": 1}),
    Case("scalar", {}),
    Case("no_rows", {"N": 0, "F": 8}),
    Case("odd", {"N": 7, "F": 33}),
    Case("three_axes", {"B": 2, "T": 3, "F": 40}),
    Case("many", {"N": 33, "F": 130}),
    Case("far_tails", {"N": 4, "F": 64}, {"spread": 60.0}),
    Case("several_tiles", {"N": 3, "F": 300}),
    Case("packed", {"N": 9, "F": 48}, {"packed": True}),
    Case("packed_odd", {"B": 2, "T": 3, "F": 33}, {"packed": True, "spread": 60.0}),
    Case("extremes", {"N": 4, "F": 24}, {"extremes": True, "spread": 60.0}),
    Case("packed_extremes", {"N": 4, "F": 24}, {"extremes": True, "packed": True}),
    Case("gpt2_124m", {"N": 16384, "F": 2048}, {"packed": True}, large=True),
    Case("gpt2_1558m", {"N": 16384, "F": 4352}, {"packed": True}, large=True),
    Case("llama_8b", {"N": 8192, "F": 14336}, {"packed": True}, large=True),
)


def inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    gate = torch.randn(axes(case), generator=generator) * case.options.get("spread", 2.0)
    up = torch.randn(axes(case), generator=generator)
    if case.options.get("extremes"):
        gate.view(-1)[: len(EXTREMES)] = torch.tensor(EXTREMES)
        up = up.clamp(-2, 2)  # so that the product stays within fp16
    gate, up = gate.to(device, dtype), up.to(device, dtype)
    if case.options.get("packed"):
        gate, up = torch.cat((gate, up), dim=-1).chunk(2, dim=-1)
    return {"gate": gate.detach().requires_grad_(), "up": up.detach().requires_grad_()}


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


BUDGETS = (
    Budget("_gated_forward", registers=64, threads=1024, needs=("wide loads", "wide stores")),
    Budget("_gated_backward", registers=80, threads=768, needs=("wide loads", "wide stores")),
)
GOALS = (
    Goal("*", "forward", 3.0, "TB/s", "3.05 TB/s (Liger)"),
    Goal("*", "backward", 2.85, "TB/s", "1.94 TB/s (Liger)"),
)
