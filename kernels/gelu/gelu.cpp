// gelu by the tanh approximation, forward and backward, over n elements, each fp32 or bf16; arithmetic in fp32.
#include "vector.h"

namespace {

// σ(2u) = (1 + tanh u) / 2 with u = √(2/π)(x + 0.044715 x³), as 1 / (1 + 2^t) with t = -2u log₂e; 0 where 2^t exceeds
// fp32, as the tanh gives it. A NaN stays one: both comparisons are false for it.
TRITIUM_INLINE float gate(float x, float square) {
  const float t = x * (-2.30220819f - 0.102943240f * square);
  const float e = vector_exp2(t > 126.0f ? 126.0f : t);
  return t > 126.0f ? 0.0f : 1.0f / (1.0f + e);
}

template <typename X>
TRITIUM_INLINE void forward(const X* x, X* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float v = load(x + i);
    store(y + i, v * gate(v, v * v));
  }
}

// dx = dy (s + x s (1 - s) 2u'), s the gate and 2u' = 2√(2/π)(1 + 3 · 0.044715 x²)
template <typename X>
TRITIUM_INLINE void backward(const X* dy, const X* x, X* dx, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float v = load(x + i), square = v * v, s = gate(v, square);
    const float inner = 1.59576912f + 0.214064344f * square;
    // far out 1 - s or s is 0 and the cubic may overflow: 0 · ∞ must not make NaN of a finite x
    const float bend = s * (1.0f - s);
    const float slope = s + (bend == 0.0f ? 0.0f : v * bend * inner);
    store(dx + i, load(dy + i) * slope);
  }
}

const int64_t CHUNK = 8192;  // elements a thread takes at a time: 32 KB and 64 KB of the two or three streams

template <typename F>
TRITIUM_INLINE void chunked(int64_t n, int threads, F f) {
  const int64_t chunks = (n + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads) if (n > 16384)
  for (int64_t c = 0; c < chunks; ++c) f(c * CHUNK, n - c * CHUNK < CHUNK ? n - c * CHUNK : CHUNK);
}

}  // namespace

// x, y: n elements each, contiguous, of one dtype.
TRITIUM_EXPORT(void, gelu_forward)(int dtype, const void* x, void* y, int64_t n, int threads) {
  chunked(n, threads, [=](int64_t at, int64_t count) {
    dtype == TRITIUM_F32 ? forward((const float*)x + at, (float*)y + at, count)
                         : forward((const bf16*)x + at, (bf16*)y + at, count);
  });
}

// dy, x, dx: n elements each, contiguous, of one dtype.
TRITIUM_EXPORT(void, gelu_backward)(int dtype, const void* dy, const void* x, void* dx, int64_t n, int threads) {
  chunked(n, threads, [=](int64_t at, int64_t count) {
    dtype == TRITIUM_F32 ? backward((const float*)dy + at, (const float*)x + at, (float*)dx + at, count)
                         : backward((const bf16*)dy + at, (const bf16*)x + at, (bf16*)dx + at, count);
  });
}
