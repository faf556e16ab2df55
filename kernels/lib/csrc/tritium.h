// Shared by the native kernels. Each kernels/*/*.cpp is compiled once per instruction set (CMakeLists.txt), so
// everything here has internal linkage: of an inline function with external linkage the linker keeps one copy, perhaps
// the AVX-512 one, for all sets.
#pragma once

#include <cstdint>

#define TRITIUM_ABI 9  // raise it with any change of an exported signature; kernels/lib/native.py holds the same number

#define TRITIUM_VISIBLE extern "C" __attribute__((visibility("default")))
#define TRITIUM_PASTE_(name, isa) name##_##isa
#define TRITIUM_PASTE(name, isa) TRITIUM_PASTE_(name, isa)
// TRITIUM_EXPORT(int64_t, adamw)(args) { ... } defines adamw_base, adamw_v3, adamw_v4, adamw_v4_bf16
#define TRITIUM_EXPORT(type, name) TRITIUM_VISIBLE type TRITIUM_PASTE(name, TRITIUM_ISA)
#define TRITIUM_INLINE static inline __attribute__((always_inline))

// dtype codes, as in kernels/lib/native.py
enum { TRITIUM_F32 = 0, TRITIUM_BF16 = 1 };
