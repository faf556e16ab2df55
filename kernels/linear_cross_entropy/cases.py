"""Cases of linear_cross_entropy. N rows · C width · V real vocabulary · Vp padded vocabulary (rows of the weight).

Options: the op's own; master (True): the weight is fp32 whatever x is; ignored (0.0): the share of ignored rows;
spread (1.0): of the weight.
"""

from typing import Any

import torch

from tritium.kernels.case import Budget, Case, Goal
from tritium.kernels.cross_entropy.cases import targets_of

CASES = (
    Case("tiny", {"N": 3, "C": 4, "V": 5, "Vp": 5}),
    Case("one_row", {"N": 1, "C": 8, "V": 30, "Vp": 32}),
    Case("no_rows", {"N": 0, "C": 8, "V": 7, "Vp": 8}),
    Case("odd", {"N": 13, "C": 17, "V": 33, "Vp": 40}),
    Case("same_dtype_weight", {"N": 9, "C": 16, "V": 50, "Vp": 64}, {"master": False}),
    Case("ignored", {"N": 12, "C": 24, "V": 60, "Vp": 64}, {"ignored": 0.4}),
    Case("all_ignored", {"N": 4, "C": 8, "V": 20, "Vp": 24}, {"ignored": 1.0}),
    Case("chunks", {"N": 23, "C": 16, "V": 70, "Vp": 72}, {"chunk": 5}),
    Case("one_chunk", {"N": 6, "C": 16, "V": 70, "Vp": 72}, {"chunk": 100}),
    Case("smoothing", {"N": 8, "C": 16, "V": 60, "Vp": 64}, {"label_smoothing": 0.1, "chunk": 3}),
    Case("z_loss_softcap", {"N": 8, "C": 16, "V": 60, "Vp": 64}, {"z_loss": 1e-3, "softcap": 15.0}),
    Case("everything", {"N": 21, "C": 32, "V": 100, "Vp": 104},
         {"ignored": 0.2, "ignore_index": -1, "label_smoothing": 0.05, "z_loss": 1e-3, "softcap": 30.0, "chunk": 8}),
    Case("other_ignore_index", {"N": 7, "C": 8, "V": 20, "Vp": 24}, {"ignored": 0.3, "ignore_index": -1}),
    Case("z_loss", {"N": 7, "C": 8, "V": 20, "Vp": 24}, {"z_loss": 1e-2, "master": False}),
    Case("softcap", {"N": 7, "C": 8, "V": 20, "Vp": 24}, {"softcap": 10.0, "chunk": 3}),
    Case("only_smoothing", {"N": 7, "C": 8, "V": 20, "Vp": 24}, {"label_smoothing": 0.1}),
    Case("large_z_loss", {"N": 7, "C": 8, "V": 20, "Vp": 24}, {"z_loss": 1.0, "spread": 10.0, "chunk": 3}),
    Case("large_z_loss_softcap", {"N": 7, "C": 8, "V": 20, "Vp": 24}, {"z_loss": 1.0, "spread": 10.0, "softcap": 30.0}),
    Case("evaluation", {"N": 9, "C": 16, "V": 30, "Vp": 32}, {"with_grad": False}),
    Case("evaluation_same_dtype", {"N": 9, "C": 16, "V": 30, "Vp": 32}, {"with_grad": False, "master": False}),
    *(
        Case(f"everything_{name}", {"N": 11, "C": 16, "V": 50, "Vp": 56},
             {"ignored": 0.2, "ignore_index": -1, "label_smoothing": 0.05, "z_loss": 1e-3, "softcap": 30.0, "chunk": 4,
              **more})
        for name, more in (("same_dtype", {"master": False}), ("evaluation", {"with_grad": False}))
    ),
    Case("sixteens", {"N": 40, "C": 32, "V": 61, "Vp": 64}),
    Case("sixteens_everything", {"N": 37, "C": 48, "V": 90, "Vp": 96},
         {"ignored": 0.2, "ignore_index": -1, "label_smoothing": 0.05, "z_loss": 1e-3, "softcap": 30.0, "chunk": 8}),
    *(Case(f"gpt2_{name}", {"N": 8192, "C": C, "V": 50257, "Vp": 50304}, large=True) for name, C in
      {"124m": 768, "350m": 1024, "774m": 1280, "1558m": 1600}.items()),
    Case("llama3_8b", {"N": 8192, "C": 4096, "V": 128256, "Vp": 128256}, large=True),
)  # fmt: skip
NOT_ARGUMENTS = ("ignored", "master", "spread")
BANNED = {
    ("with_grad", "weights of another dtype"): "known by tensors that require a gradient, which without gradients none "
    "does; the case evaluation has such a weight",
}


def inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    N, C, V, Vp = (case.shape[letter] for letter in ("N", "C", "V", "Vp"))
    x = torch.randn(N, C, generator=generator)
    weight = torch.randn(Vp, C, generator=generator) * (3.0 * case.options.get("spread", 1.0) / C**0.5)
    with_grad = bool(case.options.get("with_grad", True))
    weight_dtype = torch.promote_types(dtype, torch.float32) if case.options.get("master", True) else dtype
    return {
        "x": x.to(device, dtype).requires_grad_(with_grad),
        "weight": weight.to(device, weight_dtype).requires_grad_(with_grad),
        "targets": targets_of(case, generator).to(device),
        "vocab_size": V,
        **{name: value for name, value in case.options.items() if name not in NOT_ARGUMENTS},
    }


def exact_zeros(case: Case, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Where the reference defines zeros: ignored rows of dx, padding rows of dweight."""
    ignored = arguments["targets"] == case.options.get("ignore_index", -100)
    padding = torch.arange(case.shape["Vp"], device=ignored.device) >= case.shape["V"]
    C = case.shape["C"]
    return {"gradient of x": ignored[:, None].expand(-1, C), "gradient of weight": padding[:, None].expand(-1, C)}


def flops(case: Case) -> int:
    """The logits' GEMM (all columns, padding included) and cross_entropy's 5 per real logit."""
    N, C, V, Vp = (case.shape[letter] for letter in ("N", "C", "V", "Vp"))
    return 2 * N * C * Vp + 5 * N * V


def flops_backward(case: Case) -> int:
    """The GEMMs of dx and dweight and cross_entropy's 4 per real logit."""
    N, C, V, Vp = (case.shape[letter] for letter in ("N", "C", "V", "Vp"))
    return 4 * N * C * Vp + 4 * N * V


def bytes(case: Case, dtype: torch.dtype) -> int:
    """Read x, weight and targets; the logits need never leave the chip."""
    N, C, Vp = (case.shape[letter] for letter in ("N", "C", "Vp"))
    return N * C * dtype.itemsize + Vp * C * _weight_size(case, dtype) + 8 * N + 4


def bytes_backward(case: Case, dtype: torch.dtype) -> int:
    """Read x, weight and targets, write dx and dweight."""
    N, C, Vp = (case.shape[letter] for letter in ("N", "C", "Vp"))
    return 2 * N * C * dtype.itemsize + 2 * Vp * C * _weight_size(case, dtype) + 8 * N


def _weight_size(case: Case, dtype: torch.dtype) -> int:
    return 4 if case.options.get("master", True) else dtype.itemsize


BUDGETS = (
    Budget("_forward_backward", registers=64, threads=1024, needs=("wide loads", "wide stores")),
    Budget("_scale", registers=64, threads=1024, needs=("wide loads", "wide stores")),
)
GOALS = (
    Goal("gpt2_*", "forward+backward", 1 / 1.12, "of GEMM"),  # at most 1.12 times its three products
    Goal("llama3_8b", "forward+backward", 740, "TFLOP/s", "728–752 TFLOP/s on an H200 (quack, Liger CuTe)"),
)
