// √Σx² over lists of tensors in one pass and one parallel region (mathematics: reference.py). Every element is read
// once, which is the bound. Squares are added in double: no order of fp32 additions to get wrong, no overflow. Each
// chunk's sum has its own place and the places are added in order, so the result does not depend on the threads.
#include <cmath>

#include "chunks.h"
#include "vector.h"

namespace {

constexpr int64_t CHUNK = 65536;  // elements: 256 KiB of fp32

// Four streams side by side: with one alone it takes a fifth longer (two AVX-512 cores).
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

// Fills first_chunk (tensors + 1); returns how many doubles of scratch `global_norm` needs.
TRITIUM_EXPORT(int64_t, global_norm_chunks)(int64_t tensors, const int64_t* sizes, int64_t* first_chunk) {
  return cut(tensors, sizes, CHUNK, first_chunk);
}

// A list of `tensors` addresses of `sizes` elements each, with their dtype codes; first_chunk as
// `global_norm_chunks` filled it; sums: scratch of that many. Writes the norm to *result.
TRITIUM_EXPORT(void, global_norm)(int64_t tensors, const int64_t* sizes, const void* const* addresses,
                                  const int32_t* dtypes, const int64_t* first_chunk, double* sums, float* result,
                                  int threads) {
  const int64_t chunks = first_chunk[tensors];
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (chunks > 1)
  for (int64_t c = 0; c < chunks; ++c) {
    const auto [k, at, n] = piece(c, tensors, sizes, CHUNK, first_chunk);
    sums[c] = dtypes[k] == TRITIUM_F32 ? squares((const float*)addresses[k] + at, n)
                                       : squares((const bf16*)addresses[k] + at, n);
  }
  double sum = 0.0;
  for (int64_t c = 0; c < chunks; ++c) sum += sums[c];
  *result = (float)std::sqrt(sum);
}
