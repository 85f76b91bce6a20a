// A tile: `tile` pixels in a row of a local buffer [classes][tile], whatever the layout outside.
//
// NCHW puts the classes of a pixel one image plane apart, often a power of two, where they fight for
// the same cache sets; a tile is copied once and worked on in L1.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "cpu/runs.h"

namespace FASTMT_ISA {

using fastmt::Pixels;

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
