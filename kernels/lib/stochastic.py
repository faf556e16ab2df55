"""Stochastic rounding by a counter: what an update rounds its moments with, in plain torch (the specification).

A number between two that can be stored becomes the upper one with the probability of its place between them, so it
is right on average. To nearest, what changes by less than half a spacing never changes: of a second moment in bf16
(spacing 2⁻⁷ to 2⁻⁸ of it), which a step moves by 1 - β2 of the difference, all with β2 = 0.999 and much with 0.95.

The random bits are a hash of (step, tensor, element): no state, the same on every device and in every backend, so a
step that is done again, by a replay, after a resume or on another process, rounds alike.

    mix(x)           a bijection of 32 bits: two rounds of xor-shift and multiply
    stream(t, k, h)  = mix(mix(mix(t) + k) + h), h: the element's number // 2³²
    bits(i)          = mix(i ^ stream): the lower 16 bits for the first moment, the upper 16 for the second
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def mix(x: Tensor) -> Tensor:
    """x: int64 holding 32 bits. Products wrap, and their lower 32 bits are right."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def bits(step: Tensor, tensor: int, like: Tensor) -> Tensor:
    """32 random bits for each element of ``like``, the tensor-th of its list, as int64 of its shape. step: () fp32."""
    at = torch.arange(like.numel(), device=like.device).reshape(like.shape)
    seed = mix((mix(step.to(torch.int64)) + tensor) & _MASK)
    return mix((at & _MASK) ^ mix((seed + (at >> 32)) & _MASK))


def to_bf16(x: Tensor, random: Tensor) -> Tensor:
    """fp32 to bf16 by 16 random bits: what is cut off, as a part of 2¹⁶, is the probability of going away from 0."""
    cut = ((x.view(torch.int32) + random.to(torch.int32)) & -0x10000).view(torch.float32)
    return torch.where(x.isnan(), x, cut).to(torch.bfloat16)
