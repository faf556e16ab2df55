"""Cases of layer_norm. N rows (the product of the leading axes) · C width.

Options: bias (True); wide (False): weight and bias in fp32 beside a narrower x; eps. Values of x: scale (1) and
offset (0) of randn; zero_rows (False): every second row is 0.
"""

import math

import torch

from tritium.kernels.case import Budget, Case, Goal

CASES = (
    Case("one_row", {"N": 1, "C": 16}),
    Case("one_column", {"N": 5, "C": 1}),
    Case("no_rows", {"N": 0, "C": 24}),
    Case("odd", {"N": 7, "C": 33}),
    Case("no_bias", {"N": 9, "C": 65}, {"bias": False}),
    Case("wide_weights", {"N": 6, "C": 40}, {"wide": True}),
    Case("wide_no_bias", {"N": 3, "C": 130}, {"wide": True, "bias": False}),
    Case("three_axes", {"B": 2, "T": 3, "C": 48}),
    Case("vector", {"C": 20}),
    Case("large_eps", {"N": 4, "C": 12}, {"eps": 0.1}),
    Case("many_rows", {"N": 2569, "C": 8}),
    Case("gpt2_width", {"N": 4, "C": 768}),
    Case("off_centre", {"N": 5, "C": 96}, {"offset": 30.0}),
    Case("zero_rows", {"N": 6, "C": 40}, {"zero_rows": True}),
    Case("large_values", {"N": 5, "C": 72}, {"scale": 1e4}),
    Case("small_values", {"N": 5, "C": 72}, {"scale": 1e-4}),
    Case("tiny_values", {"N": 5, "C": 72}, {"scale": 1e-20}),
    Case("no_bias_large_eps", {"N": 5, "C": 31}, {"bias": False, "eps": 0.1}),
    Case("wide_large_eps", {"N": 5, "C": 50}, {"wide": True, "eps": 0.1}),
    Case("no_bias_zero_rows", {"N": 5, "C": 17}, {"bias": False, "zero_rows": True}),
    Case("wide_zero_rows", {"N": 5, "C": 56}, {"wide": True, "zero_rows": True}),
    Case("large_eps_zero_rows", {"N": 5, "C": 34}, {"eps": 0.1, "zero_rows": True}),
    Case("everything", {"B": 2, "T": 5, "C": 100}, {"bias": False, "wide": True, "eps": 0.1, "zero_rows": True}),
    Case("huge_width", {"N": 1, "C": 66001}),
    *(Case(f"gpt2_{name}", {"N": 16384, "C": C}, large=True) for name, C in
      {"124m": 768, "350m": 1024, "774m": 1280, "1558m": 1600}.items()),
    Case("long_rows", {"N": 8192, "C": 8192}, large=True),
    Case("longest_rows", {"N": 1024, "C": 65536}, large=True),
)  # fmt: skip


def inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    C, options = case.shape["C"], dict(case.options)
    weight_dtype = torch.float32 if options.get("wide") else dtype

    def make(*shape: int, shift: float = 0.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) + shift).to(device, weight_dtype).requires_grad_()

    return {
        "x": values(torch.randn(*leading(case), C, generator=generator), case).to(device, dtype).requires_grad_(),
        "weight": make(C, shift=1.0),
        "bias": make(C) if options.get("bias", True) else None,
        "eps": options.get("eps", 1e-5),
    }


def values(x: torch.Tensor, case: Case) -> torch.Tensor:
    """x with the scale and offset that the case asks for, and zeros in every second row where it does."""
    x = x * case.options.get("scale", 1.0) + case.options.get("offset", 0.0)
    if case.options.get("zero_rows"):
        x.view(-1, x.shape[-1])[::2] = 0.0
    return x


def leading(case: Case) -> tuple[int, ...]:
    """The axes before C."""
    return tuple(case.shape[letter] for letter in ("B", "T", "N") if letter in case.shape)


def flops(case: Case) -> int:
    """8 per element: mean 1, variance 3, normalise 2, affine 2."""
    return 8 * math.prod(leading(case)) * case.shape["C"]


def flops_backward(case: Case) -> int:
    """14 per element: x̂ 2, dy·w 1, its two sums 3, dx 4, dweight and dbias 3, and one for the scale."""
    return 14 * math.prod(leading(case)) * case.shape["C"]


def bytes(case: Case, dtype: torch.dtype) -> int:
    """Read x, write y, read weight and bias."""
    return dtype.itemsize * 2 * math.prod(leading(case)) * case.shape["C"] + _affine(case, dtype)


def bytes_backward(case: Case, dtype: torch.dtype) -> int:
    """Read x and dy, write dx; read weight, write dweight and dbias."""
    return dtype.itemsize * 3 * math.prod(leading(case)) * case.shape["C"] + 2 * _affine(case, dtype)


def _affine(case: Case, dtype: torch.dtype) -> int:
    vectors = 2 if case.options.get("bias", True) else 1
    return vectors * case.shape["C"] * (4 if case.options.get("wide") else dtype.itemsize)


BUDGETS = (
    Budget("_forward", registers=96, threads=768, needs=("wide loads", "wide stores")),
    Budget("_backward", registers=128, threads=512, needs=("wide loads", "wide stores")),
    Budget("_forward_wide", registers=96, threads=1024, needs=("wide loads", "wide stores")),
    Budget("_means_wide", registers=96, threads=1024, needs=("wide loads",)),
    Budget("_add_partials", registers=96, needs=("wide loads",), fixed=True),
)
GOALS = (
    Goal("long_rows", "forward", 0.98, "of copy", "2.9–3.02 TB/s (quack)"),
    Goal("gpt2_*", "forward", 2.75, "TB/s", "2.46–2.75 TB/s (quack)"),
    Goal("gpt2_*", "backward", 2.7, "TB/s", "1.1–1.4 TB/s (Liger, torch)"),
)
