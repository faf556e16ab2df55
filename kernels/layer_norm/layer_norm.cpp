// LayerNorm over the last axis, forward and backward: N rows of width C. x and the weights each fp32 or bf16,
// arithmetic and statistics fp32. A row is read from memory once and then swept in the cache.
#include <cmath>

#include "vector.h"

namespace {

// Σ f(j) for j < n, in four streams: one running vector sum would wait for each addition to finish.
template <typename F>
TRITIUM_INLINE float sum(int64_t n, F f) {
  const int64_t q = n / 4;
  float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t j = 0; j < q; ++j) {
    a += f(j);
    b += f(q + j);
    c += f(2 * q + j);
    d += f(3 * q + j);
  }
  for (int64_t j = 4 * q; j < n; ++j) a += f(j);
  return (a + b) + (c + d);
}

template <typename X>
void forward(const X* x, int64_t row_stride, const float* weight, const float* bias, X* y, float* mean, float* rstd,
             int64_t N, int64_t C, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (N * C > 16384)
  for (int64_t i = 0; i < N; ++i) {
    const X* row = x + i * row_stride;
    X* out = y + i * C;
    const float m = sum(C, [&](int64_t j) { return load(row + j); }) / (float)C;
    // about the mean: E[x²] - mean² would cancel for rows far from zero
    const float variance = sum(C, [&](int64_t j) { return (load(row + j) - m) * (load(row + j) - m); }) / (float)C;
    const float r = 1.0f / std::sqrt(variance + eps);
    mean[i] = m;
    rstd[i] = r;
    if (bias) {
#pragma omp simd
      for (int64_t j = 0; j < C; ++j) store(out + j, (load(row + j) - m) * r * weight[j] + bias[j]);
    } else {
#pragma omp simd
      for (int64_t j = 0; j < C; ++j) store(out + j, (load(row + j) - m) * r * weight[j]);
    }
  }
}

// partial: (blocks, 2, C) fp32. Rows are cut into `blocks` runs whatever the number of threads, and the runs' sums are
// added in order: the weight gradients depend neither on the scheduling nor on the thread count.
template <typename X>
void backward(const X* dy, int64_t dy_stride, const X* x, int64_t x_stride, const float* weight, const float* mean,
              const float* rstd, X* dx, float* dweight, float* dbias, float* partial, int64_t blocks, int64_t N,
              int64_t C, int threads) {
#pragma omp parallel num_threads(threads) if (N * C > 16384)
  {
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      float* dw = partial + 2 * b * C;
      float* db = dw + C;
      for (int64_t j = 0; j < 2 * C; ++j) dw[j] = 0.0f;
      for (int64_t i = N * b / blocks; i < N * (b + 1) / blocks; ++i) {
        const X* g = dy + i * dy_stride;
        const X* row = x + i * x_stride;
        X* out = dx + i * C;
        const float m = mean[i], r = rstd[i];
        float along = 0.0f, level = 0.0f;  // Σ dŷ x̂ and Σ dŷ with dŷ = dy · weight
#pragma omp simd reduction(+ : along, level)
        for (int64_t j = 0; j < C; ++j) {
          const float d = load(g + j), h = (load(row + j) - m) * r;
          dw[j] += d * h;
          db[j] += d;
          const float wd = d * weight[j];
          along += wd * h;
          level += wd;
        }
        along /= (float)C;
        level /= (float)C;
#pragma omp simd
        for (int64_t j = 0; j < C; ++j) {
          const float h = (load(row + j) - m) * r;
          store(out + j, (load(g + j) * weight[j] - level - h * along) * r);
        }
      }
    }
    const int64_t width = 256, pieces = (C + width - 1) / width;
#pragma omp for schedule(static)
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t start = piece * width, n = C - start < width ? C - start : width;
      float dw[width], db[width];
      for (int64_t j = 0; j < n; ++j) dw[j] = db[j] = 0.0f;
      for (int64_t b = 0; b < blocks; ++b) {
        const float* from = partial + 2 * b * C + start;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          dw[j] += from[j];
          db[j] += from[C + j];
        }
      }
      for (int64_t j = 0; j < n; ++j) dweight[start + j] = dw[j];
      if (dbias)
        for (int64_t j = 0; j < n; ++j) dbias[start + j] = db[j];
    }
  }
}

}  // namespace

// x (N, C) with unit stride inside a row; weight, bias (C,), bias may be null; y (N, C) and mean, rstd (N,) are
// written.
TRITIUM_EXPORT(void, layer_norm_forward)(int dtype, const void* x, int64_t row_stride, const float* weight,
                                         const float* bias, void* y, float* mean, float* rstd, int64_t N, int64_t C,
                                         float eps, int threads) {
  if (dtype == TRITIUM_F32) {
    forward((const float*)x, row_stride, weight, bias, (float*)y, mean, rstd, N, C, eps, threads);
  } else {
    forward((const bf16*)x, row_stride, weight, bias, (bf16*)y, mean, rstd, N, C, eps, threads);
  }
}

// dx (N, C), dweight, dbias (C,) are written, dbias may be null; partial: (blocks, 2, C) scratch, 1 ≤ blocks ≤ max(N,
// 1).
TRITIUM_EXPORT(void, layer_norm_backward)(int dtype, const void* dy, int64_t dy_stride, const void* x, int64_t x_stride,
                                          const float* weight, const float* mean, const float* rstd, void* dx,
                                          float* dweight, float* dbias, float* partial, int64_t blocks, int64_t N,
                                          int64_t C, int threads) {
#define RUN(X)                                                                                                  \
  backward((const X*)dy, dy_stride, (const X*)x, x_stride, weight, mean, rstd, (X*)dx, dweight, dbias, partial, \
           blocks, N, C, threads)
  dtype == TRITIUM_F32 ? RUN(float) : RUN(bf16);
#undef RUN
}
