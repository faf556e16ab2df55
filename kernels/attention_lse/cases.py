"""Cases of attention_lse: those of attention without dropout. B batch · Tq queries · Tk keys · H query heads ·
G key/value heads · D head width.

Options: attention's but dropout: causal, scale, window, softcap, documents (False; True or "anywhere": rows hold
several documents).
"""

from typing import Any

import torch

from tritium.kernels.attention import cases as attention
from tritium.kernels.case import Case

CASES = tuple(case for case in attention.CASES if not case.options.get("dropout"))

BUDGETS, GOALS = attention.BUDGETS, attention.GOALS
exponentials, exponentials_backward = attention.exponentials, attention.exponentials_backward

inputs = attention.inputs
visible = attention.visible


def exact_zeros(case: Case, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """attention's."""
    masks = attention.exact_zeros(case, arguments)
    return {"output 0": masks.pop("output"), **masks}


def _rows(case: Case) -> int:
    return case.shape["B"] * case.shape["H"] * case.shape["Tq"]


def flops(case: Case) -> int:
    """attention's, and a logarithm and an addition for each query and head."""
    return attention.flops(case) + 2 * _rows(case)


def flops_backward(case: Case) -> int:
    """attention's, and a subtraction for each query and head."""
    return attention.flops_backward(case) + _rows(case)


def bytes(case: Case, dtype: torch.dtype) -> int:
    """attention's, and write lse in fp32."""
    return attention.bytes(case, dtype) + 4 * _rows(case)


def bytes_backward(case: Case, dtype: torch.dtype) -> int:
    """attention's, and read lse and its gradient in fp32."""
    return attention.bytes_backward(case, dtype) + 8 * _rows(case)
