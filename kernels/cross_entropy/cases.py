"""Cases of cross_entropy. N rows · V real vocabulary · Vp padded vocabulary (columns of the logits).

Options: the op's own; ignored (0.0): the share of rows whose target is ignore_index; spread (2.0): of the logits; huge:
logits of ±10⁴, of ±6·10⁴ in fp16; minus_infinity (0.0): the share of logits that are -∞, never a target's.
"""

from typing import Any

import torch

from tritium.kernels.case import Budget, Case, Goal

CASES = (
    Case("tiny", {"N": 3, "V": 5, "Vp": 5}),
    Case("one_class", {"N": 2, "V": 1, "Vp": 1}),
    Case("no_rows", {"N": 0, "V": 7, "Vp": 8}),
    Case("odd", {"N": 7, "V": 33, "Vp": 33}),
    Case("padded", {"N": 6, "V": 50, "Vp": 64}),
    Case("one_padded_column", {"N": 4, "V": 127, "Vp": 128}),
    Case("ignored", {"N": 12, "V": 40, "Vp": 48}, {"ignored": 0.4}),
    Case("all_ignored", {"N": 3, "V": 9, "Vp": 16}, {"ignored": 1.0}),
    Case("other_ignore_index", {"N": 8, "V": 20, "Vp": 20}, {"ignored": 0.5, "ignore_index": -1}),
    Case("ignore_index_in_range", {"N": 8, "V": 20, "Vp": 24}, {"ignored": 0.3, "ignore_index": 0}),
    Case("smoothing", {"N": 5, "V": 60, "Vp": 64}, {"label_smoothing": 0.1}),
    Case("z_loss", {"N": 5, "V": 61, "Vp": 61}, {"z_loss": 1e-2}),
    Case("softcap", {"N": 5, "V": 62, "Vp": 64}, {"softcap": 15.0}),
    Case("everything", {"N": 10, "V": 100, "Vp": 104},
         {"ignored": 0.2, "label_smoothing": 0.05, "z_loss": 1e-3, "softcap": 30.0}),
    Case("large_logits", {"N": 4, "V": 30, "Vp": 32}, {"spread": 60.0}),
    Case("huge_logits", {"N": 6, "V": 30, "Vp": 32}, {"huge": True}),
    Case("huge_and_more", {"N": 6, "V": 30, "Vp": 32}, {"huge": True, "softcap": 30.0, "label_smoothing": 0.1}),
    Case("minus_infinity", {"N": 6, "V": 40, "Vp": 48}, {"minus_infinity": 0.5, "z_loss": 1e-3}),
    Case("first_tile_minus_infinity", {"N": 3, "V": 5003, "Vp": 5056}, {"minus_infinity": 0.9999}),
    Case("sum", {"N": 7, "V": 33, "Vp": 40}, {"reduction": "sum"}),
    Case("mean", {"N": 9, "V": 20, "Vp": 24}, {"reduction": "mean", "ignored": 0.4}),
    Case("sum_no_rows", {"N": 0, "V": 7, "Vp": 8}, {"reduction": "sum"}),
    Case("mean_no_rows", {"N": 0, "V": 7, "Vp": 8}, {"reduction": "mean"}),
    Case("mean_all_ignored", {"N": 3, "V": 9, "Vp": 16}, {"reduction": "mean", "ignored": 1.0}),
    Case("sum_one_class", {"N": 2, "V": 1, "Vp": 1}, {"reduction": "sum"}),
    Case("sum_minus_infinity", {"N": 4, "V": 40, "Vp": 48}, {"reduction": "sum", "minus_infinity": 0.5}),
    Case("sum_several_tiles", {"N": 3, "V": 5003, "Vp": 5056}, {"reduction": "sum", "ignored": 0.34}),
    *(
        Case(f"everything_{reduction}", {"N": 8, "V": 50, "Vp": 56},
             {"ignored": 0.3, "ignore_index": -1, "label_smoothing": 0.05, "z_loss": 1e-3, "softcap": 30.0,
              "reduction": reduction})
        for reduction in ("none", "sum", "mean")
    ),
    Case("several_tiles", {"N": 3, "V": 5003, "Vp": 5056}, {"ignored": 0.34}),
    Case("gpt2_1k", {"N": 1024, "V": 50257, "Vp": 50304}, large=True),
    Case("gpt2_16k", {"N": 16384, "V": 50257, "Vp": 50304}, large=True),
    Case("gpt2_16k_sum", {"N": 16384, "V": 50257, "Vp": 50304}, {"reduction": "sum"}, large=True),
    Case("llama3", {"N": 8192, "V": 128256, "Vp": 128256}, large=True),
)  # fmt: skip
NOT_ARGUMENTS = ("ignored", "spread", "huge", "minus_infinity")


def inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    N, V, Vp = (case.shape[letter] for letter in ("N", "V", "Vp"))
    logits = torch.randn(N, Vp, generator=generator) * case.options.get("spread", 2.0)
    logits[:, V:] += 20.0  # padding that would win, were it read
    logits[1::2, V - 1] += 8.0  # the last real column decides every second row: a dropped tail shows
    if case.options.get("huge"):
        logits = torch.sign(logits) * (6e4 if dtype == torch.float16 else 1e4) + logits
    targets = targets_of(case, generator)
    if share := case.options.get("minus_infinity", 0.0):
        drop = torch.rand(N, Vp, generator=generator) < share
        drop &= torch.arange(Vp) != torch.where(targets < 0, 0, targets)[:, None]
        logits = torch.where(drop, -torch.inf, logits)
    return {
        "logits": logits.to(device, dtype).requires_grad_(),
        "targets": targets.to(device),
        "vocab_size": V,
        **{name: value for name, value in case.options.items() if name not in NOT_ARGUMENTS},
    }


def targets_of(case: Case, generator: torch.Generator) -> torch.Tensor:
    """Random targets that include the last class, with the case's share of ignored rows."""
    N, V, ignore_index = case.shape["N"], case.shape["V"], case.options.get("ignore_index", -100)
    made = torch.randint(0, V, (N,), generator=generator)
    made[2::3] = V - 1
    ignored = torch.rand(N, generator=generator) < case.options.get("ignored", 0.0)
    return torch.where(ignored, ignore_index, made)


def exact_zeros(case: Case, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Where the reference defines zeros: the loss and gradient of ignored rows, the gradient of padding."""
    ignored = arguments["targets"] == case.options.get("ignore_index", -100)
    padding = torch.arange(case.shape["Vp"], device=ignored.device) >= case.shape["V"]
    zeros = {"gradient of logits": ignored[:, None] | padding}
    return zeros if case.options.get("reduction", "none") != "none" else {"output": ignored, **zeros}


def flops(case: Case) -> int:
    """5 per logit: maximum, subtract, exponential, add, and the scaling of a running sum."""
    return 5 * case.shape["N"] * case.shape["V"]


def flops_backward(case: Case) -> int:
    """4 per logit: subtract, exponential, subtract the target, scale."""
    return 4 * case.shape["N"] * case.shape["V"]


def bytes(case: Case, dtype: torch.dtype) -> int:
    """Read the real logits and the targets, write a loss per row."""
    return case.shape["N"] * (case.shape["V"] * dtype.itemsize + 8 + 4)


def bytes_backward(case: Case, dtype: torch.dtype) -> int:
    """Read the real logits, write all of their gradient (padding gets zeros); the targets and upstream gradient. Of a
    reduced loss only write the gradient: the pass that makes the loss can make it too."""
    again = case.options.get("reduction", "none") == "none"
    return case.shape["N"] * ((case.shape["V"] * again + case.shape["Vp"]) * dtype.itemsize + 8 + 4)


BUDGETS = (
    Budget("_forward", registers=64, threads=1024, needs=("wide loads",)),
    Budget("_backward", registers=64, threads=1024, needs=("wide loads", "wide stores")),
    Budget("_forward_backward", registers=64, threads=1024, needs=("wide loads", "wide stores")),
    Budget("_scale", registers=64, threads=1024, needs=("wide loads", "wide stores")),
)
GOALS = (
    Goal("*_sum", "forward", 0.95, "of copy", "7.96 ms at 8192 × 131072 (Liger)"),  # the gradient is made here
    *(Goal(name, "forward", 0.97, "of copy", "3.0–3.18 TB/s (quack)") for name in ("gpt2_1k", "gpt2_16k", "llama3")),
    *(Goal(name, "backward", 0.95, "of copy") for name in ("gpt2_1k", "gpt2_16k", "llama3")),
)
