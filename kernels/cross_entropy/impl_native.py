"""cross_entropy on the CPU in C++ (cross_entropy.cpp): one read of the logits forward, one read and one write backward.

N rows, V = vocab_size, Vp ≥ V columns. Saved for backward: the logits, the targets, and lse per row in fp32. The
exponential is a polynomial with an error of 1 ulp; sums run in fp32 within 1024 columns and in double across them. The
memory bandwidth is the bound.
"""

import torch
from torch import Tensor

from tritium.kernels.autograd import differentiable
from tritium.kernels.cross_entropy.reference import check_options, check_reduction, reduce
from tritium.kernels.lib import native
from tritium.kernels.site import Site

DETERMINISTIC = True  # rows are independent

# logits dtype, address, row stride; targets; N, Vp; vocab_size, ignore_index, label_smoothing, z_loss, softcap; ...
_forward = native.Function("cross_entropy_forward", "ipl p ll llfff pp i", "l")
_backward = native.Function("cross_entropy_backward", "ipl p ll llfff p pl p i", "l")
_in_place = native.Function("cross_entropy_in_place", "ipl p ll llfff p i", "l")

Options = tuple[int, int, float, float, float]  # vocab_size, ignore_index, label_smoothing, z_loss, softcap


def _operands(rows: Tensor, targets: Tensor) -> tuple[int, ...]:
    return native.DTYPES[rows.dtype], rows.data_ptr(), rows.stride(0), targets.data_ptr(), *rows.shape


def _check(logits: Tensor, targets: Tensor, options: Options) -> None:
    """Refuse what the C++ side would misread. logits (N, Vp), targets (N,)."""
    vocab_size = options[0]
    check_options(*options[2:])
    if logits.dtype not in native.DTYPES or logits.device.type != "cpu":
        raise TypeError(
            "cross_entropy native computes float32 and bfloat16 on the CPU; "
            f"the logits are {logits.dtype} on {logits.device}; choose reference"
        )
    if logits.dim() != 2 or tuple(targets.shape) != (logits.shape[0],):
        raise ValueError(
            "cross_entropy needs logits (N, V) and targets (N,); "
            f"got {tuple(logits.shape)} and {tuple(targets.shape)}; flatten batch and time first"
        )
    if targets.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise TypeError(f"cross_entropy needs integer targets (token ids); they are {targets.dtype}")
    if not 0 < vocab_size <= logits.shape[1]:
        raise ValueError(
            f"vocab_size must lie between 1 and the {logits.shape[1]} columns of the logits, it is {vocab_size}; "
            "columns beyond it are padding"
        )


def _refuse(bad: int, targets: Tensor, options: Options, first_row: int = 0) -> None:
    """Raise for the row the C++ side named, if it named one."""
    if bad >= 0:
        raise ValueError(
            f"a target must be a token id in [0, {options[0]}) or ignore_index {options[1]}; row {first_row + bad} has "
            f"{int(targets[bad])}, so there is no loss to compute; were the data made with another tokenizer?"
        )


def losses_in_place(logits: Tensor, targets: Tensor, options: Options, first_row: int = 0) -> Tensor:
    """Row losses (N,) fp32; overwrites logits (N, Vp), of unit column stride, with the gradient of their sum.

    For linear_cross_entropy. first_row: the number of row 0 in the caller's batch, for the error message.
    """
    _check(logits, targets, options)
    targets = targets.to(torch.int64).contiguous()
    losses = torch.empty(targets.shape, dtype=torch.float32)
    bad = _in_place(*_operands(logits, targets), *options, losses.data_ptr(), torch.get_num_threads())
    _refuse(bad, targets, options, first_row)
    return losses


def losses_and_lse(logits: Tensor, targets: Tensor, options: Options, first_row: int = 0) -> tuple[Tensor, Tensor]:
    """Row losses and lse, each (N,) fp32, without autograd. first_row as in losses_in_place."""
    _check(logits, targets, options)
    rows, targets = native.rows(logits), targets.to(torch.int64).contiguous()
    losses = torch.empty(targets.shape, dtype=torch.float32)
    lse = torch.empty_like(losses)
    out = losses.data_ptr(), lse.data_ptr()
    bad = _forward(*_operands(rows, targets), *options, *out, torch.get_num_threads())
    _refuse(bad, targets, options, first_row)
    return losses, lse


def _launch_forward(
    logits: Tensor,
    targets: Tensor,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    return losses_and_lse(logits, targets, (vocab_size, ignore_index, label_smoothing, z_loss, softcap))


def _launch_backward(
    dlosses: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor]:
    options = (vocab_size, ignore_index, label_smoothing, z_loss, softcap)
    rows, targets, dlosses = native.rows(logits), targets.to(torch.int64).contiguous(), dlosses.to(torch.float32)
    dlogits = torch.empty(rows.shape, dtype=rows.dtype)
    grads = lse.data_ptr(), dlosses.data_ptr(), dlosses.stride(0), dlogits.data_ptr()
    bad = _backward(*_operands(rows, targets), *options, *grads, torch.get_num_threads())
    _refuse(bad, targets, options)
    return (dlogits,)


def _fake_forward(logits: Tensor, targets: Tensor, *options: float) -> tuple[Tensor, Tensor]:
    losses = logits.new_empty(logits.shape[:1], dtype=torch.float32)
    return losses, torch.empty_like(losses)


def _fake_backward(dlosses: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, *options: float) -> tuple[Tensor]:
    return (logits.new_empty(logits.shape),)


_cross_entropy = differentiable(
    "cross_entropy_native",
    forward=_launch_forward,
    backward=_launch_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=lambda args, results: (args[0], args[1], results[1], *args[2:]),
    gradients=(0,),
)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    vocab_size: int,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "none",
) -> Tensor:
    """logits (N, Vp) fp32 or bf16, targets (N,) → losses (N,) fp32, or their reduction (). A target that is no token
    raises ValueError with its row."""
    check_reduction(reduction)
    losses = _cross_entropy(logits, targets, vocab_size, ignore_index, label_smoothing, z_loss, softcap)
    return reduce(losses, targets, ignore_index, reduction)


def unsupported(site: Site) -> str | None:
    return native.unsupported(site)
