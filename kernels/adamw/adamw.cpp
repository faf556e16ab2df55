// One AdamW step over lists of tensors in one pass and one parallel region (mathematics: reference.py): 28 bytes per
// element with bf16 gradients and copies (read p, m, v, g; write p, m, v, copy), 20 with moments in bf16, which is the
// bound.
#include <cmath>

#include "adamw_step.h"
#include "chunks.h"
#include "stochastic.h"
#include "vector.h"

namespace {

// Elements, 0.5 MB of p, m, v, g: small enough to balance the threads, large enough to hide the handing out.
constexpr int64_t CHUNK = 32768;

TRITIUM_INLINE void keep(float* moment, float x, uint32_t) { *moment = x; }
TRITIUM_INLINE void keep(bf16* moment, float x, uint32_t random) { *moment = round_bf16(x, random); }

// first: the lower 32 bits of the first element's number in its tensor; random: its stream
template <typename G, typename S, typename M>
TRITIUM_INLINE void update(float* __restrict p, S* __restrict copy, const G* __restrict grad, M* __restrict m,
                           M* __restrict v, int64_t n, const Step& s, uint32_t first, uint32_t random) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float g = load(grad + i) * s.grad_scale;
    const float last = load(m + i);
    const float mean = last + s.rest1 * (g - last);
    const float square = s.beta2 * load(v + i) + s.rest2 * g * g;
    const float value = p[i] * s.decay - s.rate * mean / (std::sqrt(square) * s.unbias + s.eps);
    const uint32_t bits = sizeof(M) == 2 ? mix((first + (uint32_t)i) ^ random) : 0;
    keep(m + i, mean, bits & 0xffff);
    keep(v + i, square, bits >> 16);
    p[i] = value;
    if (copy) store(copy + i, value);
  }
}

}  // namespace

// Five lists of `tensors` addresses of `sizes` elements each; params are fp32, exp_avgs and exp_avg_sqs all of
// moment_dtype, grads and copies (if there are any) as their dtype codes say. lr, step, grad_scale and skip are read
// here, so the caller never waits for them.
TRITIUM_EXPORT(void, adamw)(int64_t tensors, int has_copies, const int64_t* sizes, float* const* params,
                            void* const* copies, const void* const* grads, void* const* exp_avgs,
                            void* const* exp_avg_sqs, const int32_t* copy_dtypes, const int32_t* grad_dtypes,
                            int moment_dtype, const float* lr, const float* step, const float* grad_scale,
                            const float* skip, double beta1, double beta2, double eps, double weight_decay,
                            int64_t* first_chunk, int threads) {
  if (*skip != 0.0f) return;
  const double t = *step;
  const Step s = step_of(*lr, t, *grad_scale, beta1, beta2, eps, weight_decay);
  const int64_t chunks = cut(tensors, sizes, CHUNK, first_chunk);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (chunks > 1)
  for (int64_t c = 0; c < chunks; ++c) {
    const auto [k, at, n] = piece(c, tensors, sizes, CHUNK, first_chunk);
    void* copy = has_copies ? copies[k] : nullptr;
    const uint32_t first = (uint32_t)at, random = stream((uint32_t)t, k, (uint32_t)(at >> 32));
#define UPDATE(G, S, M)                                                                                   \
  update(params[k] + at, copy ? (S*)copy + at : nullptr, (const G*)grads[k] + at, (M*)exp_avgs[k] + at, \
         (M*)exp_avg_sqs[k] + at, n, s, first, random)
#define RUN(G, S) moment_dtype == TRITIUM_BF16 ? UPDATE(G, S, bf16) : UPDATE(G, S, float)
    if (grad_dtypes[k] == TRITIUM_F32) {
      copy&& copy_dtypes[k] == TRITIUM_BF16 ? (RUN(float, bf16)) : (RUN(float, float));
    } else {
      copy&& copy_dtypes[k] == TRITIUM_F32 ? (RUN(bf16, float)) : (RUN(bf16, bf16));
    }
#undef RUN
#undef UPDATE
  }
}
