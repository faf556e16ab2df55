"""Numbers in 8 bits: a code each, and one fp32 scale for 256 of them, their largest magnitude (arXiv:2110.02861).

The codes are those of bitsandbytes and torchao. Of a number over its scale, |y| ≤ 1: seven decades, decade d (0 to 6)
with the 2ᵈ values (0.1 + 0.9 (i + ½) / 2ᵈ) 10ᵈ⁻⁶ of either sign, or 2ᵈ⁺¹ of one sign for numbers that have none; 0; 1.
In their order magnitudes have the numbers q = n + i, n the decade's number of values: 0 is n - 1 of decade 0, 1 the one
after all. Codes: q - 1 without signs; with signs 127 + q, and 127 - q for negative numbers, of which -1 is none.

A number becomes one of the two values around it, the upper one with the probability of its place between them
(kernels/lib/stochastic.py): to the nearest one, up to 7 % apart in the top decade and further in lower ones, a moment
that moves by 1 - β a step would stay. A positive number without sign has never the code of 0: a second moment of 0
makes the next step as large as the first moment over eps (arXiv:2309.01507).

No tables: with p = 10ᵈ⁻⁶ and the decade's spacing s = 0.9 p / n, the value below y is that of i = ⌊(y - 0.1 p)/s - ½⌋,
and the next one is s further; across the ends of a decade 0.6 s (below its first, of decade 0: 0) and 3 s (above its
last, of decade 6: ½ s).
"""

import torch
from torch import Tensor

from tritium.kernels.lib import stochastic

BLOCK = 256
LEAST = torch.finfo(torch.float32).tiny  # below it a scale has no reciprocal
DECADES = tuple(float(f"1e{d - 6}") for d in range(7))


def blocks(n: int) -> int:
    """Scales of n numbers."""
    return -(-n // BLOCK)


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """fp32 of the codes' shape. codes: uint8; scales: (blocks(n),) fp32, of blocks of the codes in row order."""
    code = codes.to(torch.int32)
    q = (code - 127).abs() if signed else code + 1
    first = 1 if signed else 2  # values of decade 0
    exponent = (q.float().view(torch.int32) >> 23) - 127
    n = (1 << exponent.clamp(min=0)).float()
    value = 0.1 + 0.9 * (q.float() - n + 0.5) / n
    p = torch.full_like(value, DECADES[0])
    for d, power in enumerate(DECADES):
        p = torch.where(n >= first << d, power, p)
    value = torch.where(q < first, 0.0, torch.where(q == first << 7, 1.0, value * p))
    if signed:
        value = torch.where(code < 127, -value, value)
    each = scales.repeat_interleave(BLOCK, output_size=BLOCK * scales.numel())[: codes.numel()]
    return value * each.reshape(codes.shape)


def encode(x: Tensor, signed: bool, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(codes, scales) of fp32 numbers. random: 16 bits for each, as integers; None: to the nearest."""
    flat = torch.nn.functional.pad(x.abs().flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    scales = flat.amax(1)
    inverse = torch.where(scales >= LEAST, 1.0 / scales, 0.0)
    y = (flat * inverse[:, None]).flatten()[: x.numel()].reshape(x.shape)
    first = 1 if signed else 2
    p, n = torch.full_like(y, DECADES[0]), torch.full_like(y, first)
    for d in range(1, 7):
        here = y >= DECADES[d - 1]
        p, n = torch.where(here, DECADES[d], p), torch.where(here, first << d, n)
    s = 0.9 * p / n
    i = torch.minimum(((y - 0.1 * p) / s - 0.5).floor().clamp(min=-1.0), n - 1.0).nan_to_num(-1.0)
    below, gap = 0.1 * p + (i + 0.5) * s, s
    under, over = i < 0, i == n - 1
    lowest = under & (n == first)
    below = torch.where(lowest, 0.0, torch.where(under, 0.1 * p - 0.1 * s, below))
    gap = torch.where(over, torch.where(n == first << 6, 0.5 * s, 3.0 * s), gap)
    gap = torch.where(lowest, 0.1 * p + 0.5 * s, torch.where(under, 0.6 * s, gap))
    place = 0.5 if random is None else random.float() * 2.0**-16
    q = (n + i).to(torch.int32) + (place * gap < y - below)
    if not signed:
        return (torch.where(x > 0, q.clamp(min=2), q) - 1).to(torch.uint8), scales
    return torch.where(x < 0, 127 - q.clamp(max=127), 127 + q).to(torch.uint8), scales


def halves(step: Tensor, tensor: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """16 random bits for each element, twice: for the first moment and for the second."""
    bits = stochastic.bits(step, tensor, like)
    return bits & 0xFFFF, bits >> 16
