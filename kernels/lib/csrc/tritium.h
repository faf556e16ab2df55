// Shared by the native kernels. Each kernels/*/*.cpp is compiled once per instruction set (see CMakeLists.txt), so everything here is
// static: an inline function with external linkage, compiled for AVX-512, could be the copy the linker keeps for every instruction set.
#pragma once

#define TRITIUM_ABI 1  // raise with any change of a signature; kernels/lib/native.py holds the same number

#define TRITIUM_VISIBLE extern "C" __attribute__((visibility("default")))
#define TRITIUM_PASTE_(name, isa) name##_##isa
#define TRITIUM_PASTE(name, isa) TRITIUM_PASTE_(name, isa)
// TRITIUM_EXPORT(int, layer_norm_forward)(args) { ... } defines layer_norm_forward_base, ..._v3, ..._v4
#define TRITIUM_EXPORT(type, name) TRITIUM_VISIBLE type TRITIUM_PASTE(name, TRITIUM_ISA)
