// One AdamW step over lists of tensors in one pass and one parallel region (mathematics: reference.py): 28 bytes per
// element with bf16 gradients and copies (read p, m, v, g; write p, m, v, copy), which is the bound.
#include <cmath>

#include "chunks.h"
#include "vector.h"

namespace {

// Elements, 0.5 MB of p, m, v, g: small enough to balance the threads, large enough to hide the handing out.
constexpr int64_t CHUNK = 32768;

struct Step {
  float rest1, beta2, rest2, eps;  // 1 - β1, β2, 1 - β2, each rounded once: 1 - (float)0.999 would be 1e-5 off
  float decay, rate, unbias;       // 1 - lr·λ, lr / (1 - β1ᵗ), 1 / √(1 - β2ᵗ)
  float grad_scale;
};

template <typename G, typename S>
TRITIUM_INLINE void update(float* __restrict p, S* __restrict copy, const G* __restrict grad, float* __restrict m,
                           float* __restrict v, int64_t n, const Step& s) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float g = load(grad + i) * s.grad_scale;
    const float mean = m[i] + s.rest1 * (g - m[i]);
    const float square = s.beta2 * v[i] + s.rest2 * g * g;
    const float value = p[i] * s.decay - s.rate * mean / (std::sqrt(square) * s.unbias + s.eps);
    m[i] = mean;
    v[i] = square;
    p[i] = value;
    if (copy) store(copy + i, value);
  }
}

}  // namespace

// Five lists of `tensors` addresses of `sizes` elements each; params, exp_avgs, exp_avg_sqs are fp32, grads and copies
// (if there are any) as their dtype codes say. lr, step, grad_scale and skip are read here, so the caller never waits
// for them.
TRITIUM_EXPORT(void, adamw)(int64_t tensors, int has_copies, const int64_t* sizes, float* const* params,
                            void* const* copies, const void* const* grads, float* const* exp_avgs,
                            float* const* exp_avg_sqs, const int32_t* copy_dtypes, const int32_t* grad_dtypes,
                            const float* lr, const float* step, const float* grad_scale, const float* skip,
                            double beta1, double beta2, double eps, double weight_decay, int64_t* first_chunk,
                            int threads) {
  if (*skip != 0.0f) return;
  const double t = *step, rate = *lr;
  const Step s{(float)(1.0 - beta1),
               (float)beta2,
               (float)(1.0 - beta2),
               (float)eps,
               (float)(1.0 - rate * weight_decay),
               (float)(rate / (1.0 - std::pow(beta1, t))),
               (float)(1.0 / std::sqrt(1.0 - std::pow(beta2, t))),
               *grad_scale};
  const int64_t chunks = cut(tensors, sizes, CHUNK, first_chunk);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (chunks > 1)
  for (int64_t c = 0; c < chunks; ++c) {
    const auto [k, at, n] = piece(c, tensors, sizes, CHUNK, first_chunk);
    void* copy = has_copies ? copies[k] : nullptr;
#define RUN(G, S)                                                                                   \
  update(params[k] + at, copy ? (S*)copy + at : nullptr, (const G*)grads[k] + at, exp_avgs[k] + at, \
         exp_avg_sqs[k] + at, n, s)
    if (grad_dtypes[k] == TRITIUM_F32) {
      copy&& copy_dtypes[k] == TRITIUM_BF16 ? RUN(float, bf16) : RUN(float, float);
    } else {
      copy&& copy_dtypes[k] == TRITIUM_F32 ? RUN(bf16, float) : RUN(bf16, bf16);
    }
#undef RUN
  }
}
