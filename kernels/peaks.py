"""What a GPU can do at best, and so the least time that an op can take on it: its roofline.

A forecast is arithmetic on ``cases.py`` (the work that must be done once) and on the figures below. Nothing in it has
run: it says what to hold a measurement against.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass

import torch

from tritium.kernels.case import Case, Goal
from tritium.kernels.op import Op

# base-2 exponentials that a processor does in a clock, 8.0 to 10.0 (CUDA C++ programming guide, arithmetic throughput)
EXPONENTIALS_PER_CLOCK = 16
# the ops whose FLOPs are products of matrices; the others' are done outside the tensor cores
ON_TENSOR_CORES = ("attention", "attention_lse", "linear", "linear_cross_entropy")


@dataclass(frozen=True)
class Peak:
    """One GPU. matrix: dense bf16 FLOP/s with sums in fp32. vector: fp32 FLOP/s outside the tensor cores. bandwidth:
    bytes/s of its memory. clock: Hz at which ``matrix`` holds. All of these from ``source``.

    measured_matrix, measured_copy: FLOP/s of a large bf16 product of random data, bytes/s that a device copy reads and
    writes; None where nobody has measured. ``measured`` says how.
    """

    name: str
    arch: str
    matrix: float
    vector: float
    bandwidth: float
    processors: int
    clock: float
    source: str
    measured_matrix: float | None = None
    measured_copy: float | None = None
    measured: str = ""

    def same_matrix(self, name: str) -> bool:
        """Whether the board of this name multiplies as fast. The PCIe and NVL boards of Hopper are slower ones."""
        return self.name.startswith("A100") or not re.search("pcie|nvl", name, re.IGNORECASE)

    def same_memory(self, name: str) -> bool:
        """Whether the board of this name has this memory, not another (A100: 40 GB, and on PCIe, are slower)."""
        return not re.search("pcie|nvl|40GB", name, re.IGNORECASE)

    @property
    def exponentials(self) -> float:
        """Of all processors together, in a second."""
        return EXPONENTIALS_PER_CLOCK * self.processors * self.clock

    @property
    def reached_matrix(self) -> float:
        """What a large product reaches: measured, else the datasheet's."""
        return self.measured_matrix or self.matrix

    @property
    def reached_copy(self) -> float:
        """What a copy reaches: measured, else the datasheet's bandwidth."""
        return self.measured_copy or self.bandwidth


A100 = Peak(
    "A100 SXM 80 GB", "sm_80", 312e12, 19.5e12, 2.039e12, 108, 1.41e9,
    "NVIDIA A100 Tensor Core GPU datasheet (2021); clock and processors: A100 architecture whitepaper",
)  # fmt: skip
H100 = Peak(
    "H100 SXM 80 GB", "sm_90", 989.4e12, 67e12, 3.35e12, 132, 1.83e9,
    "NVIDIA H100 Tensor Core GPU datasheet (2023); clock: that at which 132 × 4096 FLOP make the 989.4 TFLOP/s",
    798e12, 3.0e12, "bf16 product of 8192³ on random data; device copy, bytes read + written",
)  # fmt: skip
H200 = Peak(
    "H200 SXM 141 GB", "sm_90", 989.4e12, 67e12, 4.8e12, 132, 1.83e9,
    "NVIDIA H200 Tensor Core GPU datasheet (2024); processors and clock as the H100's",
)  # fmt: skip
B200 = Peak(
    "B200 SXM 180 GB", "sm_100", 2250e12, 75e12, 8.0e12, 148, 1.856e9,
    "NVIDIA HGX and DGX B200 datasheets (2024), an eighth of the board; clock: that at which 148 × 8192 FLOP make it",
)  # fmt: skip
PEAKS = (A100, H100, H200, B200)


def by_name(name: str) -> Peak | None:
    """The entry whose chip a device's marketing name has as a word ("NVIDIA GH200 480GB" has neither H200 nor H100), or
    None. The board may still be another one: :meth:`Peak.same_memory`, :meth:`Peak.same_matrix`."""
    return next((peak for peak in PEAKS if re.search(rf"\b{peak.name.split()[0]}\b", name)), None)


@dataclass(frozen=True)
class Forecast:
    """The least time of one op on one case, what bounds it, and the goal if there is one. Not a measurement."""

    op: str
    case: str
    what: str
    bound_by: str  # "tensor cores", "arithmetic", "memory" or "exponentials"
    bound_ms: float
    goal: Goal | None
    goal_ms: float | None

    @property
    def goal_over_bound(self) -> float | None:
        """How far above the bound the goal's time lies; below 1 the goal could not be reached."""
        return None if self.goal_ms is None else self.goal_ms / self.bound_ms


def kinds(op: Op) -> tuple[str, ...]:
    """What is forecast of an op: the phases that its goals and its benchmark speak of."""
    if op.updates:
        return ("update",)
    return ("forward", "backward", "forward+backward") if op.has_gradient else ("forward",)


def work(op: Op, case: Case, dtype: torch.dtype, what: str) -> tuple[int, int, int]:
    """(FLOPs, bytes, exponentials) of an ideal kernel; exponentials are 0 where ``cases.py`` does not count them."""
    cases = op.cases
    forward = (cases.flops(case), cases.bytes(case, dtype), getattr(cases, "exponentials", lambda case: 0)(case))
    if what in ("forward", "update"):
        return forward
    again = getattr(cases, "exponentials_backward", lambda case: 0)(case)
    backward = (cases.flops_backward(case), cases.bytes_backward(case, dtype), again)
    if what == "backward":
        return backward
    return forward[0] + backward[0], forward[1] + backward[1], forward[2] + backward[2]


def bound(op: Op, case: Case, dtype: torch.dtype, what: str, peak: Peak) -> tuple[float, str]:
    """(least time in ms, what bounds it): as if arithmetic, memory and exponentials overlapped perfectly."""
    flops, moved, exponentials = work(op, case, dtype, what)
    if op.name in ON_TENSOR_CORES:
        arithmetic = ("tensor cores", flops / peak.reached_matrix)
    else:
        arithmetic = ("arithmetic", flops / peak.vector)
    times = (arithmetic, ("memory", moved / peak.reached_copy), ("exponentials", exponentials / peak.exponentials))
    by, seconds = max(times, key=lambda pair: pair[1])
    return 1e3 * seconds, by


def goal_ms(goal: Goal, flops: int, moved: int, peak: Peak) -> float:
    """The time that a goal asks for."""
    rates = {
        "TFLOP/s": (flops, 1e12),
        "TB/s": (moved, 1e12),
        "of copy": (moved, peak.reached_copy),
        "of GEMM": (flops, peak.reached_matrix),
    }
    if goal.unit not in rates:
        raise ValueError(f"a goal's unit is one of {', '.join(rates)}, not {goal.unit!r}")
    amount, unit = rates[goal.unit]
    return 1e3 * amount / (goal.rate * unit)


def goal_of(op: Op, case: Case, what: str) -> Goal | None:
    """The first goal of the op's ``cases.py`` for this case and phase."""
    goals: tuple[Goal, ...] = getattr(op.cases, "GOALS", ())
    return next((g for g in goals if g.what == what and fnmatch.fnmatch(case.name, g.cases)), None)


def forecast(op: Op, case: Case, peak: Peak = H100, dtype: torch.dtype = torch.bfloat16) -> list[Forecast]:
    """Forward, backward and both (or the update) of one case. Goals are the H100's: another GPU's forecast has none."""
    found = []
    for what in kinds(op):
        goal = goal_of(op, case, what) if peak == H100 and dtype == torch.bfloat16 else None
        if what == "forward+backward" and goal is None:
            continue
        ms, by = bound(op, case, dtype, what, peak)
        flops, moved, _ = work(op, case, dtype, what)
        asked = goal_ms(goal, flops, moved, peak) if goal is not None else None
        found.append(Forecast(op.name, case.name, what, by, ms, goal, asked))
    return found
