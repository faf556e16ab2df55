"""Mathematics shared by Triton kernels of several ops."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x·LOG2E), and exp2 is one instruction
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """tanh in fp32 to 4e-7 relative: by exp2 where |x| is large, by its series where 1 - 2/(e²ˣ + 1) would cancel."""
    x2 = x * x
    series = x * (1 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, 1 - 2 / (tl.exp2(x * (2 * LOG2E)) + 1))


# stochastic rounding by a counter: kernels/lib/stochastic.py says what these are


@triton.jit
def mix(x):
    """x: uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def stream(step, tensor, first):
    """Of the elements from ``first`` (int64) on that have its upper 32 bits. step: fp32; tensor: int32."""
    seed = mix(mix(step.to(tl.int32).to(tl.uint32)) + tensor.to(tl.uint32))
    return mix(seed + (first >> 32).to(tl.uint32))


@triton.jit
def cut_to_bf16(x, random):
    """fp32 that bf16 holds exactly: x, rounded stochastically by 16 random bits (uint32)."""
    bits = (x.to(tl.uint32, bitcast=True) + random) & 0xFFFF0000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
