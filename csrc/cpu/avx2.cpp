// The kernels for processors with AVX2.
#if defined(__x86_64__)
#define FASTMT_ISA avx2
#define FASTMT_LANES 8

#include "cpu/standard.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif

#include "cpu/kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
