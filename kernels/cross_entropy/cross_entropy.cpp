// Softmax cross-entropy over rows of logits, forward and backward (mathematics: reference.py). Logits fp32 or bf16,
// arithmetic fp32. N rows, V real vocabulary, Vp ≥ V columns. The forward reads the logits once: each block of a row is
// reduced while it lies in the first-level cache, and the blocks' (maximum, Σ exp) are merged in double. The backward
// reads once more and writes once.
#include <cmath>

#include "vector.h"

namespace {

constexpr int64_t BLOCK = 1024;

struct Options {
  int64_t V, Vp, ignore_index;
  float label_smoothing, z_loss, softcap;
};

template <bool CAP>
TRITIUM_INLINE float capped(float x, float softcap) {
  return CAP ? softcap * vector_tanh(x / softcap) : x;
}

// The row's lse, and Σ z when label smoothing wants it.
template <typename T, bool CAP>
TRITIUM_INLINE void statistics(const T* row, const Options& o, double* lse, double* total) {
  float z[BLOCK];
  double maximum = -INFINITY, sum = 0.0, z_sum = 0.0;
  for (int64_t start = 0; start < o.V; start += BLOCK) {
    const int64_t n = o.V - start < BLOCK ? o.V - start : BLOCK;
    float peak = -INFINITY;
#pragma omp simd reduction(max : peak)
    for (int64_t j = 0; j < n; ++j) {
      z[j] = capped<CAP>(load(row + start + j), o.softcap);
      peak = z[j] > peak ? z[j] : peak;
    }
    if (o.label_smoothing > 0.0f) {
      float block_sum = 0.0f;
#pragma omp simd reduction(+ : block_sum)
      for (int64_t j = 0; j < n; ++j) block_sum += z[j];
      z_sum += block_sum;
    }
    // a block of -inf alone adds nothing (-inf - -inf would make it NaN); a NaN never is the peak but stays in the sum
    const float offset = peak == -INFINITY ? 0.0f : peak;
    float block_sum = 0.0f;
#pragma omp simd reduction(+ : block_sum)
    for (int64_t j = 0; j < n; ++j) block_sum += vector_exp(z[j] - offset);
    if (peak > maximum) {
      sum = (sum > 0.0 ? sum * std::exp(maximum - peak) : sum) + block_sum;
      maximum = peak;
    } else {
      sum += peak == -INFINITY ? block_sum : block_sum * std::exp(peak - maximum);
    }
  }
  *lse = maximum == INFINITY ? maximum : maximum + std::log(sum);  // ∞ - ∞ has made the sum NaN
  *total = z_sum;
}

template <typename T, bool CAP>
TRITIUM_INLINE float loss_of(const T* row, int64_t target, const Options& o, float* lse_out) {
  double lse, total;
  statistics<T, CAP>(row, o, &lse, &total);
  const double smoothing = o.label_smoothing;
  double loss = lse - (double)capped<CAP>(load(row + target), o.softcap);
  if (smoothing > 0.0) loss = (1.0 - smoothing) * loss + smoothing * (lse - total / (double)o.V);
  if (o.z_loss > 0.0f) loss += (double)o.z_loss * lse * lse;
  *lse_out = (float)lse;
  return (float)loss;
}

// out = g · d loss / d logits. out may be the row itself.
template <typename T, bool CAP>
TRITIUM_INLINE void gradient(const T* row, int64_t target, float lse, float g, const Options& o, T* out) {
  const float true_logit = load(row + target);  // before `out`, which may be the row, is written
  // an option of 0 takes no part: times an infinite lse or g it would be NaN
  const float scale = o.z_loss > 0.0f ? g * (1.0f + 2.0f * o.z_loss * lse) : g;
  const float level = o.label_smoothing > 0.0f ? g * o.label_smoothing / (float)o.V : 0.0f;
#pragma omp simd
  for (int64_t j = 0; j < o.V; ++j) {
    const float z = capped<CAP>(load(row + j), o.softcap);
    float d = scale * vector_exp(z - lse) - level;
    if (CAP) {
      const float t = z / o.softcap;
      d *= 1.0f - t * t;
    }
    store(out + j, d);
  }
  const float z = capped<CAP>(true_logit, o.softcap);
  float d = scale * std::exp(z - lse) - level - g * (1.0f - o.label_smoothing);
  if (CAP) d *= 1.0f - (z / o.softcap) * (z / o.softcap);
  store(out + target, d);
  for (int64_t j = o.V; j < o.Vp; ++j) store(out + j, 0.0f);
}

template <typename T>
TRITIUM_INLINE void zero(T* out, int64_t n) {
  for (int64_t j = 0; j < n; ++j) store(out + j, 0.0f);
}

// The first row whose target is neither a token nor ignore_index, else -1. Every kernel asks before it reads any logit.
int64_t bad_target(const int64_t* targets, int64_t N, const Options& o) {
  for (int64_t i = 0; i < N; ++i)
    if (targets[i] != o.ignore_index && (targets[i] < 0 || targets[i] >= o.V)) return i;
  return -1;
}

template <typename T, bool CAP>
void forward(const T* logits, int64_t stride, const int64_t* targets, int64_t N, const Options& o, float* losses,
             float* lse, int threads) {
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (N * o.V > 16384)
  for (int64_t i = 0; i < N; ++i) {
    if (targets[i] == o.ignore_index) {
      losses[i] = lse[i] = 0.0f;
    } else {
      losses[i] = loss_of<T, CAP>(logits + i * stride, targets[i], o, lse + i);
    }
  }
}

template <typename T, bool CAP>
void backward(const T* logits, int64_t stride, const int64_t* targets, int64_t N, const Options& o, const float* lse,
              const float* dlosses, int64_t dlosses_stride, T* dlogits, int threads) {
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (N * o.V > 16384)
  for (int64_t i = 0; i < N; ++i) {
    T* out = dlogits + i * o.Vp;
    if (targets[i] == o.ignore_index) {
      zero(out, o.Vp);
    } else {
      gradient<T, CAP>(logits + i * stride, targets[i], lse[i], dlosses[i * dlosses_stride], o, out);
    }
  }
}

template <typename T, bool CAP>
void in_place(T* logits, int64_t stride, const int64_t* targets, int64_t N, const Options& o, float* losses,
              int threads) {
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (N * o.V > 16384)
  for (int64_t i = 0; i < N; ++i) {
    T* row = logits + i * stride;
    if (targets[i] == o.ignore_index) {
      losses[i] = 0.0f;
      zero(row, o.Vp);
    } else {
      float lse;
      losses[i] = loss_of<T, CAP>(row, targets[i], o, &lse);
      gradient<T, CAP>(row, targets[i], lse, 1.0f, o, row);
    }
  }
}

}  // namespace

#define DISPATCH(RUN)                                      \
  if (dtype == TRITIUM_F32) {                              \
    softcap > 0.0f ? RUN(float, true) : RUN(float, false); \
  } else {                                                 \
    softcap > 0.0f ? RUN(bf16, true) : RUN(bf16, false);   \
  }

// All three return -1, or the first row with a target outside [0, V) that is not ignore_index; then nothing has been
// written. logits (N, Vp): unit stride inside a row, `stride` elements between rows. targets, losses, lse (N,).
TRITIUM_EXPORT(int64_t, cross_entropy_forward)(int dtype, const void* logits, int64_t stride, const int64_t* targets,
                                               int64_t N, int64_t Vp, int64_t V, int64_t ignore_index,
                                               float label_smoothing, float z_loss, float softcap, float* losses,
                                               float* lse, int threads) {
  const Options o{V, Vp, ignore_index, label_smoothing, z_loss, softcap};
  const int64_t bad = bad_target(targets, N, o);
  if (bad >= 0) return bad;
#define RUN(T, CAP) forward<T, CAP>((const T*)logits, stride, targets, N, o, losses, lse, threads)
  DISPATCH(RUN)
#undef RUN
  return -1;
}

// dlogits (N, Vp), contiguous, in the logits' dtype.
TRITIUM_EXPORT(int64_t, cross_entropy_backward)(int dtype, const void* logits, int64_t stride, const int64_t* targets,
                                                int64_t N, int64_t Vp, int64_t V, int64_t ignore_index,
                                                float label_smoothing, float z_loss, float softcap, const float* lse,
                                                const float* dlosses, int64_t dlosses_stride, void* dlogits,
                                                int threads) {
  const Options o{V, Vp, ignore_index, label_smoothing, z_loss, softcap};
  const int64_t bad = bad_target(targets, N, o);
  if (bad >= 0) return bad;
#define RUN(T, CAP) \
  backward<T, CAP>((const T*)logits, stride, targets, N, o, lse, dlosses, dlosses_stride, (T*)dlogits, threads)
  DISPATCH(RUN)
#undef RUN
  return -1;
}

// Writes the losses and overwrites the logits with d(Σ losses)/d logits: for linear_cross_entropy, whose logits nobody
// else sees.
TRITIUM_EXPORT(int64_t, cross_entropy_in_place)(int dtype, void* logits, int64_t stride, const int64_t* targets,
                                                int64_t N, int64_t Vp, int64_t V, int64_t ignore_index,
                                                float label_smoothing, float z_loss, float softcap, float* losses,
                                                int threads) {
  const Options o{V, Vp, ignore_index, label_smoothing, z_loss, softcap};
  const int64_t bad = bad_target(targets, N, o);
  if (bad >= 0) return bad;
#define RUN(T, CAP) in_place<T, CAP>((T*)logits, stride, targets, N, o, losses, threads)
  DISPATCH(RUN)
#undef RUN
  return -1;
}
