"""Cases of adamw. K tensors · P elements of the largest. dtype is that of the working copies and their gradients.

Options: copies (True): there are working copies; fp32_grads (False): gradients in fp32 whatever the copies are;
clip (1.0): grad_scale; skip (0): the step that is skipped, its gradients not finite; empty (False): one tensor has no
elements; moments ("fp32"): what they are kept in, fp32 or bf16; and the op's own beta1, beta2, eps, weight_decay.
"""

import torch

from tritium.kernels.case import Budget, Case, Goal

STEPS = 4  # the contract runs this many, each from the state the one before left
CASES = (
    Case("one_element", {"K": 1, "P": 1}),
    Case("no_tensors", {"K": 0, "P": 0}),
    Case("empty_tensor", {"K": 3, "P": 12}, {"empty": True}),
    Case("odd", {"K": 5, "P": 131}, {"weight_decay": 0.1}),
    Case("no_copies", {"K": 3, "P": 70}, {"copies": False, "weight_decay": 0.1}),
    Case("fp32_grads", {"K": 2, "P": 65}, {"fp32_grads": True}),
    Case("clipped", {"K": 3, "P": 90}, {"clip": 0.37, "weight_decay": 0.01}),
    Case("skipped", {"K": 3, "P": 64}, {"skip": 2, "weight_decay": 0.1}),
    Case("first_skipped", {"K": 2, "P": 33}, {"skip": 1, "clip": 0.5}),
    Case("other_betas", {"K": 2, "P": 50}, {"beta1": 0.8, "beta2": 0.999, "eps": 1e-6}),
    Case("beta1", {"K": 1, "P": 20}, {"beta1": 0.8, "weight_decay": 0.1}),
    Case("beta2", {"K": 1, "P": 20}, {"beta2": 0.999, "weight_decay": 0.1}),
    Case("eps", {"K": 1, "P": 20}, {"eps": 1e-3, "weight_decay": 0.1}),
    Case("several_tiles", {"K": 2, "P": 70_000}, {"weight_decay": 0.1, "clip": 0.9}),
    Case("bf16_moments", {"K": 3, "P": 131}, {"moments": "bf16", "weight_decay": 0.1}),
    Case("bf16_moments_large", {"K": 2, "P": 10_000}, {"moments": "bf16", "skip": 2, "clip": 0.37, "beta2": 0.999}),
    *(Case(f"gpt2_{name}", {"K": K, "P": P}, {"weight_decay": 0.1}, large=True) for name, K, P in
      (("124m", 148, 50304 * 768), ("1558m", 580, 50304 * 1600))),
)  # fmt: skip
NOT_ARGUMENTS = ("copies", "fp32_grads", "clip", "skip", "empty", "moments")
MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def shapes(case: Case) -> list[tuple[int, ...]]:
    """A matrix of P elements when P is even, then vectors, each of a different length."""
    K, P = case.shape["K"], case.shape["P"]
    found: list[tuple[int, ...]] = [
        (2, P // 2) if P % 2 == 0 else (P,),
        *((max(P // (i + 1), 1),) for i in range(1, K)),
    ]
    if case.options.get("empty"):
        found[1] = (0,)
    return found[:K]


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0, step: int = 1
) -> dict[str, object]:
    """The arguments of step ``step`` (from 1): the state is that before the first step, the rest is this step's."""
    options = case.options
    start = torch.Generator().manual_seed(seed)
    params = [torch.randn(s, generator=start).to(device) for s in shapes(case)]
    now = torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)
    grads = [torch.randn(s, generator=now).to(device, dtype) for s in shapes(case)]
    if options.get("fp32_grads"):
        grads = [g.float() for g in grads]
    skipped = options.get("skip", 0) == step
    if skipped:
        grads = [
            torch.where(torch.arange(g.numel(), device=device).reshape(g.shape) % 3 == 0, torch.nan, g) for g in grads
        ]
    wide = torch.promote_types(dtype, torch.float32)
    moments = MOMENTS[str(options.get("moments", "fp32"))]
    moments = wide if moments == torch.float32 else moments

    def scalar(value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float32, device=device)

    return {
        "params": [p.to(wide) for p in params],
        "copies": [p.to(dtype) for p in params] if options.get("copies", True) else [],
        "grads": grads,
        "exp_avgs": [torch.zeros_like(p, dtype=moments) for p in params],
        "exp_avg_sqs": [torch.zeros_like(p, dtype=moments) for p in params],
        "lr": scalar(0.01 / step),
        "step": scalar(step),
        "grad_scale": scalar(options.get("clip", 1.0)),
        "skip": scalar(2.0 if skipped else 0.0),
        **{name: value for name, value in options.items() if name not in NOT_ARGUMENTS},
    }


def _elements(case: Case) -> int:
    return sum(torch.Size(s).numel() for s in shapes(case))


def flops(case: Case) -> int:
    """15 per element: scale 1, m 3, v 4, denominator 3, update 4."""
    return 15 * _elements(case)


def flops_backward(case: Case) -> int:
    """None: an update has no backward."""
    return 0


def bytes(case: Case, dtype: torch.dtype) -> int:
    """Read and write master and two moments, read the gradient, write the copy."""
    grad = 4 if case.options.get("fp32_grads") else dtype.itemsize
    copy = dtype.itemsize if case.options.get("copies", True) else 0
    moment = MOMENTS[str(case.options.get("moments", "fp32"))].itemsize
    return (8 + 4 * moment + grad + copy) * _elements(case)


def bytes_backward(case: Case, dtype: torch.dtype) -> int:
    """None: an update has no backward."""
    return 0


BUDGETS = (Budget("_update", registers=64, threads=1024, needs=("wide loads", "wide stores")),)
GOALS = (Goal("*", "update", 2.85, "TB/s"),)
