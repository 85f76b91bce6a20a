// Takes the kernels of the widest instruction set that the processor has, once, at the first call.
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "cpu/calls.h"

namespace baseline {
extern const fastmt::Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const fastmt::Kernels table;
}
namespace avx512 {
extern const fastmt::Kernels table;
}
#endif

namespace fastmt {

namespace {

#if defined(__x86_64__)
// Compilers have had a name for it, as for the others, only lately.
bool has_f16c() {
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

// What avx2.cpp compiles for: a virtual machine can lack any one of them.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2") && has_f16c();
}

// What avx512.cpp compiles for.
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

bool has(const std::string& name) {
#if defined(__x86_64__)
  if (name == "avx512") return has_avx512();
  if (name == "avx2") return has_avx2();
#endif
  return name == "baseline";
}

const Kernels& table_of(const std::string& name) {
#if defined(__x86_64__)
  if (name == "avx512") return avx512::table;
  if (name == "avx2") return avx2::table;
#endif
  return baseline::table;
}

const Kernels& pick() {
  if (const char* asked = std::getenv("FASTMT_CPU_ISA")) {
    if (has(asked)) return table_of(asked);
    throw std::runtime_error("FASTMT_CPU_ISA: got '" + std::string(asked) +
                             "', expected baseline, avx2 or avx512 as this processor has them");
  }
  for (const char* name : {"avx512", "avx2"})
    if (has(name)) return table_of(name);
  return table_of("baseline");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = pick();
  return chosen;
}

}  // namespace fastmt
