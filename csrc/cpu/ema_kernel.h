// ema_update_ and scale_ over spans of contiguous elements. Mirrors reference.ema_update_.
#pragma once

#include "cpu/tile.h"

namespace FASTMT_ISA {

using fastmt::EmaSpan;

template <class T, class S>
inline void ema_span(T* __restrict__ teacher, const S* __restrict__ student, int64_t count,
                     double decay) {
  if (decay == 0) {  // a copy, whatever the teacher held
    for (int64_t i = 0; i < count; ++i) teacher[i] = narrow<T>(widen(student[i]));
    return;
  }
  // As torch.lerp: from the nearer end, so that decay 1 keeps exactly.
  const bool near_student = decay < 0.5;
  const float step = float(near_student ? decay : 1 - decay);
  for (int64_t i = 0; i < count; ++i) {
    const float average = widen(teacher[i]), value = widen(student[i]);
    const float from = near_student ? value : average, to = near_student ? average : value;
    teacher[i] = narrow<T>(from + step * (to - from));
  }
}

template <class T>
inline void ema_from(const EmaSpan& span, double decay) {
  T* teacher = static_cast<T*>(span.teacher) + span.begin;
  const int64_t count = span.end - span.begin;
  if (span.student_type == Type::float32)
    ema_span(teacher, static_cast<const float*>(span.student) + span.begin, count, decay);
  else if (span.student_type == Type::bfloat16)
    ema_span(teacher, static_cast<const bfloat16*>(span.student) + span.begin, count, decay);
  else
    ema_span(teacher, static_cast<const float16*>(span.student) + span.begin, count, decay);
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
