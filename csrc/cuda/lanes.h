// One pixel for each thread, and the few functions on it that pixel.h needs; the part that
// csrc/cpu/lanes.h plays for vectors.
#pragma once

#include <cmath>

#include "cuda/device.h"

// A loop over a constant number of classes keeps its column in registers only where it is unrolled.
#define FASTMT_UNROLL _Pragma("unroll")

namespace fastmt::cuda {

using floats = float;
using ints = int32_t;

constexpr float TINY = 1.17549435e-38f;  // smallest normal float
constexpr float LOG_TINY = -88.0f;       // exp of this is 0

FASTMT_INLINE floats splat(float x) { return x; }
FASTMT_INLINE ints isplat(int32_t x) { return x; }
FASTMT_INLINE floats select(ints mask, floats a, floats b) { return mask ? a : b; }
FASTMT_INLINE ints iselect(ints mask, ints a, ints b) { return mask ? a : b; }

FASTMT_INLINE floats max(floats a, floats b) { return fmaxf(a, b); }  // the other where one is NaN
FASTMT_INLINE floats min(floats a, floats b) { return fminf(a, b); }

// By the unit for it, an ulp off, of a number that is neither subnormal nor beyond 2^126: nvcc's
// own division takes six instructions to serve these too.
FASTMT_INLINE floats inverse_of(floats a) { return inverse_unit(a); }
FASTMT_INLINE floats quotient(floats a, floats b) {
  const float inverse = inverse_of(b), near = a * inverse;
  return fmaf(fmaf(-near, b, a), inverse, near);
}

// The same number, of which the compiler does not know it: what it computes from that anew takes no
// registers in between.
FASTMT_INLINE floats again(floats x) { return opaque(x); }

FASTMT_INLINE bool any(bool here) { return __any_sync(0xffffffffu, here); }  // of the warp

// e^x by the exponential unit: -inf gives 0, NaN stays NaN. Off by 2 ulp and half an ulp of x / ln
// 2, for x <= 0 at most 2e-7 of the largest probability.
FASTMT_INLINE floats exp(floats x) { return exp2_unit(x * 1.44269504f); }
FASTMT_INLINE floats log(floats x) { return logf(x); }

#include "pixel.h"

}  // namespace fastmt::cuda
