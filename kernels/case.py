"""A case: one named set of shapes and options of an op, shared by tests, ahead-of-time checks and benchmarks.

Every op folder has a ``cases.py`` with

    CASES: tuple[Case, ...]
    inputs(case, dtype, device, seed) -> dict[str, object]    arguments by the reference's parameter names; floating
                                                              tensors that take a gradient have requires_grad set
    flops(case) -> int, flops_backward(case) -> int           multiply-adds count two
    bytes(case, dtype) -> int, bytes_backward(case, dtype)    what an ideal kernel must read and write, once
    exact_zeros(case, arguments) -> dict[str, Tensor]         optional: by output or "gradient of NAME", a mask of the
                                                              elements that are exactly zero (padding, ignored rows)

An update op (the optimizer's) has STEPS, and its inputs() takes step=1 … STEPS. One that mutates what stands for
numbers in fewer bits has unpacked(arguments) -> arguments: the same with the numbers.
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


@dataclass(frozen=True)
class Budget:
    """What a Triton kernel may take when it is compiled ahead of time, in 16 bits. An op's ``cases.py`` may have
    ``BUDGETS``, a tuple of these; all that match a kernel hold for it.

    kernel, arch, cases: patterns (fnmatch) over the kernel's name, the architecture and the name of the case.
    registers: at most, a thread. threads: at least, resident on one processor at a time: with fewer, the memory's
        latency shows. needs: instructions that must be there, of ``tensor core`` (this architecture's own kind),
        ``tma``, ``wide loads`` and ``wide stores`` (16 bytes a thread).
    fixed: its tile stands in the launcher, as numbers; every other kernel must be launched with what the module's
        ``config(...)`` returned.
    """

    kernel: str
    registers: int = 255
    threads: int = 0
    needs: tuple[str, ...] = ()
    arch: str = "*"
    cases: str = "*"
    fixed: bool = False


@dataclass(frozen=True)
class Goal:
    """A speed to reach on one H100 SXM in bf16. An op's ``cases.py`` may have ``GOALS``, a tuple of these; the first
    that matches holds.

    cases: a pattern (fnmatch) over names. what: ``forward``, ``backward``, ``forward+backward`` or ``update``.
    rate: of cases.flops or cases.bytes, in ``unit``: ``TFLOP/s``, ``TB/s``, ``of copy`` (a fraction of what a device
    copy reads and writes), or ``of GEMM`` (a fraction of what a large matrix product does).
    best: the best that is published, and whose it is.
    """

    cases: str
    what: str
    rate: float
    unit: str
    best: str = ""
