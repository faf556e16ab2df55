// √Σx² over lists of tensors in one pass and one parallel region (mathematics: reference.py). Every element is read
// once, which is the bound. Squares are added in double: no order of fp32 additions to get wrong, no overflow. Each
// chunk's sum has its own place and the places are added in order, so the result does not depend on the threads.
#include <cmath>

#include "vector.h"

namespace {

constexpr int64_t CHUNK = 65536;  // elements: 256 KiB of fp32

// Four streams side by side: one alone leaves half of what the memory could deliver.
template <typename G>
TRITIUM_INLINE double squares(const G* __restrict x, int64_t n) {
  const int64_t part = n / 4;
  const G *__restrict a = x, *__restrict b = x + part, *__restrict c = x + 2 * part, *__restrict d = x + 3 * part;
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < part; ++i) {
    const double p = load(a + i), q = load(b + i), r = load(c + i), s = load(d + i);
    sum += (p * p + q * q) + (r * r + s * s);
  }
  for (int64_t i = 4 * part; i < n; ++i) sum += (double)load(x + i) * load(x + i);
  return sum;
}

}  // namespace

// How many doubles of scratch `global_norm` needs.
TRITIUM_EXPORT(int64_t, global_norm_chunks)(int64_t tensors, const int64_t* sizes) {
  int64_t chunks = 0;
  for (int64_t k = 0; k < tensors; ++k) chunks += (sizes[k] + CHUNK - 1) / CHUNK;
  return chunks;
}

// A list of `tensors` addresses of `sizes` elements each, with their dtype codes; sums: scratch as above; first_chunk:
// scratch of tensors + 1. Writes the norm to *result.
TRITIUM_EXPORT(void, global_norm)(int64_t tensors, const int64_t* sizes, const void* const* addresses,
                                  const int32_t* dtypes, int64_t* first_chunk, double* sums, float* result,
                                  int threads) {
  int64_t chunks = 0;  // tensor k owns chunks [first_chunk[k], first_chunk[k + 1])
  for (int64_t k = 0; k < tensors; ++k) {
    first_chunk[k] = chunks;
    chunks += (sizes[k] + CHUNK - 1) / CHUNK;
  }
  first_chunk[tensors] = chunks;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (chunks > 1)
  for (int64_t c = 0; c < chunks; ++c) {
    int64_t low = 0, high = tensors;  // the last tensor whose first chunk is ≤ c; empty tensors own none
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_chunk[middle] <= c ? low : high) = middle;
    }
    const int64_t at = (c - first_chunk[low]) * CHUNK, left = sizes[low] - at, n = left < CHUNK ? left : CHUNK;
    sums[c] = dtypes[low] == TRITIUM_F32 ? squares((const float*)addresses[low] + at, n)
                                         : squares((const bf16*)addresses[low] + at, n);
  }
  double sum = 0.0;
  for (int64_t c = 0; c < chunks; ++c) sum += sums[c];
  *result = (float)std::sqrt(sum);
}
