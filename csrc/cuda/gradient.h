// The transposed interpolation: gradients of output pixels summed into the low-resolution columns
// of a tile, without atomics. Each sum has one thread and one order.
#pragma once

#include "cuda/block.h"

namespace fastmt::cuda {

// The gradient of a column and class, summed for the low-resolution rows above and below.
struct Corner {
  float &upper, &lower;
  float above, below;  // the shares of the two rows

  FASTMT_INLINE void operator=(float gradient) const {
    upper += above * gradient;
    lower += below * gradient;
  }
  FASTMT_INLINE void operator=(Product gradient) const {
    upper += above * gradient.factor * gradient.value;
    lower += below * gradient.factor * gradient.value;
  }
};

// The sums of a column in registers.
template <int C>
struct Corners {
  float upper[C], lower[C];

  struct Row {
    Corners& corners;
    float t;
    FASTMT_INLINE Corner operator[](int c) const {
      return {corners.upper[c], corners.lower[c], 1 - t, t};
    }
  };
  FASTMT_INLINE Row at(float t) { return {*this, t}; }
};

// The gradients of neighbouring columns, summed for the low-resolution columns at their sides.
struct Run {
  float both, right;

  FASTMT_INLINE Run() : both(0), right(0) {}
  FASTMT_INLINE void add(float t, float gradient) {
    both += gradient;
    right += t * gradient;
  }
  FASTMT_INLINE float left() const { return both - right; }
};

// add(t, gradient) for columns `begin` to `end` of a row, in order; rows start at multiples of 16
// bytes. No loop is unrolled: cells are short, and what runs once a band is slow to fetch.
template <class F>
FASTMT_INLINE void each_column(const float* t, const float* row, int begin, int end, F add) {
  int x = begin;
#pragma unroll 1
  for (; x < end && x % 4 != 0; ++x) add(t[x], row[x]);
#pragma unroll 1
  for (; x + 4 <= end; x += 4) {
    const Four shares = four_at(t + x), gradients = four_at(row + x);
    FASTMT_UNROLL
    for (int n = 0; n < 4; ++n) add(shares.at[n], gradients.at[n]);
  }
#pragma unroll 1
  for (; x < end; ++x) add(t[x], row[x]);
}

// The transposed interpolation along the columns of a tile: put(j, k, sum) for each low-resolution
// column j of the tile and each of K rows, whose columns run(k, begin, end) sums. Threads are
// neighbours in k, always the same one for the same (j, k), and every sum runs in the order of the
// columns.
template <class RunOf, class Put>
FASTMT_INLINE void join_columns(const Cells& cells, const Tile& tile, int K, RunOf run, Put put) {
  const int parts = int(blockDim.x) > K ? int(blockDim.x) / K : 1;
  for (int task = threadIdx.x; task < parts * K; task += blockDim.x) {
    const int k = task % K, part = task / K;
    const int begin = cells.reach * part / parts, end = cells.reach * (part + 1) / parts;
    float before = 0;
#pragma unroll 1
    for (int j = begin > 0 ? begin - 1 : 0; j < end; ++j) {
      const Run own = run(k, tile.start[j], tile.start[j + 1]);
      if (j >= begin) put(j, k, before + own.left());
      before = own.right;
    }
  }
}

// The sums of a column in shared memory, twice [C], for pixels that need the registers.
template <int C>
struct SharedCorners {
  float *upper, *lower;

  struct Row {
    const SharedCorners& corners;
    float t;
    FASTMT_INLINE Corner operator[](int c) const {
      return {corners.upper[c * FIXED_PITCH], corners.lower[c * FIXED_PITCH], 1 - t, t};
    }
  };
  FASTMT_INLINE explicit SharedCorners(const Block& block)
      : upper(block.rows + threadIdx.x), lower(upper + C * FIXED_PITCH) {
    clear(upper);
    clear(lower);
  }
  FASTMT_INLINE Row at(float t) const { return {*this, t}; }

  // The upper row is no longer needed, the lower one becomes it.
  FASTMT_INLINE void go_down() {
    clear(upper);
    float* const cleared = upper;
    upper = lower;
    lower = cleared;
  }

 private:
  static FASTMT_INLINE void clear(float* row) {
    for (int c = 0; c < C; ++c) row[c * FIXED_PITCH] = 0;
  }
};

// Leaves the sums of every column of the tile, `rows`[C] in shared memory, in a level of the
// block's partial gradient. A thread joins one class in a part of the cells; what the last of them
// gives to the column at its right goes through shared memory.
template <int C>
FASTMT_INLINE void put_level(const Block& block, int level, const float* rows) {
  const uint32_t parts = blockDim.x / C, reach = block.cells.reach, own = threadIdx.x;
  const uint32_t c = own % C, part = own / C, each = (reach + parts - 1) / parts;
  const uint32_t begin = part * each, end = begin + each < reach ? begin + each : reach;
  float* partial = block.partial(level) + c;
  float first = 0, before = 0;
  __syncthreads();
  const bool works = part < parts && begin < end;
  if (works) {
#pragma unroll 1
    for (uint32_t j = begin; j < end; ++j) {
      Run run;
      each_column(block.tile.t, rows + c * FIXED_PITCH, block.tile.start[j], block.tile.start[j + 1],
                  [&](float t, float gradient) { run.add(t, gradient); });
      const float sum = before + run.left();
      if (j == begin)
        first = sum;
      else
        partial[j * C] = sum;
      before = run.right;
    }
  }
  float* edge = block.weights + own;
  *edge = before;
  __syncthreads();
  if (works) partial[begin * C] = first + (part > 0 ? edge[-C] : 0.0f);
}

template <int C>
FASTMT_INLINE void put_level(const Block& block, int level, Corners<C>& corners) {
  FASTMT_UNROLL
  for (int c = 0; c < C; ++c) {
    block.rows[c * FIXED_PITCH + threadIdx.x] = corners.upper[c];
    corners.upper[c] = corners.lower[c];
    corners.lower[c] = 0;
  }
  put_level<C>(block, level, block.rows);
}

template <int C>
FASTMT_INLINE void put_level(const Block& block, int level, SharedCorners<C>& corners) {
  put_level<C>(block, level, corners.upper - threadIdx.x);
  corners.go_down();
}

// Adds the gradient of an output row, in the first rows of shared memory, to the partial gradient.
FASTMT_INLINE void put_row(const Block& block, At row) {
  __syncthreads();
  const int classes = block.cells.classes;
  float* partial = block.partial(row.index - block.place.band);
  const int64_t below = block.partial(1) - block.partial(0);
  join_columns(
      block.cells, block.tile, classes,
      [&](int c, int begin, int end) {
        Run run;
        for (int x = begin; x < end; ++x)
          if (block.weights[x] != 0.0f)
            run.add(block.tile.t[x], block.rows[c * block.pitch + x]);
        return run;
      },
      [&](int j, int c, float sum) {
        float* at = partial + j * classes + c;
        at[0] += (1 - row.t) * sum;
        at[below] += row.t * sum;
      });
  __syncthreads();
}

// Clears the block's partial gradient, each value by the thread that adds to it.
FASTMT_INLINE void clear_rows(const Block& block) {
  const int classes = block.cells.classes;
  join_columns(
      block.cells, block.tile, classes, [](int, int, int) { return Run(); },
      [&](int j, int c, float) {
        for (int level = 0; level < block.cells.levels(); ++level)
          block.partial(level)[j * classes + c] = 0;
      });
}

}  // namespace fastmt::cuda
