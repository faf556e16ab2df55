// What the library says about itself.
#include "tritium.h"

TRITIUM_VISIBLE int tritium_abi() { return TRITIUM_ABI; }

// The instruction sets compiled in which this CPU has, best first, separated by commas.
TRITIUM_VISIBLE const char* tritium_isas() {
#if defined(TRITIUM_HAS_v3) || defined(TRITIUM_HAS_v4)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#ifdef TRITIUM_HAS_v4
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
#ifdef TRITIUM_HAS_v4_bf16
  if (v4 && __builtin_cpu_supports("avx512bf16")) return "v4_bf16,v4,v3,base";
#endif
  if (v4) return "v4,v3,base";
#endif
  if (v3) return "v3,base";
#endif
  return "base";
}

TRITIUM_VISIBLE int tritium_has_cuda() {
#ifdef TRITIUM_HAS_CUDA
  return 1;
#else
  return 0;
#endif
}
