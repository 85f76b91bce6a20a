// Variant (c2): ATen's at::vec::Vectorized; one translation unit per instruction set, by flags.
#include <ATen/cpu/vec/vec.h>

#include "tile.h"

namespace {
using vf = at::vec::Vectorized<float>;
using vi = at::vec::Vectorized<int32_t>;
using at::vec::fmadd;

inline vf exp(vf x) {
  // clamp_min keeps NaN
  x = at::vec::clamp_min(x, vf(kExpLow));
  vf t = fmadd(x, vf(kLog2e), vf(kShift)), n = t - vf(kShift);
  vf r = fmadd(n, vf(-kLn2Lo), fmadd(n, vf(-kLn2Hi), x));
  vf y = fmadd(vf(kE5), r, vf(kE4));
  y = fmadd(y, r, vf(kE3));
  y = fmadd(y, r, vf(kE2));
  y = fmadd(y, r, vf(kE1));
  y = fmadd(y, r, vf(kE0));
  y = fmadd(y, r * r, r) + vf(1.0f);
  return y * at::vec::cast<float>(at::vec::cast<int32_t>(t) << vi(23));
}

inline vf softmax(float* x, int classes, int stride) {
  vf top = vf::loadu(x), sum(0.0f);
  for (int c = 1; c < classes; ++c) top = at::vec::maximum(top, vf::loadu(x + c * stride));
  for (int c = 0; c < classes; ++c) {
    vf e = exp(vf::loadu(x + c * stride) - top);
    e.store(x + c * stride);
    sum = sum + e;
  }
  return vf(1.0f) / sum;
}

double kernel(float* teacher, float* student, int classes, int stride, float threshold) {
  vf loss(0.0f), zero(0.0f);
  for (int i = 0; i < kPixels; i += vf::size()) {
    float *q_row = teacher + i, *p_row = student + i;
    vf score = softmax(q_row, classes, stride), inverse = softmax(p_row, classes, stride);
    vf dot(0.0f), square(0.0f);
    for (int c = 0; c < classes; ++c) {
      vf p = vf::loadu(p_row + c * stride) * inverse;
      vf d = p - vf::loadu(q_row + c * stride) * score;
      dot = fmadd(p, d, dot), square = fmadd(d, d, square);
    }
    vf pass = score >= vf(threshold);
    for (int c = 0; c < classes; ++c) {
      vf p = vf::loadu(p_row + c * stride) * inverse;
      vf d = p - vf::loadu(q_row + c * stride) * score;
      vf::blendv(zero, vf(2.0f) * p * (d - dot), pass).store(p_row + c * stride);
    }
    loss = loss + vf::blendv(zero, square, pass);
  }
  float lanes[vf::size()];
  loss.store(lanes);
  double total = 0.0;
  for (float v : lanes) total += v;
  return total;
}
}  // namespace
extern const Variant kAten[] = {{"aten_vec", "avx2", kernel}};
