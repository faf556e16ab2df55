"""adamw by torch's own fused kernel, ``torch._fused_adamw_``, on a CPU and on a GPU.

torch's kernel wants gradients in the masters' dtype and, when it scales them, divides and writes them back. So the
gradients are multiplied by grad_scale into fp32 temporaries, a group of tensors at a time.
"""

import torch
from torch import Tensor

from tritium.kernels.adamw import arguments
from tritium.kernels.autograd import update_op
from tritium.kernels.site import Site

DETERMINISTIC = True
_GROUP = 1 << 24  # elements whose scaled gradients exist at one time: 64 MiB


def _adamw(
    params: list[Tensor],
    copies: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor,
    skip: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    found_inf = (skip != 0).to(torch.float32)
    begin = 0
    while begin < len(params):
        end, elements = begin + 1, params[begin].numel()
        while end < len(params) and elements + params[end].numel() <= _GROUP:
            elements += params[end].numel()
            end += 1
        group = slice(begin, end)
        scaled = [g.to(p.dtype, copy=True) for g, p in zip(grads[group], params[group], strict=True)]
        torch._foreach_mul_(scaled, grad_scale)
        torch._fused_adamw_(
            params[group],
            scaled,
            exp_avgs[group],
            exp_avg_sqs[group],
            [],
            [step] * (end - begin),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
            found_inf=found_inf,
        )
        begin = end
    if copies:
        torch._foreach_copy_(copies, params)


_update = update_op("adamw_torch_fused", _adamw, mutates=("params", "copies", "exp_avgs", "exp_avg_sqs"))


def adamw(
    params: list[Tensor],
    copies: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor,
    skip: Tensor,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """See the reference."""
    _update(params, copies, grads, exp_avgs, exp_avg_sqs, lr, step, grad_scale, skip, beta1, beta2, eps, weight_decay)


def unsupported(site: Site) -> str | None:
    if site.device not in ("cpu", "cuda"):
        return f"torch's fused AdamW runs on cpu and cuda and this site is on {site.device}; choose reference"
    return arguments.narrow_moments("torch's fused AdamW", site.options.get("moments"))
