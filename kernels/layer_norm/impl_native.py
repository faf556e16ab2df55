"""layer_norm on the CPU in C++ (layer_norm.cpp): OpenMP over rows, vectorised, two-pass variance in fp32.

N rows, C width. Saved for backward: x, weight, and per row mean and rstd in fp32 (8 bytes a row; recomputing them would
cost a pass over x). Bytes: forward 2 N C, backward 3 N C elements; the memory bandwidth is the bound. The weight
gradients are summed over a fixed partition of the rows, so they depend on neither thread count nor scheduling.
"""

import torch
from torch import Tensor

from tritium.kernels.autograd import differentiable
from tritium.kernels.lib import native
from tritium.kernels.site import Site

DETERMINISTIC = True  # at any number of threads

_forward = native.Function("layer_norm_forward", "i pl pp ppp ll f i")
_backward = native.Function("layer_norm_backward", "i plpl p pp p pp pl ll i")


def _blocks(N: int) -> int:
    """Runs of rows with partial weight gradients of their own: at least 16 rows each, at most 128."""
    return max(1, min(N // 16, 128))


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.float32).contiguous()


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in native.DTYPES or tensor.device.type != "cpu":
            raise TypeError(
                "layer_norm native computes float32 and bfloat16 on the CPU; "
                f"{name} is {tensor.dtype} on {tensor.device}; choose reference"
            )
        if name != "x" and tuple(tensor.shape) != (x.shape[-1],):
            raise ValueError(
                f"layer_norm needs {name} of shape ({x.shape[-1]},), the width of x; it is {tuple(tensor.shape)}"
            )


def _launch_forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weight, bias)
    rows, y = native.rows(x), x.new_empty(x.shape)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    wide, wide_bias = _wide(weight), None if bias is None else _wide(bias)
    _forward(
        *(native.DTYPES[x.dtype], rows.data_ptr(), rows.stride(0)),
        *(wide.data_ptr(), None if wide_bias is None else wide_bias.data_ptr()),
        *(y.data_ptr(), mean.data_ptr(), rstd.data_ptr(), *rows.shape, eps, torch.get_num_threads()),
    )
    return y, mean, rstd


def _launch_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    drows, rows, wide = native.rows(dy), native.rows(x), _wide(weight)
    dx = x.new_empty(x.shape)
    dweight = torch.empty_like(wide)
    dbias = torch.empty_like(wide) if has_bias else wide.new_empty(0)
    blocks = _blocks(rows.shape[0])
    partial = torch.empty(blocks, 2, rows.shape[1], dtype=torch.float32)
    _backward(
        *(native.DTYPES[x.dtype], drows.data_ptr(), drows.stride(0), rows.data_ptr(), rows.stride(0)),
        *(wide.data_ptr(), mean.data_ptr(), rstd.data_ptr()),
        *(dx.data_ptr(), dweight.data_ptr(), dbias.data_ptr() if has_bias else None),
        *(partial.data_ptr(), blocks, *rows.shape, torch.get_num_threads()),
    )
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape), statistics, torch.empty_like(statistics)


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape if has_bias else (0,))


_layer_norm = differentiable(
    "layer_norm_native",
    forward=_launch_forward,
    backward=_launch_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=lambda args, results: (args[0], args[1], results[1], results[2], args[2] is not None),
    gradients=(0, 1, 2),
)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """x (..., C) fp32 or bf16, weight (C,), bias (C,) or None, each fp32 or bf16 → (..., C) in x's dtype."""
    return _layer_norm(x, weight, bias, eps)


def unsupported(site: Site) -> str | None:
    return native.unsupported(site)
