"""Cases of linear. N rows (the product of the leading axes) · C input width · F output width.

Options: bias (True); scale (1.0): of x; outlier (none): its last number, before it is scaled.
"""

import math

import torch

from tritium.kernels.case import Budget, Case

_GPT2 = {"124m": 768, "350m": 1024, "774m": 1280, "1558m": 1600}
CASES = (
    Case("one_row", {"N": 1, "C": 16, "F": 8}),
    Case("one_column", {"N": 5, "C": 1, "F": 1}),
    Case("no_rows", {"N": 0, "C": 8, "F": 12}),
    Case("odd", {"N": 13, "C": 33, "F": 17}),
    Case("no_bias", {"N": 9, "C": 20, "F": 31}, {"bias": False}),
    Case("three_axes", {"B": 2, "T": 5, "C": 24, "F": 16}),
    Case("three_axes_no_bias", {"B": 3, "T": 2, "C": 16, "F": 40}, {"bias": False}),
    Case("vector", {"C": 20, "F": 6}),
    Case("long_sum", {"N": 3, "C": 1030, "F": 7}),
    # widths that fp8 takes; of the square one a transposed weight has the right shape too
    Case("sixteens", {"N": 40, "C": 48, "F": 32}),
    Case("sixteens_square", {"N": 21, "C": 32, "F": 32}, {"bias": False}),
    Case("sixteens_small_numbers", {"B": 3, "T": 9, "C": 32, "F": 48},
         {"bias": False, "scale": 2.0**-20, "outlier": 64.0}),
    Case("sixteens_no_rows", {"N": 0, "C": 16, "F": 32}),
    *(
        Case(f"gpt2_{name}_{place}", {"N": 16384, "C": C * wide_in, "F": C * wide_out}, large=True)
        for name, C in _GPT2.items()
        for place, wide_in, wide_out in (("qkv", 1, 3), ("projection", 1, 1), ("up", 1, 4), ("down", 4, 1))
    ),
    *(
        Case(f"gpt2_{name}_head", {"N": 16384, "C": C, "F": 50304}, {"bias": False}, large=True)
        for name, C in _GPT2.items()
    ),
    Case("llama_8b_up", {"N": 8192, "C": 4096, "F": 14336}, {"bias": False}, large=True),
    # strides that no load of 16 bytes fits: GPT-2's own vocabulary, and widths that are odd throughout
    Case("odd_vocabulary", {"N": 16384, "C": 768, "F": 50257}, {"bias": False}, large=True),
    Case("odd_widths", {"N": 16384, "C": 777, "F": 3001}, large=True),
)  # fmt: skip


def inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    C, F = case.shape["C"], case.shape["F"]

    def make(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype).requires_grad_()

    scale = case.options.get("scale", 1.0)
    x = make(*leading(case), C, scale=scale)
    if "outlier" in case.options:
        with torch.no_grad():
            x.view(-1)[-1] = case.options["outlier"] * scale
    return {
        "x": x,
        "weight": make(F, C, scale=C**-0.5),
        "bias": make(F) if case.options.get("bias", True) else None,
    }


def leading(case: Case) -> tuple[int, ...]:
    """The axes before C."""
    return tuple(case.shape[letter] for letter in ("B", "T", "N") if letter in case.shape)


def flops(case: Case) -> int:
    """One GEMM, and the bias."""
    N, C, F = math.prod(leading(case)), case.shape["C"], case.shape["F"]
    return 2 * N * C * F + (N * F if case.options.get("bias", True) else 0)


def flops_backward(case: Case) -> int:
    """Two GEMMs, dx and dweight, and the sum of dbias."""
    N, C, F = math.prod(leading(case)), case.shape["C"], case.shape["F"]
    return 4 * N * C * F + (N * F if case.options.get("bias", True) else 0)


def bytes(case: Case, dtype: torch.dtype) -> int:
    """Read x, weight and bias, write y."""
    N, C, F = math.prod(leading(case)), case.shape["C"], case.shape["F"]
    return dtype.itemsize * (N * C + F * C + N * F + (F if case.options.get("bias", True) else 0))


def bytes_backward(case: Case, dtype: torch.dtype) -> int:
    """Read x, weight and dy, write dx, dweight and dbias."""
    N, C, F = math.prod(leading(case)), case.shape["C"], case.shape["F"]
    return dtype.itemsize * (2 * N * C + 2 * F * C + N * F + (F if case.options.get("bias", True) else 0))


BUDGETS = (
    Budget("_rows", needs=("tensor core", "wide loads", "wide stores"), cases="[!o]*"),
    Budget("_weights", needs=("tensor core", "wide loads"), cases="[!o]*"),
    Budget("_rows", needs=("tensor core",), cases="odd_*"),
    Budget("_weights", needs=("tensor core",), cases="odd_*"),
    Budget("_column_sums", registers=64, threads=1024),
    Budget("_column_sums", needs=("wide loads",), cases="[!o]*"),
    Budget("_add_parts", registers=64, threads=1024),
    Budget("_add_parts", needs=("wide loads",), cases="[!o]*"),
)
