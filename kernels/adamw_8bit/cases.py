"""Cases of adamw_8bit. K tensors · P elements of the largest. Options: those of adamw's cases."""

import torch
from torch import Tensor

from tritium.kernels.adamw import cases as adamw
from tritium.kernels.adamw.cases import NOT_ARGUMENTS, STEPS, _elements, flops, flops_backward, shapes
from tritium.kernels.case import Budget, Case
from tritium.kernels.lib import dynamic_code

__all__ = ["BUDGETS", "CASES", "NOT_ARGUMENTS", "STEPS", "flops", "flops_backward"]
CASES = (
    Case("one_element", {"K": 1, "P": 1}),
    Case("no_tensors", {"K": 0, "P": 0}),
    Case("empty_tensor", {"K": 3, "P": 12}, {"empty": True}),
    Case("odd", {"K": 5, "P": 1031}, {"weight_decay": 0.1}),
    Case("no_copies", {"K": 3, "P": 770}, {"copies": False, "weight_decay": 0.1}),
    Case("fp32_grads", {"K": 2, "P": 515}, {"fp32_grads": True}),
    Case("clipped", {"K": 3, "P": 900}, {"clip": 0.37, "weight_decay": 0.01}),
    Case("skipped", {"K": 3, "P": 640}, {"skip": 2, "weight_decay": 0.1}),
    Case("first_skipped", {"K": 2, "P": 300}, {"skip": 1, "clip": 0.5}),
    Case("other_betas", {"K": 2, "P": 500}, {"beta1": 0.8, "beta2": 0.999, "eps": 1e-6}),
    Case("beta1", {"K": 1, "P": 270}, {"beta1": 0.8, "weight_decay": 0.1}),
    Case("beta2", {"K": 1, "P": 270}, {"beta2": 0.999, "weight_decay": 0.1}),
    Case("eps", {"K": 1, "P": 270}, {"eps": 1e-3, "weight_decay": 0.1}),
    Case("several_tiles", {"K": 2, "P": 20_000}, {"weight_decay": 0.1, "clip": 0.9}),
    *(Case(f"gpt2_{name}", {"K": K, "P": P}, {"weight_decay": 0.1}, large=True) for name, K, P in
      (("124m", 50, 50304 * 768), ("1558m", 194, 50304 * 1600))),
)  # fmt: skip


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0, step: int = 1
) -> dict[str, object]:
    """The arguments of step ``step`` (from 1): the state is that before the first step, the rest is this step's."""
    found = adamw.inputs(case, dtype, device, seed, step)
    zeros = {
        name: [torch.zeros(s, dtype=torch.uint8, device=device) for s in shapes(case)]
        for name in ("exp_avgs", "exp_avg_sqs")
    } | {
        name: [torch.zeros(dynamic_code.blocks(torch.Size(s).numel()), device=device) for s in shapes(case)]
        for name in ("exp_avg_scales", "exp_avg_sq_scales")
    }
    return {**found, **zeros}


def unpacked(arguments: dict[str, object]) -> dict[str, object]:
    """The same with the moments that the codes stand for, and no scales."""
    found = dict(arguments)
    for name, scale, signed in (("exp_avgs", "exp_avg_scales", True), ("exp_avg_sqs", "exp_avg_sq_scales", False)):
        codes: list[Tensor] = arguments[name]  # type: ignore[assignment]
        scales: list[Tensor] = arguments[scale]  # type: ignore[assignment]
        found[name] = [dynamic_code.decode(c, s, signed) for c, s in zip(codes, scales, strict=True)]
        found[scale] = []
    return found


def bytes(case: Case, dtype: torch.dtype) -> int:
    """Read and write master, two codes and a 256th of two scales, read the gradient, write the copy."""
    grad = 4 if case.options.get("fp32_grads") else dtype.itemsize
    copy = dtype.itemsize if case.options.get("copies", True) else 0
    scales = sum(dynamic_code.blocks(torch.Size(s).numel()) for s in shapes(case))
    return (8 + 4 + grad + copy) * _elements(case) + 16 * scales


def bytes_backward(case: Case, dtype: torch.dtype) -> int:
    """None: an update has no backward."""
    return 0


BUDGETS = (Budget("_update_8bit", registers=128, threads=512),)
