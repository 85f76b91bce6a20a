// W pixels at once, and the few functions on them that pixel.h needs.
//
// `floats` is two compiler vectors side by side: two independent chains of arithmetic hide each
// other's latency (benchmarks/simd_choice). Each instruction set includes this in a translation unit
// of its own, under its own target pragma and namespace FASTMT_ISA, with FASTMT_LANES floats to a
// vector.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// Vectors stay in registers only where no call stands between; GCC's own limits are too small.
#define FASTMT_INLINE inline __attribute__((always_inline))
#define FASTMT_INLINED __attribute__((always_inline))  // behind the parameters of a lambda
#define FASTMT_UNROLL

namespace FASTMT_ISA {

typedef float vector_f __attribute__((vector_size(4 * FASTMT_LANES), may_alias));
typedef int32_t vector_i __attribute__((vector_size(4 * FASTMT_LANES), may_alias));

constexpr int V = FASTMT_LANES;
constexpr int W = 2 * V;
constexpr float TINY = 1.17549435e-38f;  // smallest normal float
constexpr float LOG_TINY = -88.0f;       // exp of this is 0

struct floats {
  vector_f lo, hi;
};
struct ints {
  vector_i lo, hi;
};

FASTMT_INLINE vector_f load_vector(const float* at) {
  return *reinterpret_cast<const vector_f*>(at);
}
FASTMT_INLINE void store_vector(float* at, vector_f x) { *reinterpret_cast<vector_f*>(at) = x; }

typedef float unaligned_f __attribute__((vector_size(4 * FASTMT_LANES), aligned(4), may_alias));
FASTMT_INLINE vector_f load_vector_unaligned(const float* at) {
  return *reinterpret_cast<const unaligned_f*>(at);
}
FASTMT_INLINE void store_vector_unaligned(float* at, vector_f x) {
  *reinterpret_cast<unaligned_f*>(at) = x;
}

// Past the caches, into memory that is aligned to the vector: no line is fetched to be overwritten.
FASTMT_INLINE void stream_vector(void* at, vector_f x) {
#if defined(__x86_64__) && FASTMT_LANES > 4
  asm volatile("vmovntps %1, %0" : "=m"(*static_cast<vector_f*>(at)) : "v"(x));
#elif defined(__x86_64__)
  asm volatile("movntps %1, %0" : "=m"(*static_cast<vector_f*>(at)) : "x"(x));
#else
  *static_cast<vector_f*>(at) = x;
#endif
}
// What was streamed is seen by other threads as what was stored is.
FASTMT_INLINE void end_streams() {
#if defined(__x86_64__)
  asm volatile("sfence" ::: "memory");
#endif
}

// Each vector is loaded and stored as one: a struct of two GCC would copy piece by piece.
FASTMT_INLINE floats load(const float* at) { return {load_vector(at), load_vector(at + V)}; }
FASTMT_INLINE ints load(const int32_t* at) {
  const vector_i* vectors = reinterpret_cast<const vector_i*>(at);
  return {vectors[0], vectors[1]};
}
FASTMT_INLINE void store(float* at, floats x) {
  store_vector(at, x.lo);
  store_vector(at + V, x.hi);
}
FASTMT_INLINE void store(int32_t* at, ints x) {
  vector_i* vectors = reinterpret_cast<vector_i*>(at);
  vectors[0] = x.lo;
  vectors[1] = x.hi;
}

// W floats in memory that read and assign like a variable.
struct Cell {
  float* at;
  operator floats() const { return load(at); }
  void operator=(floats x) const { store(at, x); }
};

FASTMT_INLINE floats splat(float x) { return {vector_f{} + x, vector_f{} + x}; }
FASTMT_INLINE ints isplat(int32_t x) { return {vector_i{} + x, vector_i{} + x}; }

#define FASTMT_BINARY(result, operand, scalar, broadcast, op)                                  \
  FASTMT_INLINE result operator op(operand a, operand b) { return {a.lo op b.lo, a.hi op b.hi}; }     \
  FASTMT_INLINE result operator op(operand a, scalar b) { return a op broadcast(b); }                 \
  FASTMT_INLINE result operator op(scalar a, operand b) { return broadcast(a) op b; }
FASTMT_BINARY(floats, floats, float, splat, +)
FASTMT_BINARY(floats, floats, float, splat, -)
FASTMT_BINARY(floats, floats, float, splat, *)
FASTMT_BINARY(floats, floats, float, splat, /)
FASTMT_BINARY(ints, floats, float, splat, <)
FASTMT_BINARY(ints, floats, float, splat, >)
FASTMT_BINARY(ints, floats, float, splat, >=)
FASTMT_BINARY(ints, floats, float, splat, ==)
FASTMT_BINARY(ints, floats, float, splat, !=)
FASTMT_BINARY(ints, ints, int32_t, isplat, +)
FASTMT_BINARY(ints, ints, int32_t, isplat, -)
FASTMT_BINARY(ints, ints, int32_t, isplat, &)
FASTMT_BINARY(ints, ints, int32_t, isplat, |)
FASTMT_BINARY(ints, ints, int32_t, isplat, ==)
FASTMT_BINARY(ints, ints, int32_t, isplat, <)
#undef FASTMT_BINARY

FASTMT_INLINE floats& operator+=(floats& a, floats b) { return a = a + b; }
FASTMT_INLINE floats& operator-=(floats& a, floats b) { return a = a - b; }
FASTMT_INLINE ints& operator+=(ints& a, ints b) { return a = a + b; }
FASTMT_INLINE ints& operator-=(ints& a, ints b) { return a = a - b; }
FASTMT_INLINE ints operator~(ints a) { return {~a.lo, ~a.hi}; }
FASTMT_INLINE ints operator<<(ints a, int n) { return {a.lo << n, a.hi << n}; }
FASTMT_INLINE ints operator>>(ints a, int n) { return {a.lo >> n, a.hi >> n}; }

FASTMT_INLINE ints bits(floats x) { return {(vector_i)x.lo, (vector_i)x.hi}; }
FASTMT_INLINE floats from_bits(ints x) { return {(vector_f)x.lo, (vector_f)x.hi}; }
FASTMT_INLINE floats to_floats(ints x) {
  return {__builtin_convertvector(x.lo, vector_f), __builtin_convertvector(x.hi, vector_f)};
}
FASTMT_INLINE floats select(ints mask, floats a, floats b) {
  return {mask.lo ? a.lo : b.lo, mask.hi ? a.hi : b.hi};
}
FASTMT_INLINE ints iselect(ints mask, ints a, ints b) {
  return {mask.lo ? a.lo : b.lo, mask.hi ? a.hi : b.hi};
}
FASTMT_INLINE floats max(floats a, floats b) { return select(a > b, a, b); }  // b where either is NaN
FASTMT_INLINE floats min(floats a, floats b) { return select(a < b, a, b); }
FASTMT_INLINE floats quotient(floats a, floats b) { return a / b; }
FASTMT_INLINE floats inverse_of(floats a) { return 1.0f / a; }

// On a GPU, where registers are short, what is computed from it anew is not kept from before.
FASTMT_INLINE floats again(floats x) { return x; }

FASTMT_INLINE bool any(ints mask) {
  const vector_i either = mask.lo | mask.hi;
  int64_t words[W / 4], all = 0;
  std::memcpy(words, &either, sizeof words);
  for (int64_t word : words) all |= word;
  return all != 0;
}

FASTMT_INLINE double sum_lanes(floats x) {
  alignas(64) float lanes[W];
  store(lanes, x);
  double sum = 0;
  for (float lane : lanes) sum += lane;
  return sum;
}

// How many lanes of the mask are set, when masks have been added up.
FASTMT_INLINE int64_t count_lanes(ints masks) {
  alignas(64) int32_t lanes[W];
  store(lanes, masks);
  int64_t sum = 0;
  for (int32_t lane : lanes) sum -= lane;
  return sum;
}

// A constant that stays in a register: GCC turns max with a literal into compare and blend.
FASTMT_INLINE floats opaque(float constant) {
  vector_f x = vector_f{} + constant;
#if defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return {x, x};
}

// e^x for x <= 88; 0 from LOG_TINY down; NaN stays NaN; within 1.3 ulp.
FASTMT_INLINE floats exp(floats x) {
  x = max(opaque(LOG_TINY), x);
  constexpr float shift = 12582912.0f + 127.0f;  // rounds; the low bits hold the biased exponent
  const floats t = x * 1.44269504f + shift, n = t - shift;
  const floats r = x - n * 0.693359375f - n * -2.12194440e-4f, r2 = r * r;
  const floats high = (r * 1.9875691500e-4f + 1.3981999507e-3f) * r2;
  const floats low = (r * 8.3334519073e-3f + 4.1665795894e-2f);
  const floats poly = (high + low) * r2 + (r * 1.6666665459e-1f + 5.0000001201e-1f);
  return (poly * r2 + (r + 1.0f)) * from_bits(bits(t) << 23);
}

// ln x for normal x; ln 0 = -inf; inf and NaN stay; within 0.9 ulp.
FASTMT_INLINE floats log(floats x) {
  const ints k = (bits(x) - 0x3f3504f3) >> 23;
  const floats n = to_floats(k), f = from_bits(bits(x) - (k << 23)) - 1.0f, f2 = f * f;
  const floats top = (f * -1.1514610310e-1f + 1.1676998740e-1f) +
                     f2 * 7.0376836292e-2f;
  const floats high = top * f2 + (f * -1.2420140846e-1f + 1.4249322787e-1f);
  const floats middle = high * f2 + (f * -1.6668057665e-1f + 2.0000714765e-1f);
  const floats poly = middle * f2 + (f * -2.4999993993e-1f + 3.3333331174e-1f);
  const floats tail = poly * (f * f2) + n * -2.12194440e-4f - f2 * 0.5f;
  const floats y = f + tail + n * 0.693359375f;
  return select(x == 0.0f, splat(-INFINITY), select(x < INFINITY, y, x));
}

#include "pixel.h"

}  // namespace FASTMT_ISA
