// The kernels for processors with AVX512.
#if defined(__x86_64__)
#define FASTMT_ISA avx512
#define FASTMT_LANES 16

#include "cpu/standard.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#endif

#include "cpu/kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
