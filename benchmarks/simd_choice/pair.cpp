#include "tile.h"
#define BODY "pair_body.inc"
#include "each_target.h"

// What a library would call once and keep; libgcc's table includes whether the OS saves the state.
TileKernel best_kernel() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return avx512::kernel;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::kernel;
  return sse2::kernel;
}

extern const Variant kPair[] = {{"vector_pair", "sse2", sse2::kernel},
                                {"vector_pair", "avx2", avx2::kernel},
                                {"vector_pair", "avx512", avx512::kernel}};
extern const Elementwise kExp[] = {sse2::exp_all, avx2::exp_all, avx512::exp_all};
extern const Elementwise kLog[] = {sse2::log_all, avx2::log_all, avx512::log_all};
