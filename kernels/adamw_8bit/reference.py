"""adamw_8bit: ``adamw`` with moments in 8 bits, a code an element and a scale for 256 of them, in place.

The mathematics is adamw's, in fp32, on the moments that the codes stand for; p is made of the new moments before these
become codes again (kernels/lib/dynamic_code.py), stochastically by (t, the tensor's place in the lists).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritium.kernels.lib import dynamic_code


def adamw_8bit(
    params: list[Tensor],
    copies: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    exp_avg_scales: list[Tensor],
    exp_avg_sq_scales: list[Tensor],
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor,
    skip: Tensor,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """params: fp32 masters; exp_avgs, exp_avg_sqs: uint8 codes of their shapes; exp_avg_scales, exp_avg_sq_scales:
    (⌈n / 256⌉,) fp32 for a param of n elements, a scale for 256 in row order. All updated in place; all codes and
    scales zero are moments of zero. The rest as for adamw.

    Moments that are no codes but floating-point tensors are kept as such, and the scales not looked at: what an exact
    computation of the op is.
    """
    keep = skip == 0
    correction1, correction2 = 1.0 - beta1**step, 1.0 - beta2**step
    for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
        m, v = _read(exp_avgs, exp_avg_scales, i, True), _read(exp_avg_sqs, exp_avg_sq_scales, i, False)
        g = grad.to(p.dtype) * grad_scale
        new_m = torch.lerp(m, g, 1.0 - beta1)
        new_v = beta2 * v + (1.0 - beta2) * g * g
        new_p = p * (1.0 - lr * weight_decay) - lr * (new_m / correction1) / ((new_v / correction2).sqrt() + eps)
        random = dynamic_code.halves(step, i, p)
        _write(exp_avgs, exp_avg_scales, i, new_m, True, random[0], keep)
        _write(exp_avg_sqs, exp_avg_sq_scales, i, new_v, False, random[1], keep)
        p.copy_(torch.where(keep, new_p, p))
        if copies:
            copies[i].copy_(p)


def _read(codes: Sequence[Tensor], scales: Sequence[Tensor], i: int, signed: bool) -> Tensor:
    return codes[i] if codes[i].is_floating_point() else dynamic_code.decode(codes[i], scales[i], signed)


def _write(
    codes: Sequence[Tensor], scales: Sequence[Tensor], i: int, new: Tensor, signed: bool, random: Tensor, keep: Tensor
) -> None:
    if codes[i].is_floating_point():
        codes[i].copy_(torch.where(keep, new, codes[i]))
        return
    new_codes, new_scales = dynamic_code.encode(new, signed, random)
    codes[i].copy_(torch.where(keep, new_codes, codes[i]))
    scales[i].copy_(torch.where(keep, new_scales, scales[i]))
