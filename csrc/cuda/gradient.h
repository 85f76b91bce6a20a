// The transposed interpolation: gradients of output pixels summed into the low-resolution columns
// of a tile, without atomics. Each sum has one thread and one order.
#pragma once

#include "cuda/cells.h"

namespace fastmt::cuda {

// Where the number of classes is constant: columns of a block, at most, and the distance between
// rows of them in shared memory, so that threads read packs down the rows without bank conflicts.
constexpr int FIXED_TILE = 128, FIXED_PITCH = FIXED_TILE + 4;

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

// add(i, t, gradient) of row i of two, for columns `begin` to `end` in order; rows start at
// multiples of 16 bytes. No loop is unrolled: cells are short, and what runs once a block is slow to
// fetch.
template <class F>
FASTMT_INLINE void each_column(const float* t, const float* const (&rows)[2], int begin, int end,
                               F add) {
  int x = begin;
  const auto one = [&] {
    for (int i = 0; i < 2; ++i) add(i, t[x], rows[i][x]);
  };
#pragma unroll 1
  for (; x < end && x % 4 != 0; ++x) one();
#pragma unroll 1
  for (; x + 4 <= end; x += 4) {
    const Four shares = four_at(t + x), gradients[2] = {four_at(rows[0] + x), four_at(rows[1] + x)};
    FASTMT_UNROLL
    for (int n = 0; n < 4; ++n)
      for (int i = 0; i < 2; ++i) add(i, shares.at[n], gradients[i].at[n]);
  }
#pragma unroll 1
  for (; x < end; ++x) one();
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

// What the columns of a block add to its sums.
struct Tally {
  static constexpr int RUNS = 16;
  float* shared;  // [quantity][tile]
  float sum[QUANTITIES];
  int32_t counts;  // of two kinds of rows, 16 bits each

  FASTMT_INLINE explicit Tally(float* shared) : shared(shared), sum{}, counts(0) {}
  FASTMT_INLINE void add(int quantity, float value) { sum[quantity] += value; }
  FASTMT_INLINE void count(bool first, bool second) { counts += int(first) + (int(second) << 16); }
  FASTMT_INLINE void add_counts(int first, int second) {
    add(first, float(counts & 0xffff));
    add(second, float(counts >> 16));
  }

  // The sums over the threads, in a fixed order, to sums[quantity][block]: RUNS sums of every
  // RUNS-th column each, then the sum of these, which also stays in the first column.
  FASTMT_INLINE void put(const Cells& cells) const {
    const int tile = int(blockDim.x), own = int(threadIdx.x);
    for (int n = 0; n < QUANTITIES; ++n) shared[n * tile + own] = sum[n];
    __syncthreads();
    for (int task = own; task < QUANTITIES * RUNS; task += tile) {
      const int first = task % RUNS;
      float* columns = shared + task / RUNS * tile;
      float total = 0;
#pragma unroll 8
      for (int x = first; x < tile; x += RUNS) total += columns[x];
      if (first < tile) columns[first] = total;
    }
    __syncthreads();
    for (int n = own; n < QUANTITIES; n += tile) {
      float total = 0;
      for (int x = 0; x < RUNS && x < tile; ++x) total += shared[n * tile + x];
      shared[n * tile] = total;
      cells.sums[n * cells.blocks() + int64_t(blockIdx.x)] = total;
    }
  }
};

// Shared memory of a block, in floats: rows of values whose columns are joined, tallies, two
// weights for each column, the tile. A multiple of 16 bytes, behind which stages may lie.
struct Shared {
  int64_t pitch, tallies, weights, tile, end;

  FASTMT_BOTH Shared(const Cells& cells, int rows)
      : pitch(is_fixed(cells.classes) ? FIXED_PITCH : cells.tile | 1),
        tallies(rows * pitch),
        weights(tallies + QUANTITIES * cells.tile),
        tile((weights + 2 * cells.tile + 3) / 4 * 4),
        end((tile + Tile::floats_of(cells) + 3) / 4 * 4) {}
};

inline int64_t shared_bytes(const Cells& cells, int rows) {
  return Shared(cells, rows).end * int64_t(sizeof(float));
}

// What a block works with.
struct Block {
  const Cells& cells;
  Place place;
  float *rows, *weights, *stage;  // [row][pitch], [2][tile]
  int pitch;
  Tile tile;
  Tally tally;

  FASTMT_INLINE Block(const Cells& cells, const Shared& layout, float* shared)
      : cells(cells),
        place(cells),
        rows(shared),
        weights(shared + layout.weights),
        stage(shared + layout.end),
        pitch(int(layout.pitch)),
        tile(cells, shared + layout.tile),
        tally(shared + layout.tallies) {}

  // The threads of the block meet before they read it.
  FASTMT_INLINE void put_tile() const {
    tile.put(0, cells.first, place);
    tile.put_starts(cells, place);
  }

  FASTMT_INLINE float* partial() const {
    return cells.partial + int64_t(blockIdx.x) * cells.reach * 2 * cells.classes;
  }
};

// The sums of a column in shared memory, [upper, lower][C], for pixels that need the registers.
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
    for (int c = 0; c < C; ++c) upper[c * FIXED_PITCH] = lower[c * FIXED_PITCH] = 0;
  }
  FASTMT_INLINE Row at(float t) const { return {*this, t}; }
};

// Leaves the corners of every column of the tile, [upper, lower][C] in shared memory, in the
// block's partial gradient. A thread joins both rows of one class in a part of the cells; what the last of
// them gives to the column at its right goes through shared memory.
template <int C>
FASTMT_INLINE void put_corners(const Block& block) {
  const uint32_t parts = blockDim.x / C, reach = block.cells.reach, own = threadIdx.x;
  const uint32_t c = own % C, part = own / C, each = (reach + parts - 1) / parts;
  const uint32_t begin = part * each, end = begin + each < reach ? begin + each : reach;
  const float* const rows[2] = {block.rows + c * FIXED_PITCH, block.rows + (C + c) * FIXED_PITCH};
  float* partial = block.partial() + c;
  float first[2] = {}, before[2] = {};
  __syncthreads();
  const bool works = part < parts && begin < end;
  if (works) {
#pragma unroll 1
    for (uint32_t j = begin; j < end; ++j) {
      Run runs[2];
      each_column(block.tile.t, rows, block.tile.start[j], block.tile.start[j + 1],
                  [&](int i, float t, float gradient) { runs[i].add(t, gradient); });
      for (int i = 0; i < 2; ++i) {
        const float sum = before[i] + runs[i].left();
        if (j == begin)
          first[i] = sum;
        else
          partial[(j * 2 + i) * C] = sum;
        before[i] = runs[i].right;
      }
    }
  }
  float* edge = block.weights + 2 * own;
  for (int i = 0; i < 2; ++i) edge[i] = before[i];
  __syncthreads();
  if (!works) return;
  for (int i = 0; i < 2; ++i)
    partial[(begin * 2 + i) * C] = first[i] + (part > 0 ? edge[i - 2 * C] : 0.0f);
}

template <int C>
FASTMT_INLINE void put_corners(const Block& block, const Corners<C>& corners) {
  FASTMT_UNROLL
  for (int c = 0; c < C; ++c) {
    block.rows[c * FIXED_PITCH + threadIdx.x] = corners.upper[c];
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
      [&](int c, int begin, int end) {
        Run run;
        for (int x = begin; x < end; ++x)
          if (block.weights[x] != 0.0f)
            run.add(block.tile.t[x], block.rows[c * block.pitch + x]);
        return run;
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
      block.cells, block.tile, classes, [](int, int, int) { return Run(); },
      [&](int j, int c, float) {
        partial[j * 2 * classes + c] = 0;
        partial[j * 2 * classes + classes + c] = 0;
      });
}

}  // namespace fastmt::cuda
