"""What the backends of adamw ask of their lists of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

MOMENTS = (torch.float32, torch.bfloat16)


def check(
    backend: str,
    params: Sequence[Tensor],
    copies: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    device: torch.device,
    dtypes: Sequence[torch.dtype],
) -> None:
    """Raise unless masters are fp32, moments all fp32 or all bf16, grads and copies of ``dtypes``, and all of the
    params' shapes on ``device``. backend: for messages. Whole lists at once, since it runs every step; by element to
    say what is wrong.
    """
    shapes = [p.shape for p in params]
    moments: Sequence[torch.dtype] = MOMENTS
    if exp_avgs and exp_avgs[0].dtype in MOMENTS:
        moments = (exp_avgs[0].dtype,)
    for what, tensors, allowed in (
        ("params", params, (torch.float32,)),
        ("exp_avgs", exp_avgs, moments),
        ("exp_avg_sqs", exp_avg_sqs, moments),
        ("grads", grads, dtypes),
        ("copies", copies, dtypes),
    ):
        if what == "copies" and not tensors:
            continue
        if (
            [t.shape for t in tensors] != shapes
            or not {t.dtype for t in tensors}.issubset(allowed)
            or not {t.device for t in tensors} <= {device}
        ):
            _explain(backend, what, tensors, params, device, allowed)


def _explain(
    backend: str,
    what: str,
    tensors: Sequence[Tensor],
    params: Sequence[Tensor],
    device: torch.device,
    dtypes: Sequence[torch.dtype],
) -> None:
    if len(tensors) != len(params):
        raise ValueError(f"adamw needs one of {what} for each of the {len(params)} params; there are {len(tensors)}")
    for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
        if tensor.dtype not in dtypes or tensor.device != device:
            names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise TypeError(
                f"adamw {backend} needs {what} in {names} on {device}; "
                f"{what}[{i}] is {tensor.dtype} on {tensor.device}; choose reference"
            )
        if tensor.shape != param.shape:
            raise ValueError(
                f"adamw: {what}[{i}] has shape {tuple(tensor.shape)}, its param {tuple(param.shape)}; they must agree"
            )


def narrow_moments(backend: str, option: object) -> str | None:
    """What a backend whose moments are fp32 says to a site whose option ``moments`` is this."""
    if option in (None, "fp32"):
        return None
    return f"{backend} keeps moments in fp32 and this site's are {option}; choose native on a CPU, triton or reference"
