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
