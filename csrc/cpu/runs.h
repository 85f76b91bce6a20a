// Runs of neighbouring pixels, from a tensor into a buffer [classes][pitch] of float32 and back.
#pragma once

#include <utility>

#include "cpu/calls.h"
#include "cpu/elements.h"

namespace FASTMT_ISA {

using fastmt::Type;
using fastmt::View;

template <int... FROM>
FASTMT_INLINE vector_f shuffled(vector_f a, vector_f b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, FROM...);
#else
  return __builtin_shuffle(a, b, vector_i{FROM...});
#endif
}

// Swaps the blocks of D lanes that a V x V matrix has off its diagonal, in two of its rows.
template <int D, int... LANE>
FASTMT_INLINE void swap_blocks(vector_f& upper, vector_f& lower,
                               std::integer_sequence<int, LANE...>) {
  const vector_f left = shuffled<(LANE & D ? V + LANE - D : LANE)...>(upper, lower);
  lower = shuffled<(LANE & D ? V + LANE : LANE + D)...>(upper, lower);
  upper = left;
}

// Rows of a V x V matrix become its columns.
template <int D = V / 2>
FASTMT_INLINE void transpose(vector_f (&rows)[V]) {
#pragma GCC unroll 16
  for (int i = 0; i < V; ++i)
    if (!(i & D)) swap_blocks<D>(rows[i], rows[i + D], std::make_integer_sequence<int, V>());
  if constexpr (D > 1) transpose<D / 2>(rows);
}

template <class T>
FASTMT_INLINE vector_f widen_vector(const T* source) {
  alignas(64) float values[V];
  for (int i = 0; i < V; ++i) values[i] = widen(source[i]);
  return load_vector(values);
}

template <class T>
FASTMT_INLINE void narrow_vector(T* to, vector_f x) {
  alignas(64) float values[V];
  store_vector(values, x);
  for (int i = 0; i < V; ++i) to[i] = narrow<T>(values[i]);
}

// Calls f(pixel, class) for blocks of V x V of them, the last of which overlap with others.
template <class F>
FASTMT_INLINE void for_each_block(int length, int classes, F f) {
  for (int i = 0; i < length; i += V)
    for (int c = 0; c < classes; c += V) f(std::min(i, length - V), std::min(c, classes - V));
}

// Whether the classes of a pixel lie side by side, enough of them to fill vectors.
inline bool is_class_last(int64_t step, int64_t class_stride, int classes, int length) {
  return class_stride == 1 && step >= classes && classes >= V && length >= V;
}

constexpr int CLASS_BLOCK = 16;  // classes whose lines stay in L1 while a channels-last tile turns

template <class T>
inline void load_run(const T* source, int64_t step, int64_t class_stride, int classes, float* to,
                     int64_t pitch, int length) {
  if (step == 1) {
    for (int c = 0; c < classes; ++c)
      for (int i = 0; i < length; ++i) to[c * pitch + i] = widen(source[c * class_stride + i]);
    return;
  }
  if (is_class_last(step, class_stride, classes, length))
    return for_each_block(length, classes, [&](int pixel, int first) FASTMT_INLINED {
      vector_f rows[V];
      for (int i = 0; i < V; ++i) rows[i] = widen_vector(source + (pixel + i) * step + first);
      transpose(rows);
      for (int i = 0; i < V; ++i)
        store_vector_unaligned(to + (first + i) * pitch + pixel, rows[i]);
    });
  for (int block = 0; block < classes; block += CLASS_BLOCK) {
    const int end = std::min(block + CLASS_BLOCK, classes);
    for (int i = 0; i < length; ++i)
      for (int c = block; c < end; ++c)
        to[c * pitch + i] = widen(source[i * step + c * class_stride]);
  }
}

// Neighbouring elements, past the caches as far as they fill vectors.
template <class T>
inline void stream_row(T* to, const float* source, int length) {
  constexpr int count = sizeof(vector_f) / sizeof(T);
  int i = 0;
  for (; i < length && reinterpret_cast<uintptr_t>(to + i) % sizeof(vector_f); ++i)
    to[i] = narrow<T>(source[i]);
  for (; i + count <= length; i += count) {
    alignas(64) T elements[count];
    for (int k = 0; k < count; ++k) elements[k] = narrow<T>(source[i + k]);
    stream_vector(to + i, *reinterpret_cast<const vector_f*>(elements));
  }
  for (; i < length; ++i) to[i] = narrow<T>(source[i]);
}

template <class T>
inline void store_run(T* to, int64_t step, int64_t class_stride, int classes, const float* source,
                      int64_t pitch, int length, bool streams) {
  if (step == 1 && streams) {
    for (int c = 0; c < classes; ++c) stream_row(to + c * class_stride, source + c * pitch, length);
    return;
  }
  if (step == 1) {
    for (int c = 0; c < classes; ++c)
      for (int i = 0; i < length; ++i) to[c * class_stride + i] = narrow<T>(source[c * pitch + i]);
    return;
  }
  if (is_class_last(step, class_stride, classes, length))
    return for_each_block(length, classes, [&](int pixel, int first) FASTMT_INLINED {
      vector_f rows[V];
      for (int i = 0; i < V; ++i)
        rows[i] = load_vector_unaligned(source + (first + i) * pitch + pixel);
      transpose(rows);
      for (int i = 0; i < V; ++i) narrow_vector(to + (pixel + i) * step + first, rows[i]);
    });
  for (int block = 0; block < classes; block += CLASS_BLOCK) {
    const int end = std::min(block + CLASS_BLOCK, classes);
    for (int i = 0; i < length; ++i)
      for (int c = block; c < end; ++c)
        to[i * step + c * class_stride] = narrow<T>(source[c * pitch + i]);
  }
}

// One run of a view, at an element offset, into a buffer [classes][pitch].
inline void load_run_of(const View& view, int64_t offset, int64_t step, int classes, float* to,
                        int64_t pitch, int length) {
  const auto run = [&](auto element) {
    const auto* source = static_cast<const decltype(element)*>(view.data) + offset;
    load_run(source, step, view.class_stride, classes, to, pitch, length);
  };
  if (view.type == Type::float32)
    run(float());
  else if (view.type == Type::bfloat16)
    run(bfloat16());
  else
    run(float16());
}

inline void store_run_of(const View& view, int64_t offset, int64_t step, int classes,
                         const float* source, int64_t pitch, int length) {
  const auto run = [&](auto element) {
    auto* to = static_cast<decltype(element)*>(view.data) + offset;
    store_run(to, step, view.class_stride, classes, source, pitch, length, view.streams);
  };
  if (view.type == Type::float32)
    run(float());
  else if (view.type == Type::bfloat16)
    run(bfloat16());
  else
    run(float16());
}

}  // namespace FASTMT_ISA
