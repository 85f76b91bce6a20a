// A tile: `tile` pixels in a row of a local buffer [classes][tile], whatever the layout outside.
//
// NCHW puts the classes of a pixel one image plane apart, often a power of two, where they fight for
// the same cache sets; a tile is copied once and worked on in L1.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "cpu/calls.h"
#include "cpu/lanes.h"

namespace FASTMT_ISA {

using fastmt::Pixels;
using fastmt::Type;
using fastmt::View;

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float widen(float x) { return x; }
inline float widen(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline float widen(float16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const float finite = bit_cast<float>(magnitude) * bit_cast<float>(0x77800000u);  // 2^112
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return bit_cast<float>(bit_cast<uint32_t>(finite) | special | uint32_t(x.bits & 0x8000) << 16);
}

template <class T>
inline T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline bfloat16 narrow<bfloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {uint16_t(x != x ? 0x7fc0u : rounded)};
}
template <>
inline float16 narrow<float16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t small = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t half = magnitude >= 0x47800000u ? special : small;
  return {uint16_t(half | (bits >> 16 & 0x8000))};
}

// Calls f(lane, length, offset) for each run of pixels [first, first + count) in the last dimension.
template <class F>
inline void for_each_run(const Pixels& pixels, const View& view, int64_t first, int count, F f) {
  int64_t index[fastmt::MAX_RANK], rest = first, offset = 0;
  const int last = pixels.rank - 1;
  for (int d = last; d >= 0; --d) {
    index[d] = rest % pixels.size[d];
    rest /= pixels.size[d];
    offset += index[d] * view.stride[d];
  }
  for (int lane = 0; lane < count;) {
    const int length = int(std::min<int64_t>(count - lane, pixels.size[last] - index[last]));
    f(lane, length, offset);
    lane += length;
    index[last] += length;
    offset += length * view.stride[last];
    for (int d = last; d > 0 && index[d] == pixels.size[d]; --d) {
      offset += view.stride[d - 1] - index[d] * view.stride[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

// Floats between the classes of a tile: off the powers of two, which share too few cache sets.
inline int64_t row(int tile) { return tile + 16; }

constexpr int CLASS_BLOCK = 16;  // classes whose lines stay in L1 while a channels-last tile turns

template <class T>
inline void load_run(const T* source, int64_t step, int64_t class_stride, int classes, float* to,
                     int64_t pitch, int length) {
  if (step == 1) {
    for (int c = 0; c < classes; ++c)
      for (int i = 0; i < length; ++i) to[c * pitch + i] = widen(source[c * class_stride + i]);
    return;
  }
  for (int block = 0; block < classes; block += CLASS_BLOCK) {
    const int end = std::min(block + CLASS_BLOCK, classes);
    for (int i = 0; i < length; ++i)
      for (int c = block; c < end; ++c)
        to[c * pitch + i] = widen(source[i * step + c * class_stride]);
  }
}

template <class T>
inline void store_run(T* to, int64_t step, int64_t class_stride, int classes, const float* source,
                      int64_t pitch, int length) {
  if (step == 1) {
    for (int c = 0; c < classes; ++c)
      for (int i = 0; i < length; ++i) to[c * class_stride + i] = narrow<T>(source[c * pitch + i]);
    return;
  }
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
    store_run(to, step, view.class_stride, classes, source, pitch, length);
  };
  if (view.type == Type::float32)
    run(float());
  else if (view.type == Type::bfloat16)
    run(bfloat16());
  else
    run(float16());
}

// The buffer [classes][tile] of pixels [first, first + count); lanes past the last pixel are 0.
inline void load_tile(const Pixels& pixels, const View& view, int64_t first, int count, int classes,
                      float* buffer, int tile) {
  if (count < tile) std::fill_n(buffer, classes * row(tile), 0.0f);
  const int64_t step = view.stride[pixels.rank - 1];
  for_each_run(pixels, view, first, count, [&](int lane, int length, int64_t offset) {
    load_run_of(view, offset, step, classes, buffer + lane, row(tile), length);
  });
}

inline void store_tile(const Pixels& pixels, const View& view, int64_t first, int count,
                       int classes, const float* buffer, int tile) {
  const int64_t step = view.stride[pixels.rank - 1];
  for_each_run(pixels, view, first, count, [&](int lane, int length, int64_t offset) {
    store_run_of(view, offset, step, classes, buffer + lane, row(tile), length);
  });
}

// Asks for the next tile while this one is worked on: what the classes of pixels [at, at + W) will
// need, for layouts in which they lie side by side. The hardware does not follow that many streams.
inline void prefetch_pixels(const Pixels& pixels, const View& view, int64_t at, int classes) {
  if (pixels.rank > 2 || view.stride[pixels.rank - 1] != 1 || at >= pixels.count) return;
  const int64_t inner = pixels.size[pixels.rank - 1];
  const int64_t offset =
      pixels.rank == 1 ? at : at / inner * view.stride[0] + at % inner;
  const int64_t bytes = view.type == Type::float32 ? 4 : 2;
  const char* first = static_cast<const char*>(view.data) + offset * bytes;
  for (int c = 0; c < classes; ++c) __builtin_prefetch(first + c * view.class_stride * bytes);
}

// A map (N, *spatial) of bytes or 64-bit integers; lanes past the last pixel are `padding`.
inline void load_integers(const Pixels& pixels, const View& view, int64_t first, int count,
                          int64_t* buffer, int tile, int64_t padding) {
  std::fill(buffer + count, buffer + tile, padding);
  const int64_t step = view.stride[pixels.rank - 1];
  for_each_run(pixels, view, first, count, [&](int lane, int length, int64_t offset) {
    if (view.type == Type::uint8) {
      const uint8_t* source = static_cast<const uint8_t*>(view.data) + offset;
      for (int i = 0; i < length; ++i) buffer[lane + i] = source[i * step];
    } else {
      const int64_t* source = static_cast<const int64_t*>(view.data) + offset;
      for (int i = 0; i < length; ++i) buffer[lane + i] = source[i * step];
    }
  });
}

// The C values of W neighbouring pixels of a tile.
struct Column {
  float* base;
  int64_t row;
  Cell operator[](int c) const { return {base + c * row}; }
};

// Takes the gradient of W neighbouring pixels of a tile: exactly 0 where `active` is not set.
struct MaskedColumn {
  float* base;
  int64_t row;
  ints active;

  struct Place {
    float* at;
    ints active;
    FASTMT_INLINE void operator=(floats gradient) const {
      store(at, select(active, gradient, splat(0)));
    }
  };
  Place operator[](int c) const { return {base + c * row, active}; }
};

// Takes the gradient where none is wanted.
struct NoGradient {
  struct Place {
    void operator=(floats) const {}
  };
  Place operator[](int) const { return {}; }
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

template <class T>
inline std::unique_ptr<T[], Free> aligned_buffer(int64_t count) {
  const int64_t bytes = (count * int64_t(sizeof(T)) + 63) / 64 * 64;
  return std::unique_ptr<T[], Free>(static_cast<T*>(std::aligned_alloc(64, bytes)));
}

}  // namespace FASTMT_ISA
