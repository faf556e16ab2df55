"""adamw: one optimizer step over a list of tensors, in place, with decoupled weight decay (arXiv:1711.05101).

With g = grad · grad_scale, t = step, for each tensor, unless skip:
    m ← β1 m + (1 - β1) g          v ← β2 v + (1 - β2) g²
    p ← p (1 - lr · weight_decay) - lr · (m / (1 - β1ᵗ)) / (√(v / (1 - β2ᵗ)) + eps)
    copy ← p rounded to the copy's dtype
Moments in bf16 are computed in fp32 and rounded stochastically when they are stored (kernels/lib/stochastic.py), the
i-th tensor's by (t, i); p is made of what they were before that.
"""

import torch
from torch import Tensor

from tritium.kernels.lib import stochastic


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
    """params: fp32 masters; exp_avgs, exp_avg_sqs: moments, fp32 or bf16; all updated in place. grads: fp32 or the
    copies' dtype.

    copies: the compute-dtype working copies, one for each param, or an empty list when the params are computed with.
    lr, step (1 for the first step), grad_scale (the clip coefficient): () fp32 tensors on the device; skip: () fp32,
    nonzero leaves everything as it was. Nothing is read back by the host.
    """
    keep = skip == 0
    correction1, correction2 = 1.0 - beta1**step, 1.0 - beta2**step
    for i, (p, grad, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        g = grad.to(p.dtype) * grad_scale
        new_m = torch.lerp(m.to(p.dtype), g, 1.0 - beta1)
        new_v = beta2 * v.to(p.dtype) + (1.0 - beta2) * g * g
        new_p = p * (1.0 - lr * weight_decay) - lr * (new_m / correction1) / ((new_v / correction2).sqrt() + eps)
        if m.dtype == torch.bfloat16:
            random = stochastic.bits(step, i, p)
            new_m, new_v = stochastic.to_bf16(new_m, random & 0xFFFF), stochastic.to_bf16(new_v, random >> 16)
        m.copy_(torch.where(keep, new_m, m))
        v.copy_(torch.where(keep, new_v, v))
        p.copy_(torch.where(keep, new_p, p))
        if copies:
            copies[i].copy_(p)
