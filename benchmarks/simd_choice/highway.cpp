// Variant (c): Google Highway, dynamic dispatch by foreach_target.
#include "tile.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "highway.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace tile {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;

static HWY_INLINE V Exp(D d, V x) {
  const hn::Rebind<int32_t, D> di;
  x = hn::Max(hn::Set(d, kExpLow), x);  // x86 returns the second operand when either is NaN
  const V t = hn::MulAdd(x, hn::Set(d, kLog2e), hn::Set(d, kShift));
  const V n = hn::Sub(t, hn::Set(d, kShift));
  const V r = hn::NegMulAdd(n, hn::Set(d, kLn2Lo), hn::NegMulAdd(n, hn::Set(d, kLn2Hi), x));
  V y = hn::MulAdd(hn::Set(d, kE5), r, hn::Set(d, kE4));
  y = hn::MulAdd(y, r, hn::Set(d, kE3));
  y = hn::MulAdd(y, r, hn::Set(d, kE2));
  y = hn::MulAdd(y, r, hn::Set(d, kE1));
  y = hn::MulAdd(y, r, hn::Set(d, kE0));
  y = hn::Add(hn::MulAdd(y, hn::Mul(r, r), r), hn::Set(d, 1.0f));
  return hn::Mul(y, hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(di, t))));
}

static HWY_INLINE V Softmax(D d, float* x, int classes, int stride) {
  V top = hn::LoadU(d, x), sum = hn::Zero(d);
  for (int c = 1; c < classes; ++c) top = hn::Max(hn::LoadU(d, x + c * stride), top);
  for (int c = 0; c < classes; ++c) {
    const V e = Exp(d, hn::Sub(hn::LoadU(d, x + c * stride), top));
    hn::StoreU(e, d, x + c * stride);
    sum = hn::Add(sum, e);
  }
  return hn::Div(hn::Set(d, 1.0f), sum);
}

double Kernel(float* teacher, float* student, int classes, int stride, float threshold) {
  const D d;
  V loss = hn::Zero(d);
  for (int i = 0; i < kPixels; i += int(hn::Lanes(d))) {
    float *q_row = teacher + i, *p_row = student + i;
    const V score = Softmax(d, q_row, classes, stride);
    const V inverse = Softmax(d, p_row, classes, stride);
    V dot = hn::Zero(d), square = hn::Zero(d);
    for (int c = 0; c < classes; ++c) {
      const V p = hn::Mul(hn::LoadU(d, p_row + c * stride), inverse);
      const V diff = hn::NegMulAdd(hn::LoadU(d, q_row + c * stride), score, p);
      dot = hn::MulAdd(p, diff, dot);
      square = hn::MulAdd(diff, diff, square);
    }
    const auto pass = hn::Ge(score, hn::Set(d, threshold));
    for (int c = 0; c < classes; ++c) {
      const V p = hn::Mul(hn::LoadU(d, p_row + c * stride), inverse);
      const V diff = hn::NegMulAdd(hn::LoadU(d, q_row + c * stride), score, p);
      const V g = hn::Mul(hn::Mul(hn::Set(d, 2.0f), p), hn::Sub(diff, dot));
      hn::StoreU(hn::IfThenElseZero(pass, g), d, p_row + c * stride);
    }
    loss = hn::Add(loss, hn::IfThenElseZero(pass, square));
  }
  return double(hn::GetLane(hn::SumOfLanes(d, loss)));
}
}  // namespace HWY_NAMESPACE
}  // namespace tile
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tile {
HWY_EXPORT(Kernel);
template <int64_t target>
double Forced(float* t, float* s, int classes, int stride, float threshold) {
  hwy::SetSupportedTargetsForTest(target);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  return HWY_DYNAMIC_DISPATCH(Kernel)(t, s, classes, stride, threshold);
}
}  // namespace tile
extern const Variant kHighway[] = {{"highway", "ssse3", tile::Forced<HWY_SSSE3>},
                                   {"highway", "avx2", tile::Forced<HWY_AVX2>},
                                   {"highway", "avx512", tile::Forced<HWY_AVX3>}};
#endif
