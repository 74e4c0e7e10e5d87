// One function compiled for several instruction sets, and the processor's choice among them by number:
// 0 the compiler's default target, 1 AVX2, 2 AVX-512. Elsewhere than on x86-64 there is only 0.

#pragma once

#if defined(__x86_64__)
#include <cpuid.h>

// 25 is Zen 3 and 4, 26 Zen 5; 0 if not AMD's.
inline int amd_family() {
  unsigned a, b, c, d;
  __builtin_cpu_init();
  if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &a, &b, &c, &d)) return 0;
  return int((a >> 8) & 15) + int((a >> 20) & 255);
}

// DEFINE(name, attributes) of each.
#define EACH_ISA(DEFINE, name)                             \
  DEFINE(name##_plain, )                                   \
  DEFINE(name##_avx2, __attribute__((target("avx2,fma")))) \
  DEFINE(name##_avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))))
#define FOR_ISA(name, isa) for_isa(isa, name##_plain, name##_avx2, name##_avx512)
#else
#define EACH_ISA(DEFINE, name) DEFINE(name##_plain, )
#define FOR_ISA(name, isa) for_isa(isa, name##_plain, decltype(&name##_plain)(nullptr), decltype(&name##_plain)(nullptr))
#endif

// The function for this number, or null where the processor or the build has none.
template <typename Function>
Function* for_isa(int isa, Function* plain, Function* avx2, Function* avx512) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == 2)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
               ? avx512
               : nullptr;
  if (isa == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? avx2 : nullptr;
#else
  (void)avx2, (void)avx512;
#endif
  return isa == 0 ? plain : nullptr;
}
