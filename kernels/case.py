"""A case: one named set of shapes and options of an op, shared by tests, ahead-of-time checks and benchmarks.

Every op folder has a ``cases.py`` with

    CASES: tuple[Case, ...]
    inputs(case, dtype, device, seed) -> dict[str, object]    arguments by the reference's parameter names; floating
                                                              tensors that take a gradient have requires_grad set
    flops(case) -> int, flops_backward(case) -> int           multiply-adds count two
    bytes(case, dtype) -> int, bytes_backward(case, dtype)    what an ideal kernel must read and write, once
    exact_zeros(case, arguments) -> dict[str, Tensor]         optional: by output or "gradient of NAME", a mask of the
                                                              elements that are exactly zero (padding, ignored rows)

An update op (the optimizer's) has STEPS, and its inputs() takes step=1 … STEPS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """name: unique in its op. shape: sizes by letter.

    options: what a call site says of itself: non-default keyword arguments of the op, and facts about its tensors
        (documents, bias, wide, ...: the op's cases.py lists them).
    large: a shape that matters on a GPU (benchmarks, ahead-of-time compilation), too large for the interpreter.
    """

    name: str
    shape: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=dict)
    large: bool = False

    def __str__(self) -> str:
        return self.name
