// Up-sampling that never happens: a thread owns an output column between two low-resolution rows,
// so its logits are a line in y, made from four corners once, and its gradient two sums a class.
// Neighbouring threads are neighbouring columns: maps are read in whole lines, and no row diverges.
#pragma once

#include "cuda/lanes.h"

namespace fastmt::cuda {

// Between low-resolution positions index and index + 1, by the fraction t.
struct At {
  int32_t index;
  float t;
};

FASTMT_INLINE At locate(const Axis& axis, int64_t output) {
  int64_t position = axis.scale * output + axis.offset;
  const int64_t last = int64_t(axis.size - 1) * axis.divisor;
  position = position < 0 ? 0 : position > last ? last : position;
  const Quotient at = floor_divide(position, axis.divisor, axis.per_divisor);
  // Beyond the border t is exactly 1, so that such a pixel leaves the inner neighbour alone.
  const bool beyond = at.floor > axis.highest();
  const int64_t rest = beyond ? at.rest + axis.divisor : at.rest;
  return {beyond ? axis.highest() : int32_t(at.floor), float(double(rest) * axis.per_divisor)};
}

FASTMT_INLINE int32_t lower_neighbour(const Axis& axis, int64_t output) {
  return locate(axis, output).index;
}

// Where a block is. In shared memory, where it takes no registers while pixels need them.
struct Place {
  int32_t image;
  int32_t band, bands;            // the first band and how many
  int32_t first_row, rows;        // output rows
  int32_t first_column, columns;  // output columns

  FASTMT_INLINE explicit Place(const Cells& cells) {
    uint32_t rest = blockIdx.x;
    const int32_t tile = int32_t(rest % uint32_t(cells.tiles));
    rest /= uint32_t(cells.tiles);
    const int32_t segment = int32_t(rest % uint32_t(cells.segments));
    rest /= uint32_t(cells.segments);
    band = int32_t(rest % uint32_t(cells.spans)) * cells.span;
    image = int32_t(rest / uint32_t(cells.spans));
    bands = band + cells.span < cells.bands ? cells.span : cells.bands - band;
    first_row = cells.first.rows.first(band) + segment * MAX_ROWS;
    rows = rows_of(cells.first.rows, bands);
    first_column = tile * cells.tile;
    const int32_t right = cells.first.columns.out - first_column;
    columns = right < cells.tile ? right : cells.tile;
  }
  // Rows of the first so many bands.
  FASTMT_INLINE int32_t rows_of(const Axis& axis, int32_t first_bands) const {
    const int32_t left = axis.first(int64_t(band) + first_bands) - first_row;
    return left < MAX_ROWS ? left : MAX_ROWS;
  }
  FASTMT_INLINE bool inside() const { return this_thread() < columns; }
  // Of the thread; threads beyond the last column repeat it.
  FASTMT_INLINE int32_t column() const {
    return first_column + (inside() ? this_thread() : columns - 1);
  }
};

// An output row between low-resolution ones, and how exponentials get there from the row before:
// anew where it `enters` a band of the grid or starts a walk.
enum class Move : int32_t { enter, start, keep, walk };
struct Row {
  At at;
  Move move;

  FASTMT_INLINE Row(const Grid& grid, int32_t first, int i) : move(Move::enter) {
    constexpr int longest = 8;  // rows until a walk starts anew: roundings multiply
    constexpr float rounding = 1e-6f;
    at = locate(grid.rows, int64_t(first) + i);
    if (i == 0) return;
    const At before = locate(grid.rows, int64_t(first) + i - 1);
    if (at.index != before.index) return;
    const int32_t entered = grid.rows.first(at.index) - first;  // the band's first row
    const int32_t done = entered > 0 ? i - entered : i;
    const bool walks = fabsf(at.t - (before.t + grid.step())) <= rounding;
    move = done % longest == 0 ? Move::start
           : at.t == before.t  ? Move::keep
           : walks             ? Move::walk
                               : Move::start;
  }
};

// What a block works out once about its tile, in shared memory: the divisions that it takes to
// place a row or a column are far from free. Grid 0 gets the gradient, the others are the teachers.
struct Tile {
  float* t;        // [grid][tile]: of the columns
  int32_t* index;  // [grid][tile]
  Row* row;        // [grid][MAX_ROWS]
  int32_t* start;  // [reach + 1]: the first column of the tile in each of its cells, by grid 0
  int tile;

  FASTMT_INLINE Tile(const Cells& cells, float* shared)
      : t(shared + cells.shared.t),
        index(reinterpret_cast<int32_t*>(shared + cells.shared.index)),
        row(reinterpret_cast<Row*>(shared + cells.shared.row)),
        start(reinterpret_cast<int32_t*>(shared + cells.shared.start)),
        tile(cells.tile) {}

  FASTMT_INLINE void put(int number, const Grid& grid, const Place& place) const {
    const At at = locate(grid.columns, place.column());
    t[number * tile + threadIdx.x] = at.t;
    index[number * tile + threadIdx.x] = at.index;
    each_of_warp(number, place.rows,
                 [&](int i) { row[number * MAX_ROWS + i] = Row(grid, place.first_row, i); });
  }

  FASTMT_INLINE void put_starts(const Cells& cells, const Place& place) const {
    const Axis& columns = cells.first.columns;
    each_of_warp(cells.grids, cells.reach + 1, [&](int j) {
      const int64_t index = lower_neighbour(columns, place.first_column);
      const int32_t first = columns.first(index + j) - place.first_column;
      start[j] = first < 0 ? 0 : first > place.columns ? place.columns : first;
    });
  }

  // f(i) for each i below `count`, by the threads of one warp: the others have tables of their own.
  template <class F>
  FASTMT_INLINE void each_of_warp(int warp, int count, F f) const {
    const int lanes = blockDim.x < 32 ? blockDim.x : 32, warps = (blockDim.x + 31) / 32;
    if (int(threadIdx.x) / 32 != warp % warps) return;
    for (int i = threadIdx.x % 32; i < count; i += lanes) f(i);
  }

  FASTMT_INLINE Row row_at(int grid, int i) const { return row[grid * MAX_ROWS + i]; }
  FASTMT_INLINE int32_t first(int grid) const { return index[grid * tile]; }
  FASTMT_INLINE At column_at(int grid) const {
    const int own = grid * tile + this_thread();
    return {index[own], t[own]};
  }
};

// The two logits on an axis that a position lies between: the offset of the first, from there to
// the second, and the share t of that. A logit of weight 0 does not count, whatever it holds: where
// only one has any weight it is both of them, half each.
template <class Offset>
struct Between {
  Offset first, next;
  float t;

  FASTMT_INLINE Between(At at, Offset stride) : first(at.index * stride), next(stride), t(at.t) {
    if (t == 1) first += stride;
    if (t == 0 || t == 1) next = 0, t = 0.5f;
  }
  FASTMT_INLINE float mix(float a, float b) const { return (1 - t) * a + t * b; }
};

// The corners of a thread's column in one grid.
struct Across : Between<int64_t> {
  FASTMT_INLINE Across(const Grid& grid, int64_t image, At at) : Between(at, grid.column) {
    first += image * grid.image;
  }
};

// The C values of one pixel.
struct Column {
  float* at;
  int pitch;
  FASTMT_INLINE float& operator[](int c) const { return at[c * pitch]; }
};

// The logits of a column.
FASTMT_INLINE void interpolate(const Grid& grid, const Across& across, At row, int classes,
                               Column to) {
  const Between<int64_t> down(row, grid.row);
  with_type(grid.type, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* left = static_cast<const T*>(grid.data) + down.first + across.first;
    FASTMT_UNROLL
    for (int c = 0; c < classes; ++c, left += grid.channel) {
      const T *right = left + across.next, *below = left + down.next;
      to[c] = down.mix(across.mix(widen(*left), widen(*right)),
                       across.mix(widen(*below), widen(below[across.next])));
    }
  });
}

// Of numbers that are not negative, which takes a multiplication less for each.
FASTMT_INLINE int64_t offset_in(const Map& map, int64_t image, int32_t row, int32_t column) {
  return uint32_t(image) * map.image + uint32_t(row) * map.row + uint32_t(column) * map.column;
}

template <class T>
FASTMT_INLINE T value_at(const Map& map, int64_t image, int32_t row, int32_t column) {
  return static_cast<const T*>(map.data)[offset_in(map, image, row, column)];
}

// A byte or a 64-bit integer of a map, on its way until its value is asked for.
struct Integer {
  int64_t wide = 0;
  uint8_t byte = 0;

  FASTMT_INLINE Integer(const Map& map, int64_t image, int32_t row, int32_t column) {
    const int64_t offset = offset_in(map, image, row, column);
    if (map.type == Type::uint8)
      byte = static_cast<const uint8_t*>(map.data)[offset];
    else
      wide = static_cast<const int64_t*>(map.data)[offset];
  }
  FASTMT_INLINE int64_t of(const Map& map) const { return map.type == Type::uint8 ? byte : wide; }
};

FASTMT_INLINE int64_t integer_at(const Map& map, int64_t image, int32_t row, int32_t column) {
  return Integer(map, image, row, column).of(map);
}

}  // namespace fastmt::cuda
