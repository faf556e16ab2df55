// Stochastic rounding by a counter; what it is for and its definition: kernels/lib/stochastic.py.
#pragma once

#include <cstdint>

#include "vector.h"

TRITIUM_INLINE uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Of elements of tensor k whose numbers have these upper 32 bits.
TRITIUM_INLINE uint32_t stream(uint32_t step, int64_t k, uint32_t upper) {
  return mix(mix(mix(step) + (uint32_t)k) + upper);
}

// random: 16 bits. A NaN stays one.
TRITIUM_INLINE bf16 round_bf16(float x, uint32_t random) {
  const int32_t cut = (int32_t)(float_bits(x) + random) >> 16;
  return bf16{(uint16_t)(x != x ? 0x7fc0 : cut)};
}
