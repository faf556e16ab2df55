// The element functions of csrc/vector.h over arrays, so that the tests can measure their errors on every instruction
// set.
#include "vector.h"

TRITIUM_EXPORT(void, elementary)(int function, const float* x, float* y, int64_t n) {
  if (function == 0) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = vector_exp(x[i]);
  } else if (function == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = vector_tanh(x[i]);
  } else if (function == 3) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = vector_exp2(x[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const bf16 rounded = round_bf16(x[i]);
      y[i] = load(&rounded);
    }
  }
}
