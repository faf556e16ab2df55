// Element functions that compilers turn into vector code: plain arithmetic and selects, no calls, no branches.
#pragma once

#include <cstdint>

#include "tritium.h"

struct bf16 {
  uint16_t bits;
};

TRITIUM_INLINE uint32_t float_bits(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}

TRITIUM_INLINE float bits_float(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

// To nearest, ties to even. A NaN becomes the quiet NaN: rounding its bits could carry into infinity or the sign.
TRITIUM_INLINE bf16 round_bf16(float x) {
  const int32_t u = (int32_t)float_bits(x);  // signed: 32-bit vectors narrow faster
  const int32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return bf16{(uint16_t)(x != x ? 0x7fc0 : rounded)};
}

TRITIUM_INLINE float load(const float* p) { return *p; }
TRITIUM_INLINE float load(const bf16* p) { return bits_float((uint32_t)p->bits << 16); }
TRITIUM_INLINE void store(float* p, float x) { *p = x; }
TRITIUM_INLINE void store(bf16* p, float x) { *p = round_bf16(x); }

// e^x to 1 ulp for -87.33 ≤ x ≤ 88.02, 0 below that, NaN for NaN; larger x are the caller's mistake (softmax asks for
// x ≤ 0). x = n ln 2 + r with |r| ≤ ln 2 / 2; e^r = 1 + r + r² q(r), q minimax of degree 4 (relative error 0.05 ·
// 2^-24).
TRITIUM_INLINE float vector_exp(float x) {
  const float round_to_int = 12582912.0f;  // 1.5 · 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504f + round_to_int;
  const float n = shifted - round_to_int;
  // ln 2 in two parts, the first so short that its product with n is exact
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float q = 0.00138145986f;
  q = q * r + 0.00836871688f;
  q = q * r + 0.041668388f;
  q = q * r + 0.166665206f;
  q = q * r + 0.499999934f;
  const float e = (q * r) * r + r + 1.0f;
  const float scale = bits_float((float_bits(shifted) << 23) + 0x3f800000u);  // 2^n
  const float y = e * scale;
  return x < -87.33f ? 0.0f : y;
}

// 2^x to 1.3 ulp for -126 ≤ x ≤ 127, 0 below that, NaN for NaN; larger x are the caller's mistake. x = n + r with |r| ≤
// 1/2, both exact; 2^r = 1 + r q(r), q minimax of degree 5 (relative error 0.05 · 2^-24). F is float and U uint32_t, or
// vectors of these.
template <typename F, typename U>
TRITIUM_INLINE F exp2_of(F x) {
  const float round_to_int = 12582912.0f;  // as in vector_exp
  const F shifted = x + round_to_int;
  const F r = x - (shifted - round_to_int);
  F q = r * 0.000155946781f + 0.00134066434f;
  q = q * r + 0.00961769278f;
  q = q * r + 0.0555031039f;
  q = q * r + 0.240226522f;
  q = q * r + 0.693147242f;
  U bits;
  __builtin_memcpy(&bits, &shifted, sizeof(F));
  bits = (bits << 23) + 0x3f800000u;
  F scale;
  __builtin_memcpy(&scale, &bits, sizeof(F));
  const F y = (q * r + 1.0f) * scale;
  return x < -126.0f ? F{} : y;
}

TRITIUM_INLINE float vector_exp2(float x) { return exp2_of<float, uint32_t>(x); }

// tanh x to 2 ulp: an odd polynomial up to 0.625 (relative minimax), 1 - 2 / (e^2|x| + 1) beyond.
TRITIUM_INLINE float vector_tanh(float x) {
  const float a = __builtin_fabsf(x);
  const float z = x * x;
  float p = -0.00564831649f;
  p = p * z + 0.0205898265f;
  p = p * z + -0.0537251266f;
  p = p * z + 0.133312744f;
  p = p * z + -0.333332761f;
  const float small = x + x * z * p;
  const float large = __builtin_copysignf(1.0f - 2.0f / (vector_exp(2.0f * (a > 40.0f ? 40.0f : a)) + 1.0f), x);
  return a < 0.625f ? small : large;
}
