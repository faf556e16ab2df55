"""Cases of embedding. B batch · T time · N rows · V rows of the table · C width.

Options: distinct (0: any) ids, how many; zipf (False): id i about as often as 1/(i + 1), as the tokens of a text are.
"""

import math
from typing import Any

import torch

from tritium.kernels.case import Budget, Case

CASES = (
    Case("one", {"N": 1, "V": 1, "C": 1}),
    Case("no_rows", {"N": 0, "V": 5, "C": 8}),
    Case("odd", {"N": 13, "V": 17, "C": 33}),
    Case("two_axes", {"B": 3, "T": 5, "V": 40, "C": 24}),
    Case("positions", {"T": 12, "V": 16, "C": 20}),
    Case("repeated", {"B": 4, "T": 30, "V": 50, "C": 16}, {"distinct": 3}),
    Case("scalar", {"V": 6, "C": 5}),
    Case("several_tiles", {"N": 9, "V": 21, "C": 300}),
    Case("one_id", {"N": 103, "V": 3, "C": 8}, {"distinct": 1}),
    Case("long_runs", {"B": 2, "T": 55, "V": 5, "C": 24}, {"distinct": 2}),
    Case("text", {"N": 60, "V": 24, "C": 24}, {"zipf": True}),
    *(
        Case(f"gpt2_{name}", {"B": 16, "T": 1024, "V": 50304, "C": C}, large=True)
        for name, C in {"124m": 768, "350m": 1024, "774m": 1280, "1558m": 1600}.items()
    ),
    Case("gpt2_124m_text", {"B": 16, "T": 1024, "V": 50304, "C": 768}, {"zipf": True}, large=True),
    Case("gpt2_124m_one_id", {"B": 16, "T": 1024, "V": 50304, "C": 768}, {"distinct": 1}, large=True),
)


def inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    V, C = case.shape["V"], case.shape["C"]
    if case.options.get("zipf"):
        ids = (V ** torch.rand(_axes(case), generator=generator)).long() - 1
    else:
        ids = torch.randint(0, case.options.get("distinct") or V, _axes(case), generator=generator)
    if ids.numel() > 1:
        ids.view(-1)[-1] = V - 1
    weight = torch.randn(V, C, generator=generator)
    return {"ids": ids.to(device), "weight": weight.to(device, dtype).requires_grad_()}


def _axes(case: Case) -> tuple[int, ...]:
    return tuple(case.shape[letter] for letter in ("B", "T", "N") if letter in case.shape)


def exact_zeros(case: Case, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The gradient of a row that no id names."""
    unused = torch.ones(case.shape["V"], dtype=torch.bool, device=arguments["ids"].device)
    unused[arguments["ids"].flatten()] = False
    return {"gradient of weight": unused[:, None].expand(-1, case.shape["C"])}


def flops(case: Case) -> int:
    """None: a copy."""
    return 0


def flops_backward(case: Case) -> int:
    """One add per element."""
    return math.prod(_axes(case)) * case.shape["C"]


def bytes(case: Case, dtype: torch.dtype) -> int:
    """Read the ids and a row for each, write the rows."""
    N = math.prod(_axes(case))
    return 8 * N + 2 * dtype.itemsize * N * case.shape["C"]


def bytes_backward(case: Case, dtype: torch.dtype) -> int:
    """Read the ids and dy, write the whole gradient of the table."""
    N = math.prod(_axes(case))
    return 8 * N + dtype.itemsize * (N + case.shape["V"]) * case.shape["C"]


BUDGETS = (
    Budget("_gather", registers=48, threads=1024, needs=("wide loads", "wide stores")),
    Budget("_make_keys", registers=64, threads=1024, fixed=True),
    Budget("_find_runs", registers=64, threads=1024, fixed=True),
    Budget("_sum_chunks", registers=64, threads=1024, fixed=True),
    Budget("_sum_runs", registers=64, threads=1024, needs=("wide loads", "wide stores")),
)
