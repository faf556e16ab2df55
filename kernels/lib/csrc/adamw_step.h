// What a step of AdamW needs of its scalars: shared by adamw and adamw_8bit.
#pragma once

#include <cmath>

#include "tritium.h"

struct Step {
  float rest1, beta2, rest2, eps;  // 1 - β1, β2, 1 - β2, each rounded once: 1 - (float)0.999 would be 1e-5 off
  float decay, rate, unbias;       // 1 - lr·λ, lr / (1 - β1ᵗ), 1 / √(1 - β2ᵗ)
  float grad_scale;
};

TRITIUM_INLINE Step step_of(double lr, double t, float grad_scale, double beta1, double beta2, double eps,
                            double weight_decay) {
  return {(float)(1.0 - beta1),
          (float)beta2,
          (float)(1.0 - beta2),
          (float)eps,
          (float)(1.0 - lr * weight_decay),
          (float)(lr / (1.0 - std::pow(beta1, t))),
          (float)(1.0 / std::sqrt(1.0 - std::pow(beta2, t))),
          grad_scale};
}
