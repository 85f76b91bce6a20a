// What a block of threads works with: its place, the tables of its tile, the sums of its columns.
#pragma once

#include "cuda/cells.h"

namespace fastmt::cuda {

// Where the number of classes is constant: columns of a block, at most, and the distance between
// rows of them in shared memory, so that threads read packs down the rows without bank conflicts.
constexpr int FIXED_TILE = 128, FIXED_PITCH = FIXED_TILE + 4;

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

// What a block works with.
struct Block {
  const Cells& cells;
  Place& place;
  float *rows, *weights, *stage;  // [row][pitch], [tile]
  int pitch;
  Tile tile;
  Tally tally;

  FASTMT_INLINE Block(const Cells& cells, float* shared)
      : cells(cells),
        place(*reinterpret_cast<Place*>(shared + cells.shared.place)),
        rows(shared),
        weights(shared + cells.shared.weights),
        stage(shared + cells.shared.end),
        pitch(int(cells.shared.pitch)),
        tile(cells, shared),
        tally(shared + cells.shared.tallies) {
    if (threadIdx.x == 0) place = Place(cells);
    __syncthreads();
  }

  // The threads of the block meet before they read it.
  FASTMT_INLINE void put_tile() const {
    tile.put(0, cells.first, place);
    tile.put_starts(cells, place);
  }

  FASTMT_INLINE float* partial(int level) const {
    return cells.partial +
           (int64_t(blockIdx.x) * cells.levels() + level) * cells.reach * cells.classes;
  }
};

// Launches a kernel on the cells of a call, with memory for so many rows and for what is staged.
template <class Call>
void launch_cells(void (*kernel)(Call), Call call, int rows, int64_t staged, Stream stream) {
  call.cells.shared = shared_of(call.cells, rows);
  const int64_t bytes = call.cells.shared.end * int64_t(sizeof(float)) + staged;
  launch(kernel, call.cells.blocks(), call.cells.tile, bytes, stream, call);
}

// What an operation without a gradient leaves.
struct NoCorners {};
FASTMT_INLINE void put_level(const Block&, int, const NoCorners&) {}

// walk(band, begin, end) over the rows of each band of the block, which leaves in `corners` what they
// give to the levels at its sides (gradient.h). What threads share in a band is theirs alone: they
// meet before.
template <class Corners, class F>
FASTMT_INLINE void each_level(const Block& block, Corners&& corners, F walk) {
  const Place& place = block.place;
  int begin = 0;
#pragma unroll 1
  for (int level = 0; level <= place.bands; ++level) {
    if (level < place.bands) {
      const int end = place.rows_of(block.cells.first.rows, level + 1);
      if (level > 0) __syncthreads();
      if (begin < end) walk(place.band + level, begin, end);  // there may be more bands than rows
      begin = end;
    }
    if (block.cells.partial) put_level(block, level, corners);
  }
}

}  // namespace fastmt::cuda
