"""linear_cross_entropy in Triton: the head's GEMMs by torch, chunk by chunk, the cross_entropy kernel between them.

Mathematics:
    logits = x Wᵀ        loss = Σ_rows cross_entropy(logits)        E = dloss/dlogits (for an upstream gradient of one)
    dx = g · E W         dW = g · Eᵀ x                              g: the upstream gradient, a scalar

Shapes: N rows, C width, Vp rows of the weight, V = vocab_size real ones, n rows of one chunk.

Forward, for each chunk of n rows: logits into a buffer; the kernel writes the losses and, over the logits, E; both
    gradient GEMMs read the buffer, and the next chunk reuses it. dx and dW are fp32; dW sums over the chunks. Without
    gradients (evaluation) only the first GEMM and the losses remain. W is cast to x's dtype once a call.
Backward scales dx and dW by g and rounds them, once, to the dtypes of x and W; nothing is recomputed.
Saved: dx and dW, in place of N·Vp logits.

FLOPs: 6·N·C·Vp with gradients, 2·N·C·Vp without. The logits cross memory 6 times (written, read twice by the kernel and
written, read by two GEMMs) and dW twice per chunk, which is why chunks are large. The bound is the GEMMs.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels.autograd import differentiable
from tritium.kernels.cross_entropy import impl_triton as cross_entropy
from tritium.kernels.lib import triton_launch as launch
from tritium.kernels.site import Site, interpreting

CHUNKS = True
DETERMINISTIC = True
# of logits: 5,300 rows of GPT-2's vocabulary in bf16, where the traffic of dW is below 7 % of the GEMMs' time
CHUNK_BYTES = 512 * 2**20
FP16_BOOST, FP16_LARGEST = 1024.0, 65504.0


@triton.jit
def _scale(X, FACTOR, Y, size, BLOCK: tl.constexpr):
    """Y = X times FACTOR. Zeros stay, those of ignored rows and of the padding, though FACTOR be infinite."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, at < size, other=0.0).to(tl.float32)
    y = tl.where(x == 0, x, x * tl.load(FACTOR).to(tl.float32))
    tl.store(Y + at, y.to(Y.dtype.element_ty), at < size)


# ----------------------------------------------------------------------------------------------------------- launchers

_scale_kernel = launch.Kernel(_scale)


class ScaleConfig(NamedTuple):
    BLOCK: int
    num_warps: int


def scale_config() -> ScaleConfig:
    """16 elements a thread."""
    return ScaleConfig(4096, 8)


@cache
def _scale_constants(tile: ScaleConfig) -> launch.Constants:
    return launch.constants(**tile._asdict())


def boost(vocab_size: int, z_loss: float, softcap: float) -> float:
    """How many times as large as it is E is kept in fp16, whose numbers reach down to 6e-8 only; a power of two.

    |E| ≤ 1 + 2ζ|lse|, and |lse| ≤ c + log V for logits within ±c: the softcap, or what fp16 holds. So that 1024 times E
    stays finite without z_loss, and with one what is small is lifted less; of no logits the product overflows.
    """
    most = 1 + 2 * z_loss * ((softcap or FP16_LARGEST) + math.log(vocab_size))
    return min(FP16_BOOST, 2.0 ** math.floor(math.log2(FP16_LARGEST / most)))


def chunk_rows(N: int, Vp: int, itemsize: int) -> int:
    """Rows of a chunk: as many as CHUNK_BYTES hold, evened out over the chunks, a multiple of 128."""
    chunks = max(1, launch.cdiv(N * Vp * itemsize, CHUNK_BYTES))
    return max(128, launch.cdiv(launch.cdiv(N, chunks), 128) * 128)


def _launch_forward(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, ignore_index: int, label_smoothing: float,
    z_loss: float,
    softcap: float, chunk: int, need_dx: bool, need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check(x, weight, targets, vocab_size, label_smoothing, z_loss, softcap)
    (N, C), Vp = x.shape, weight.shape[0]
    options = (vocab_size, ignore_index, label_smoothing, z_loss, softcap)
    w = weight.to(x.dtype)
    losses = torch.empty(N, dtype=torch.float32, device=x.device)
    dx = torch.empty((N, C) if need_dx else 0, dtype=torch.float32, device=x.device)
    dw = torch.empty((Vp, C) if need_dweight else 0, dtype=torch.float32, device=x.device)
    n = min(chunk if chunk > 0 else chunk_rows(N, Vp, x.element_size()), max(N, 1))
    # E in fp16 is kept larger, and dx and dW are until backward
    half = x.dtype == torch.float16
    upstream = torch.full((), boost(vocab_size, z_loss, softcap), device=x.device) if half else None
    buffer = torch.empty(n, Vp, dtype=x.dtype, device=x.device)
    for first in range(0, N, n):
        part = (x, targets, losses, dx, buffer)
        if n < N:  # a view costs the host as much as a launch
            rows = slice(first, min(first + n, N))
            part = (x[rows], targets[rows], losses[rows], dx[rows] if need_dx else dx, buffer[: rows.stop - first])
        x_part, targets_part, losses_part, dx_part, logits = part
        torch.mm(x_part, w.t(), out=logits)
        if not (need_dx or need_dweight):
            losses_part.copy_(cross_entropy._launch_forward(logits, targets_part, *options)[0])
            continue
        cross_entropy.losses_and_gradient_in_place(logits, targets_part, losses_part, *options, upstream)
        if need_dx:
            _product(logits, w, dx_part)
        if need_dweight:
            _product(logits.t(), x_part, dw, add=first > 0)
    return losses.sum(), dx, dw if N > 0 else dw.zero_()


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out (fp32) = a b, or += with ``add``: a product of narrower matrices that is never rounded to their dtype.

    torch.addmm may have its first argument as ``out``: addmm_ is just that, and CUDA's kernel copies only where they
    differ. With ``out_dtype`` that argument is of out's dtype, not of the factors'.
    """
    if a.device.type == "cpu" and interpreting():  # torch has no mixed-precision GEMM there, only shapes of its result
        a, b = a.float(), b.float()
    mixed: dict[str, Any] = {} if a.dtype == torch.float32 else {"out_dtype": torch.float32}
    if add:
        torch.addmm(out, a, b, out=out, **mixed)
    else:
        torch.mm(a, b, out=out, **mixed)


def _launch_backward(
    dloss: Tensor, dx: Tensor, dweight: Tensor, x_dtype: torch.dtype, weight_dtype: torch.dtype, lifted: float
) -> tuple[Tensor, Tensor]:
    if lifted != 1:
        dloss = dloss / lifted
    return _scaled(dx, dloss, x_dtype), _scaled(dweight, dloss, weight_dtype)


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x times a scalar on the device, in fp32 and rounded once. (torch would round the scalar to x's dtype first.)"""
    y = torch.empty_like(x, dtype=dtype)
    if x.numel() > 0:
        with launch.on_device(x):
            tile = scale_config()
            _scale_kernel(
                (launch.cdiv(x.numel(), tile.BLOCK),), _scale_constants(tile), x, factor, y, x.numel()
            )  # fmt: skip
    return y


def _check(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, label_smoothing: float, z_loss: float, softcap: float
) -> None:
    launch.require_dtype("linear_cross_entropy", x=x, weight=weight)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            "linear_cross_entropy takes x (N, C) and weight (Vp, C) of one width; "
            f"they are {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    cross_entropy.check(x.shape[0], weight.shape[0], targets, vocab_size, label_smoothing, z_loss, softcap)


# ------------------------------------------------------------------------------------------------------------- autograd


def _save(args: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Any, ...]:
    x, weight, vocab_size, z_loss, softcap = args[0], args[1], args[3], args[6], args[7]
    lifted = boost(vocab_size, z_loss, softcap) if x.dtype == torch.float16 else 1.0
    return results[1], results[2], x.dtype, weight.dtype, lifted


def _fake_forward(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, ignore_index: int, label_smoothing: float,
    z_loss: float,
    softcap: float, chunk: int, need_dx: bool, need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    loss = x.new_empty((), dtype=torch.float32)
    dx = x.new_empty(x.shape if need_dx else 0, dtype=torch.float32)
    return loss, dx, weight.new_empty(weight.shape if need_dweight else 0, dtype=torch.float32)


def _fake_backward(
    dloss: Tensor, dx: Tensor, dweight: Tensor, x_dtype: torch.dtype, weight_dtype: torch.dtype, lifted: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dx, dtype=x_dtype), torch.empty_like(dweight, dtype=weight_dtype)


def _flops(
    x_shape: torch.Size, weight_shape: torch.Size, *args: object, out_shape: object = None, **kwargs: object
) -> int:
    """All three GEMMs belong to the forward; backward is left with none. ``args`` ends with need_dx, need_dweight."""
    (N, C), Vp = x_shape, weight_shape[0]
    return 2 * N * C * Vp * (1 + bool(args[-2]) + bool(args[-1]))


_linear_cross_entropy = differentiable(
    "linear_cross_entropy_triton",
    forward=_launch_forward,
    backward=_launch_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=_save,
    gradients=(0, 1),
    flops=_flops,
    flops_backward=lambda *args, **kwargs: 0,
)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    chunk: int = 0,
    with_grad: bool = True,
) -> Tensor:
    """x (N, C), weight (Vp, C), targets (N,) int64 → the sum of the rows' losses, () fp32.

    The gradients are computed here, for those of x and weight that require one and unless ``with_grad`` is False;
    then the loss is detached.
    """
    if not with_grad:
        x, weight = x.detach(), weight.detach()
    grad = torch.is_grad_enabled()
    return _linear_cross_entropy(
        x, weight, targets, vocab_size, ignore_index, label_smoothing, z_loss, softcap, chunk,
        grad and x.requires_grad, grad and weight.requires_grad,
    )  # fmt: skip


def unsupported(site: Site) -> str | None:
    return launch.unsupported(site)
