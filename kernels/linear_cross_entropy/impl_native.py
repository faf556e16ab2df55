"""linear_cross_entropy on the CPU: torch's GEMMs over chunks of rows, the cross_entropy kernel in place on each chunk's
logits.

N rows, C width, Vp columns. Per chunk of n rows: logits = x Wᵀ; losses and, in the logits' place, dlogits; dx = dlogits
W and dW += dlogitsᵀ x, 2 n C Vp FLOPs each. So the gradients are ready when the forward ends (they are what is saved
for backward), nothing is recomputed, and beside dW only one chunk of logits exists. The GEMMs are the bound: 6 N C Vp
FLOPs with gradients, 2 N C Vp without. A chunk's dW is a GEMM in x's dtype; the sum over chunks is fp32. Where one
chunk holds all rows, its dW is saved as the GEMM wrote it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritium.kernels.autograd import differentiable
from tritium.kernels.cross_entropy.impl_native import losses_and_lse, losses_in_place
from tritium.kernels.cross_entropy.reference import check_options
from tritium.kernels.lib import native
from tritium.kernels.site import Site

CHUNKS = True
DETERMINISTIC = True  # at a fixed number of threads, as torch's GEMMs are

CHUNK_BYTES = 128 * 2**20  # of logits: so large that adding up dW costs little beside the GEMMs


def _ranges(N: int, row_bytes: int, chunk: int) -> list[tuple[int, int]]:
    """Row ranges: of ``chunk`` rows, or as few nearly equal ones as fit CHUNK_BYTES."""
    if chunk <= 0:
        count = max(1, -(-N * row_bytes // CHUNK_BYTES))
        chunk = max(1, -(-N // count))
    return [(start, min(start + chunk, N)) for start in range(0, N, chunk)]


def _keeps_narrow(x: Tensor, weight: Tensor, chunk: int) -> bool:
    """Whether dW is kept in x's narrower dtype until backward, which widens it while it scales it: of one chunk of rows
    the GEMM has rounded it so far anyway, and a wide copy would cost a pass of its own."""
    if x.dtype.itemsize >= weight.dtype.itemsize:
        return False
    return x.shape[0] <= chunk if chunk > 0 else x.shape[0] * weight.shape[0] * x.element_size() <= CHUNK_BYTES


def _launch_forward(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    chunk: int,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or tuple(targets.shape) != (x.shape[0],):
        raise ValueError(
            "linear_cross_entropy needs x (N, C), weight (V, C) and targets (N,); got "
            f"{tuple(x.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}; flatten batch and time first"
        )
    check_options(label_smoothing, z_loss, softcap)  # before the first GEMM, and where there are no rows too
    options = (vocab_size, ignore_index, label_smoothing, z_loss, softcap)
    narrow = weight.to(x.dtype)
    loss = torch.zeros((), dtype=torch.float64)
    dx = x.new_empty(x.shape if with_grad else (0,))
    dweight: Tensor | None = None  # fp32 across chunks
    kept = x.dtype if _keeps_narrow(x, weight, chunk) else weight.dtype
    for start, stop in _ranges(x.shape[0], weight.shape[0] * x.element_size(), chunk):
        rows, row_targets = x[start:stop], targets[start:stop]
        logits = F.linear(rows, narrow)
        if not with_grad:
            loss += losses_and_lse(logits, row_targets, options, start)[0].sum(dtype=torch.float64)
            continue
        loss += losses_in_place(logits, row_targets, options, start).sum(dtype=torch.float64)
        torch.mm(logits, narrow, out=dx[start:stop])
        if dweight is None:
            dweight = logits.t() @ rows
            if kept != rows.dtype:
                dweight = dweight.to(torch.float32)
        elif rows.dtype == torch.float32:
            dweight.addmm_(logits.t(), rows)
        else:
            dweight += logits.t() @ rows
    if not with_grad:
        return loss.to(torch.float32), dx, weight.new_empty(0)
    if dweight is None:
        dweight = torch.zeros_like(weight, dtype=kept)
    return loss.to(torch.float32), dx, dweight.to(kept)


def _launch_backward(
    dloss: Tensor, dx: Tensor, dweight: Tensor, with_grad: bool, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if not with_grad:
        raise RuntimeError(
            "linear_cross_entropy was called with with_grad=False (or under no_grad), which promises that no gradient "
            "is asked for, and backward asked for one; call it with with_grad=True"
        )
    return _scaled(dx, dloss, dx.dtype), _scaled(dweight, dloss, weight_dtype)


def _scaled(gradient: Tensor, dloss: Tensor, dtype: torch.dtype) -> Tensor:
    """The product, in which zeros stay, those of ignored rows and of the padding, though dloss be infinite."""
    return (gradient.to(dtype) * dloss).masked_fill_(gradient == 0, 0.0)


def _fake_forward(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    with_grad = rest[-1]
    loss = x.new_empty((), dtype=torch.float32)
    if not with_grad:
        return loss, x.new_empty((0,)), weight.new_empty((0,))
    chunk = rest[-2]
    dtype = x.dtype if _keeps_narrow(x, weight, chunk) else weight.dtype
    return loss, x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=dtype)


def _fake_backward(
    dloss: Tensor, dx: Tensor, dweight: Tensor, with_grad: bool, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dx), torch.empty_like(dweight, dtype=weight_dtype)


def _flops(x: Sequence[int], weight: Sequence[int], *rest: object, **_: object) -> int:
    """The forward's GEMMs: with gradients all three are run there, and backward only scales."""
    with_grad = rest[7]
    return 2 * x[0] * weight[0] * weight[1] * (3 if with_grad else 1)


_linear_cross_entropy = differentiable(
    "linear_cross_entropy_native",
    forward=_launch_forward,
    backward=_launch_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=lambda args, results: (results[1], results[2], args[9], args[1].dtype),
    gradients=(0, 1),
    flops=_flops,
    backward_fuses=True,  # widening, product and the rows of a tied table's other gradient in one pass over dW
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
    """x (N, C) fp32 or bf16, weight (Vp, C) in any float dtype, targets (N,) → the sum of the rows' losses, () fp32."""
    with_grad = with_grad and torch.is_grad_enabled()
    return _linear_cross_entropy(
        x, weight, targets, vocab_size, ignore_index, label_smoothing, z_loss, softcap, chunk, with_grad
    )


def unsupported(site: Site) -> str | None:
    return native.unsupported(site)
