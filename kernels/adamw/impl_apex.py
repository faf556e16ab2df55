"""adamw by NVIDIA apex's multi-tensor Adam, the kernel inside FusedAdam. Written against apex 25.09 (amp_C).

The capturable form takes learning rate, step and skip flag from the device. It writes the scaled gradients back, so
it gets a copy of them; it takes fp32 gradients for fp32 masters, which that copy is.
"""

import torch
from torch import Tensor

from tritium.kernels.adamw import arguments
from tritium.kernels.autograd import bypass
from tritium.kernels.lib import nvidia_apex
from tritium.kernels.op import KernelError
from tritium.kernels.site import Site

UNPROVEN = "never run on a GPU: only its calls have been checked, against apex 25.09's signatures"
_DECOUPLED, _CORRECT_BIAS = 1, 1  # amp_C's mode for AdamW, and its flag for dividing by 1 - βᵗ


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
    import amp_C
    from apex.multi_tensor_apply import multi_tensor_applier

    if not bypass(params):
        raise KernelError(_COMPILED)
    # apex's chunking misses the launch when the last tensor is empty
    kept = [i for i, p in enumerate(params) if p.numel() > 0]
    if kept:
        fresh = [grads[i].to(torch.float32, copy=True) for i in kept]
        lists = [fresh, *([tensors[i] for i in kept] for tensors in (params, exp_avgs, exp_avg_sqs))]
        multi_tensor_applier(
            amp_C.multi_tensor_adam_capturable,
            (skip != 0).to(torch.int32),
            lists,
            lr,
            beta1,
            beta2,
            eps,
            step.to(torch.int32),
            _DECOUPLED,
            _CORRECT_BIAS,
            weight_decay,
            grad_scale,
        )
    if copies:
        torch._foreach_copy_(copies, params)


_COMPILED = "apex's optimizer kernel cannot be traced by torch.compile; choose torch_fused, or set compile=false"


def unsupported(site: Site) -> str | None:
    reason = nvidia_apex.unavailable(site, "amp_C")
    if reason is not None:
        return reason
    if site.compiled:
        return _COMPILED
    return arguments.narrow_moments("apex's AdamW", site.options.get("moments"))
