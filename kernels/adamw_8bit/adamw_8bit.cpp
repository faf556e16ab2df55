// adamw_8bit in one pass and one parallel region (mathematics: reference.py; the codes: kernels/lib/dynamic_code.py).
// A block of 256 elements is updated into local memory, which its largest moments are found in, and then made codes of:
// 16 bytes an element with bf16 gradients and copies (read p, g, codes; write p, copy, codes).
#include <cmath>

#include "adamw_step.h"
#include "chunks.h"
#include "stochastic.h"
#include "vector.h"

namespace {

constexpr int64_t BLOCK = 256, CHUNK = 128 * BLOCK;
// Written out, with no table and no loop inside: a compiler makes vector code of the loops over elements then.
// 10ᵈ⁻⁶, where FIRST, the number of values of decade 0, times 2ᵈ is n
template <int FIRST>
TRITIUM_INLINE float decade(float n) {
  float p = n >= FIRST * 64 ? 1.0f : 1e-1f;
  p = n < FIRST * 32 ? 1e-2f : p;
  p = n < FIRST * 16 ? 1e-3f : p;
  p = n < FIRST * 8 ? 1e-4f : p;
  p = n < FIRST * 4 ? 1e-5f : p;
  return n < FIRST * 2 ? 1e-6f : p;
}

// Its reciprocal.
template <int FIRST>
TRITIUM_INLINE float per_decade(float n) {
  float p = n >= FIRST * 64 ? 1.0f : 1e1f;
  p = n < FIRST * 32 ? 1e2f : p;
  p = n < FIRST * 16 ? 1e3f : p;
  p = n < FIRST * 8 ? 1e4f : p;
  p = n < FIRST * 4 ? 1e5f : p;
  return n < FIRST * 2 ? 1e6f : p;
}

// Of a power of two, exactly; a division takes as long as ten multiplications.
TRITIUM_INLINE float per(float power) { return bits_float(0x7f000000u - float_bits(power)); }

// Codes as int32: of uint8 they would be narrowed and widened between the steps.
template <bool SIGNED>
TRITIUM_INLINE float decode(int32_t code) {
  constexpr int FIRST = SIGNED ? 1 : 2;
  const int32_t q = SIGNED ? (code < 127 ? 127 - code : code - 127) : code + 1;
  const float x = (float)q;
  const float n = bits_float(float_bits(x) & 0x7f800000u);  // the power of two at or below it
  const float value = decade<FIRST>(n) * (0.1f + 0.9f * (x - n + 0.5f) * per(n));
  float magnitude = q == FIRST * 128 ? 1.0f : value;
  magnitude = q < FIRST ? 0.0f : magnitude;
  return SIGNED && code < 127 ? -magnitude : magnitude;
}

template <bool SIGNED>
TRITIUM_INLINE int32_t encode(float x, float inverse, uint32_t random) {
  constexpr int FIRST = SIGNED ? 1 : 2;
  const float y = __builtin_fabsf(x) * inverse;
  float n = y >= 1e-6f ? FIRST * 2.0f : FIRST * 1.0f;
  n = y >= 1e-5f ? FIRST * 4.0f : n;
  n = y >= 1e-4f ? FIRST * 8.0f : n;
  n = y >= 1e-3f ? FIRST * 16.0f : n;
  n = y >= 1e-2f ? FIRST * 32.0f : n;
  n = y >= 1e-1f ? FIRST * 64.0f : n;
  const float p = decade<FIRST>(n), s = 0.9f * p * per(n), start = 0.1f * p;
  const float place = (y - start) * (n * per_decade<FIRST>(n) * (1.0f / 0.9f)) + 63.5f;  // from 64 on: truncation is the floor
  const float least = place > 63.0f ? place : 63.0f;
  const float floored = (float)(int32_t)least - 64.0f, last = n - 1.0f;
  const float i = floored < last ? floored : last;
  const float inside = start + (i + 0.5f) * s, before = start - 0.1f * s, first = start + 0.5f * s;
  const float past = n == FIRST * 64.0f ? 0.5f : 3.0f, lowest = n + i;  // of zero: FIRST - 1
  float below = i < 0.0f ? before : inside;
  float width = i < 0.0f ? 0.6f : 1.0f;
  width = i == last ? past : width;
  float gap = width * s;
  below = lowest < FIRST ? 0.0f : below;
  gap = lowest < FIRST ? first : gap;
  const float up = lowest + 1.0f, reached = (float)(int32_t)random * 0x1p-16f * gap;
  const int32_t q = (int32_t)(reached < y - below ? up : lowest);
  if (SIGNED) {
    const int32_t positive = 127 + q, negative = q < 127 ? 127 - q : 0;
    return x < 0.0f ? negative : positive;
  }
  const int32_t least_code = x > 0.0f ? 1 : 0, code = q - 1;
  return code < least_code ? least_code : code;
}

TRITIUM_INLINE float inverse_of(float scale) { return scale >= 0x1p-126f ? 1.0f / scale : 0.0f; }

// One block of n ≤ 256 elements; first, random: as in adamw.cpp.
template <typename G, typename S>
TRITIUM_INLINE void update(float* __restrict p, S* __restrict copy, const G* __restrict grad, uint8_t* __restrict m,
                           uint8_t* __restrict v, float* __restrict m_scale, float* __restrict v_scale, int64_t n,
                           const Step& s, uint32_t first, uint32_t random) {
  float means[BLOCK], squares[BLOCK];
  int32_t m_codes[BLOCK], v_codes[BLOCK];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) m_codes[i] = m[i], v_codes[i] = v[i];
  const float old_m = *m_scale, old_v = *v_scale;
  uint32_t most_m = 0, most_v = 0;  // as bits: a NaN is above everything
#pragma omp simd reduction(max : most_m, most_v)
  for (int64_t i = 0; i < n; ++i) {
    const float g = load(grad + i) * s.grad_scale;
    const float last = decode<true>(m_codes[i]) * old_m;
    const float mean = last + s.rest1 * (g - last);
    const float square = s.beta2 * (decode<false>(v_codes[i]) * old_v) + s.rest2 * g * g;
    const float value = p[i] * s.decay - s.rate * mean / (std::sqrt(square) * s.unbias + s.eps);
    p[i] = value;
    if (copy) store(copy + i, value);
    means[i] = mean;
    squares[i] = square;
    const uint32_t a = float_bits(mean) & 0x7fffffffu, b = float_bits(square) & 0x7fffffffu;
    most_m = a > most_m ? a : most_m;
    most_v = b > most_v ? b : most_v;
  }
  *m_scale = bits_float(most_m);
  *v_scale = bits_float(most_v);
  const float per_m = inverse_of(*m_scale), per_v = inverse_of(*v_scale);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = mix((first + (uint32_t)i) ^ random);
    m_codes[i] = encode<true>(means[i], per_m, bits & 0xffff);
    v_codes[i] = encode<false>(squares[i], per_v, bits >> 16);
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) m[i] = (uint8_t)m_codes[i], v[i] = (uint8_t)v_codes[i];
}

}  // namespace

// Seven lists of `tensors` addresses; params fp32, codes uint8, of `sizes` elements each; scales fp32, one for 256 of
// them; grads and copies (if there are any) as their dtype codes say. The scalars are read here.
TRITIUM_EXPORT(void, adamw_8bit)(int64_t tensors, int has_copies, const int64_t* sizes, float* const* params,
                                 void* const* copies, const void* const* grads, uint8_t* const* exp_avgs,
                                 uint8_t* const* exp_avg_sqs, float* const* exp_avg_scales,
                                 float* const* exp_avg_sq_scales, const int32_t* copy_dtypes,
                                 const int32_t* grad_dtypes, const float* lr, const float* step,
                                 const float* grad_scale, const float* skip, double beta1, double beta2, double eps,
                                 double weight_decay, int64_t* first_chunk, int threads) {
  if (*skip != 0.0f) return;
  const double t = *step;
  const Step s = step_of(*lr, t, *grad_scale, beta1, beta2, eps, weight_decay);
  const int64_t chunks = cut(tensors, sizes, CHUNK, first_chunk);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (chunks > 1)
  for (int64_t c = 0; c < chunks; ++c) {
    const auto [k, start, length] = piece(c, tensors, sizes, CHUNK, first_chunk);
    void* copy = has_copies ? copies[k] : nullptr;
    const uint32_t random = stream((uint32_t)t, k, (uint32_t)(start >> 32));
    for (int64_t at = start; at < start + length; at += BLOCK) {
      const int64_t left = start + length - at, n = left < BLOCK ? left : BLOCK, block = at / BLOCK;
#define RUN(G, S)                                                                                              \
  update(params[k] + at, copy ? (S*)copy + at : nullptr, (const G*)grads[k] + at, exp_avgs[k] + at,            \
         exp_avg_sqs[k] + at, exp_avg_scales[k] + block, exp_avg_sq_scales[k] + block, n, s, (uint32_t)at, random)
      if (grad_dtypes[k] == TRITIUM_F32) {
        copy&& copy_dtypes[k] == TRITIUM_BF16 ? RUN(float, bf16) : RUN(float, float);
      } else {
        copy&& copy_dtypes[k] == TRITIUM_F32 ? RUN(bf16, float) : RUN(bf16, bf16);
      }
#undef RUN
    }
  }
}
