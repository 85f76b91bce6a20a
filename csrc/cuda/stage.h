// Low-resolution logits in shared memory, where the threads of a block find their corners.
#pragma once

#include "cuda/cells.h"

namespace fastmt::cuda {

// The low-resolution logits around the rows of a tile, in shared memory: for each column [above,
// below][C], read in packs by threads of which neighbours want the same ones, and the range of each
// quarter of them.
template <int C>
struct Stage {
  static constexpr int ROW = (C + 3) / 4 * 4, TOPS = 2 * ROW, LOWS = TOPS + 4;
  static constexpr int COLUMN = LOWS + 8;  // clear of bank conflicts
  static constexpr int QUARTERS = 4;  // of the classes, one for each warp of a full block
  static constexpr int EACH = (C + QUARTERS - 1) / QUARTERS;
  float* at;
  int columns, first;  // how many, and the low-resolution column of the first
  float* shifts;       // [tile]: the logit that powers of a thread are relative to, if asked for

  FASTMT_INLINE Stage(float* at, int columns, int first, float* shifts)
      : at(at), columns(columns), first(first), shifts(shifts) {}

  // The logits of one quarter in a low-resolution column of two rows, on their way from global
  // memory: as bits, because a conversion would wait for them.
  struct Asked {
    uint32_t above[EACH], below[EACH];
  };

  // What bring() wants of a thread: all of it on its way at once.
  FASTMT_INLINE Asked ask(const Grid& grid, int32_t image, int32_t row) const {
    const Task own(threadIdx.x);
    Asked asked{};
    if (own.column < columns) asked = ask(grid, image, row, first, own);
    return asked;
  }

  // Brings the logits of low-resolution rows `row` and row + 1. Its threads meet before it is read.
  FASTMT_INLINE void bring(const Grid& grid, int32_t image, int32_t row, const Asked& asked) const {
    const Task own(threadIdx.x);
    if (own.column < columns) put(grid.type, own, asked);
    each_task(threadIdx.x + blockDim.x, [&](const Task& task) {
      put(grid.type, task, ask(grid, image, row, first, task));
    });
  }

  // The same without having asked, by fewer registers.
  FASTMT_INLINE void bring(const Grid& grid, int32_t image, int32_t row) const {
    with_type(grid.type, [&](auto type) {
      using T = typename decltype(type)::type;
      each_task(this_thread(), [&](const Task& task) {
        const From<T> from(grid, image, row, first, task);
        const T* above = from.above;
        Range range;
#pragma unroll 1
        for (int c = task.quarter; c < C; c += QUARTERS, above += from.step)
          put_class(task, c, widen(above[0]), widen(above[from.down]), range);
        put_range(task, range);
      });
    });
  }

  FASTMT_INLINE Between<int> across(At column) const {
    return {{column.index - first, column.t}, COLUMN};
  }
  FASTMT_INLINE float logit(const Between<int>& across, const Between<int>& down, int c) const {
    const float* above = at + across.first + down.first + c;
    const float* below = above + down.next;
    return down.mix(across.mix(above[0], above[across.next]),
                    across.mix(below[0], below[across.next]));
  }
  // The largest and the least of a thread's corners; the least is -inf where one is not finite.
  FASTMT_INLINE float top(const Between<int>& across) const {
    float top = -INFINITY;
    each_of_two(across, TOPS, [&](float value) { top = max(top, value); });
    return top;
  }
  FASTMT_INLINE float low(const Between<int>& across) const {
    float low = INFINITY;
    each_of_two(across, LOWS, [&](float value) { low = min(low, value); });
    return low;
  }
  template <class F>
  FASTMT_INLINE void each_of_two(const Between<int>& across, int offset, F f) const {
    const float* left = at + across.first + offset;
    const Four values[2] = {four_at(left), four_at(left + across.next)};
    FASTMT_UNROLL
    for (int i = 0; i < 8; ++i) f(values[i / 4].at[i % 4]);
  }
  static int64_t bytes(int64_t columns) { return columns * COLUMN * int64_t(sizeof(float)); }

 private:
  // What one thread does at a time: neighbours have neighbouring columns of one quarter.
  struct Task {
    int column, quarter;
    explicit FASTMT_INLINE Task(unsigned number)
        : column(number % 32 + number / (32 * QUARTERS) * 32), quarter(number / 32 % QUARTERS) {}
  };

  template <class F>
  FASTMT_INLINE void each_task(unsigned begin, F f) const {
#pragma unroll 1
    for (unsigned number = begin; int(number / (32 * QUARTERS) * 32) < columns;
         number += blockDim.x)
      if (const Task task(number); task.column < columns) f(task);
  }

  // Where the logits of a task lie in global memory.
  template <class T>
  struct From {
    const T* above;
    int64_t down, step;  // to the row below, from class to class

    FASTMT_INLINE From(const Grid& grid, int32_t image, int32_t row, int first, const Task& task)
        : down(row + 1 < grid.rows.size ? grid.row : 0), step(QUARTERS * grid.channel) {
      const int32_t own = first + task.column, last = grid.columns.size - 1;
      above = static_cast<const T*>(grid.data) + uint32_t(image) * grid.image +
              uint32_t(row) * grid.row + uint32_t(own < last ? own : last) * grid.column +
              uint32_t(task.quarter) * grid.channel;
    }
  };

  // f(k, c) for the k-th class c of a quarter.
  template <class F>
  static FASTMT_INLINE void each_class(int quarter, F f) {
    FASTMT_UNROLL
    for (int k = 0; k < EACH; ++k) {
      const int c = quarter + k * QUARTERS;
      if (k < C / QUARTERS || c < C) f(k, c);
    }
  }

  static FASTMT_INLINE Asked ask(const Grid& grid, int32_t image, int32_t row, int first,
                                 const Task& task) {
    if (grid.type == Type::float32) return ask_as<float>(grid, image, row, first, task);
    return ask_as<float16>(grid, image, row, first, task);  // bfloat16 is as wide
  }
  template <class T>
  static FASTMT_INLINE Asked ask_as(const Grid& grid, int32_t image, int32_t row, int first,
                                    const Task& task) {
    const From<T> from(grid, image, row, first, task);
    Asked asked{};  // cleared for the same reason as powers
    each_class(task.quarter, [&](int k, int) {
      const T* above = from.above + k * from.step;
      asked.above[k] = bits_of(above[0]);
      asked.below[k] = bits_of(above[from.down]);
    });
    return asked;
  }

  struct Range {
    float top = -INFINITY, low = INFINITY, not_finite = 0;
  };
  FASTMT_INLINE void put_class(const Task& task, int c, float above, float below,
                               Range& range) const {
    float* to = at + task.column * COLUMN + c;
    to[0] = above;
    to[ROW] = below;
    range.top = max(range.top, max(above, below));
    range.low = min(range.low, min(above, below));
    range.not_finite += 0 * (above + below);
  }
  FASTMT_INLINE void put_range(const Task& task, const Range& range) const {
    float* to = at + task.column * COLUMN + task.quarter;
    to[TOPS] = range.top;
    to[LOWS] = range.not_finite == 0 ? range.low : -INFINITY;
  }
  FASTMT_INLINE void put(Type type, const Task& task, const Asked& asked) const {
    float above[EACH], below[EACH];
    with_type(type, [&](auto constant) {
      using T = typename decltype(constant)::type;
      each_class(task.quarter, [&](int k, int) {
        above[k] = widen(of_bits<T>(asked.above[k]));
        below[k] = widen(of_bits<T>(asked.below[k]));
      });
    });
    Range range;
    each_class(task.quarter, [&](int k, int c) { put_class(task, c, above[k], below[k], range); });
    put_range(task, range);
  }
};

}  // namespace fastmt::cuda
