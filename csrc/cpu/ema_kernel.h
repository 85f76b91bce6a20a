// ema_update_ and scale_ over spans of contiguous elements. Mirrors reference.ema_update_.
#pragma once

#include "cpu/tile.h"

namespace FASTMT_ISA {

using fastmt::EmaSpan;
using fastmt::Rounding;

// Wellons' lowbias32: every bit of the result depends on every bit of x.
inline uint32_t mixed(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// x -> T, up with the probability that leaves the mean at x.
template <class T>
inline T narrow_randomly(float x, uint32_t random);
template <>
inline float narrow_randomly<float>(float x, uint32_t) {
  return x;
}
template <>
inline bfloat16 narrow_randomly<bfloat16>(float x, uint32_t random) {
  return {uint16_t(x != x ? 0x7fc0u : (bit_cast<uint32_t>(x) + (random & 0xffff)) >> 16)};
}
template <>
inline float16 narrow_randomly<float16>(float x, uint32_t random) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude + (random & 0x1fff) - 0x38000000) >> 13;
  const bool is_small = magnitude < 0x38800000u;
  const float steps = is_small ? bit_cast<float>(magnitude) * 16777216.0f : 0.0f;  // of 2^-24
  const int32_t whole = int32_t(steps);
  const uint32_t subnormal = whole + (float(random >> 8) < (steps - float(whole)) * 16777216.0f);
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t half = magnitude >= 0x47800000u ? special : is_small ? subnormal : normal;
  return {uint16_t(half | (bits >> 16 & 0x8000))};
}

// Between teacher and student, as torch.lerp: from the nearer end, so that decay 1 keeps exactly. 0
// copies, whatever the teacher held.
struct Weights {
  bool copies, near_student;
  float step;  // from there towards the student

  explicit Weights(double decay)
      : copies(decay == 0),
        near_student(decay < 0.5),
        step(float(near_student ? -decay : 1 - decay)) {}
  // In the words of the reference, to the bit: by what 1 - decay is in float32.
  explicit Weights(float share)
      : copies(share == 1), near_student(share >= 0.5f), step(near_student ? share - 1 : share) {}
};

// teacher[i] = store(i, the average of load(i, teacher[i]) and student[i]).
template <class T, class S, class Load, class Store>
inline void ema_span(T* __restrict__ teacher, const S* __restrict__ student, const EmaSpan& span,
                     Weights weights, Load load, Store store) {
  if (weights.copies) {
    for (int64_t i = span.begin; i < span.end; ++i) teacher[i] = store(i, widen(student[i]));
    return;
  }
  const bool near_student = weights.near_student;
  const float step = weights.step;
  for (int64_t i = span.begin; i < span.end; ++i) {
    const float average = load(i, widen(teacher[i])), value = widen(student[i]);
    teacher[i] = store(i, (near_student ? value : average) + step * (value - average));
  }
}

template <class T, class S>
inline void ema_rounded(const EmaSpan& span, double decay) {
  T* teacher = static_cast<T*>(span.teacher);
  const S* student = static_cast<const S*>(span.student);
  T* __restrict__ lost = static_cast<T*>(span.compensation);
  const auto load = [](int64_t, float x) { return x; };
  const Weights rounded(float(1 - decay));
  if (span.rounding == Rounding::nearest) {
    ema_span(teacher, student, span, Weights(decay), load,
             [](int64_t, float x) { return narrow<T>(x); });
  } else if (span.rounding == Rounding::stochastic) {
    const uint32_t key = span.key ^ uint32_t(uint64_t(span.begin) >> 32);  // spans are short
    ema_span(teacher, student, span, rounded, load, [=](int64_t i, float x) {
      return narrow_randomly<T>(x, mixed(mixed(uint32_t(i)) ^ key));
    });
  } else {
    const auto whole = [=](int64_t i, float x) { return x + widen(lost[i]); };
    ema_span(teacher, student, span, rounded, whole, [=](int64_t i, float x) {
      const T near = narrow<T>(x);
      const float rest = x - widen(near);
      lost[i] = narrow<T>(rest - rest == 0 ? rest : 0.0f);  // 0 beside inf and NaN
      return near;
    });
  }
}

template <class T>
inline void ema_from(const EmaSpan& span, double decay) {
  if (span.student_type == Type::float32)
    ema_rounded<T, float>(span, decay);
  else if (span.student_type == Type::bfloat16)
    ema_rounded<T, bfloat16>(span, decay);
  else
    ema_rounded<T, float16>(span, decay);
}

inline void ema(const EmaSpan& span, double decay) {
  if (span.teacher_type == Type::float32)
    ema_from<float>(span, decay);
  else if (span.teacher_type == Type::bfloat16)
    ema_from<bfloat16>(span, decay);
  else
    ema_from<float16>(span, decay);
}

template <class T>
inline void scale_span(T* data, int64_t count, float factor) {
  for (int64_t i = 0; i < count; ++i)
    data[i] = narrow<T>(factor == 0 ? 0.0f : widen(data[i]) * factor);
}

inline void scale(void* data, Type type, int64_t begin, int64_t end, float factor) {
  const int64_t count = end - begin;
  if (type == Type::float32)
    scale_span(static_cast<float*>(data) + begin, count, factor);
  else if (type == Type::bfloat16)
    scale_span(static_cast<bfloat16*>(data) + begin, count, factor);
  else
    scale_span(static_cast<float16*>(data) + begin, count, factor);
}

}  // namespace FASTMT_ISA
