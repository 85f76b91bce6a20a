// The transposed interpolation: gradients of output pixels summed into the low-resolution columns
// of a tile, without atomics. Each sum has one thread and one order.
#pragma once

#include "cuda/cells.h"

namespace fastmt::cuda {

// Where the number of classes is constant: columns of a block, at most, and the distance between
// rows of them in shared memory, odd, so that threads read down the rows without bank conflicts.
constexpr int FIXED_TILE = 128, FIXED_PITCH = FIXED_TILE + 1;

// The gradient of a column and class, as two sums over rows: of g, and of t g for the lower one.
struct Corner {
  float &both, &lower;
  float t;
  FASTMT_INLINE void operator=(float gradient) const {
    both += gradient;
    lower += t * gradient;
  }
};

// The sums of a column in registers.
template <int C>
struct Corners {
  float both[C], lower[C];

  struct Row {
    Corners& corners;
    float t;
    FASTMT_INLINE Corner operator[](int c) const { return {corners.both[c], corners.lower[c], t}; }
  };
  FASTMT_INLINE Row at(float t) { return {*this, t}; }
};

// The transposed interpolation along the columns of a tile: put(j, k, sum) for each low-resolution
// column j of the tile and each of K rows of `value(k, column)`. Threads are neighbours in k,
// always the same one for the same (j, k), and every sum runs in the order of the columns.
template <class Value, class Put>
FASTMT_INLINE void join_columns(const Cells& cells, const Tile& tile, int K, Value value, Put put) {
  const int parts = int(blockDim.x) > K ? int(blockDim.x) / K : 1;
  for (int task = threadIdx.x; task < parts * K; task += blockDim.x) {
    const int k = task % K, part = task / K;
    const int begin = cells.reach * part / parts, end = cells.reach * (part + 1) / parts;
    float before = 0;
    if (begin > 0)
      for (int x = tile.start[begin - 1]; x < tile.start[begin]; ++x)
        before += tile.column_t(x) * value(k, x);
    for (int j = begin; j < end; ++j) {
      float both = 0, right = 0;
      for (int x = tile.start[j]; x < tile.start[j + 1]; ++x) {
        const float gradient = value(k, x);
        both += gradient;
        right += tile.column_t(x) * gradient;
      }
      put(j, k, before + (both - right));
      before = right;
    }
  }
}

// What the columns of a block add to its sums, [quantity][tile] in shared memory: too cold for
// registers.
struct Tally {
  float* own;
  int tile;

  FASTMT_INLINE explicit Tally(float* shared) : own(shared + threadIdx.x), tile(blockDim.x) {
    for (int n = 0; n < QUANTITIES; ++n) own[n * tile] = 0;
  }
  FASTMT_INLINE void add(int quantity, float value) const { own[quantity * tile] += value; }

  // The sums over the threads, in a fixed order, to sums[quantity][block].
  FASTMT_INLINE void put(const Cells& cells) const {
    int half = 1;
    while (2 * half < tile) half *= 2;
    for (; half > 0; half /= 2) {
      __syncthreads();
      if (int(threadIdx.x) < half && int(threadIdx.x) + half < tile)
        for (int n = 0; n < QUANTITIES; ++n) own[n * tile] += own[n * tile + half];
    }
    if (threadIdx.x == 0)
      for (int n = 0; n < QUANTITIES; ++n)
        cells.sums[n * cells.blocks() + int64_t(blockIdx.x)] = own[n * tile];
    __syncthreads();
  }
};

// Shared memory of a block, in floats: rows of values whose columns are joined, tallies, a weight
// for each column, the tile.
struct Shared {
  int64_t pitch, tallies, weights, tile, end;

  FASTMT_BOTH Shared(const Cells& cells, int rows)
      : pitch(is_fixed(cells.classes) ? FIXED_PITCH : cells.tile | 1),
        tallies(rows * pitch),
        weights(tallies + QUANTITIES * cells.tile),
        tile((weights + cells.tile + 1) / 2 * 2),
        end(tile + Tile::floats_of(cells)) {}
};

inline int64_t shared_bytes(const Cells& cells, int rows) {
  return Shared(cells, rows).end * int64_t(sizeof(float));
}

// What a block works with.
struct Block {
  const Cells& cells;
  Place place;
  float *rows, *weights;  // [row][pitch], [tile]
  int pitch;
  Tile tile;
  Tally tally;

  FASTMT_INLINE Block(const Cells& cells, const Shared& layout, float* shared)
      : cells(cells),
        place(cells),
        rows(shared),
        weights(shared + layout.weights),
        pitch(int(layout.pitch)),
        tile(cells, shared + layout.tile),
        tally(shared + layout.tallies) {
    tile.put(0, cells.first, place);
    tile.put_starts(cells, place);
  }

  FASTMT_INLINE float* partial() const {
    return cells.partial + int64_t(blockIdx.x) * cells.reach * 2 * cells.classes;
  }
};

// The sums of a column in shared memory, [both, lower][C], for pixels that need the registers.
template <int C>
struct SharedCorners {
  float *both, *lower;

  struct Row {
    const SharedCorners& corners;
    float t;
    FASTMT_INLINE Corner operator[](int c) const {
      return {corners.both[c * FIXED_PITCH], corners.lower[c * FIXED_PITCH], t};
    }
  };
  FASTMT_INLINE explicit SharedCorners(const Block& block)
      : both(block.rows + threadIdx.x), lower(both + C * FIXED_PITCH) {
    for (int c = 0; c < C; ++c) both[c * FIXED_PITCH] = lower[c * FIXED_PITCH] = 0;
  }
  FASTMT_INLINE Row at(float t) const { return {*this, t}; }
};

// Leaves the corners of every column of the tile, [both, lower][C] in shared memory, in the block's
// partial gradient.
template <int C>
FASTMT_INLINE void put_corners(const Block& block) {
  __syncthreads();
  float* partial = block.partial();
  const float* both = block.rows;
  const float* lower = both + C * FIXED_PITCH;
  join_columns(
      block.cells, block.tile, 2 * C,
      [&](int k, int x) {
        return both[k * FIXED_PITCH + x] - (k < C ? lower[k * FIXED_PITCH + x] : 0.0f);
      },
      [&](int j, int k, float sum) { partial[j * 2 * C + k] = sum; });
}

template <int C>
FASTMT_INLINE void put_corners(const Block& block, const Corners<C>& corners) {
  FASTMT_UNROLL
  for (int c = 0; c < C; ++c) {
    block.rows[c * FIXED_PITCH + threadIdx.x] = corners.both[c];
    block.rows[(C + c) * FIXED_PITCH + threadIdx.x] = corners.lower[c];
  }
  put_corners<C>(block);
}

// Adds the gradient of an output row, in the first rows of shared memory, to the partial gradient.
FASTMT_INLINE void put_row(const Block& block, float t) {
  __syncthreads();
  const int classes = block.cells.classes;
  float* partial = block.partial();
  join_columns(
      block.cells, block.tile, classes,
      [&](int c, int x) {
        return block.weights[x] == 0.0f ? 0.0f : block.rows[c * block.pitch + x];
      },
      [&](int j, int c, float sum) {
        float* at = partial + j * 2 * classes + c;
        at[0] += (1 - t) * sum;
        at[classes] += t * sum;
      });
  __syncthreads();
}

// Clears the block's partial gradient, each value by the thread that adds to it.
FASTMT_INLINE void clear_rows(const Block& block) {
  const int classes = block.cells.classes;
  float* partial = block.partial();
  join_columns(
      block.cells, block.tile, classes, [](int, int) { return 0.0f; },
      [&](int j, int c, float) {
        partial[j * 2 * classes + c] = 0;
        partial[j * 2 * classes + classes + c] = 0;
      });
}

}  // namespace fastmt::cuda
