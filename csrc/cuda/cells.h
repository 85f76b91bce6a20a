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
  const int64_t floor = floor_divide(position, axis.divisor, axis.per_divisor);
  const int32_t index = floor < axis.highest() ? int32_t(floor) : axis.highest();
  // Beyond the border t is exactly 1, so that such a pixel leaves the inner neighbour alone.
  return {index, float(double(position - index * axis.divisor) * axis.per_divisor)};
}

// Where a block and its thread are.
struct Place {
  int32_t image;
  int32_t first_row, rows;            // output rows
  int32_t first_column, last_column;  // of the tile
  int32_t column;                     // of the thread; threads beyond the last one repeat it
  bool inside;

  FASTMT_INLINE explicit Place(const Cells& cells) {
    uint32_t rest = blockIdx.x;
    const int32_t tile = int32_t(rest % uint32_t(cells.tiles));
    rest /= uint32_t(cells.tiles);
    const int32_t segment = int32_t(rest % uint32_t(cells.segments));
    rest /= uint32_t(cells.segments);
    const int32_t band = int32_t(rest % uint32_t(cells.bands));
    image = int32_t(rest / uint32_t(cells.bands));
    first_row = cells.first.rows.first(band) + segment * MAX_ROWS;
    const int32_t left = cells.first.rows.first(int64_t(band) + 1) - first_row;
    rows = left < MAX_ROWS ? left : MAX_ROWS;
    const int32_t width = cells.first.columns.out;
    first_column = tile * cells.tile;
    last_column = first_column + cells.tile < width ? first_column + cells.tile : width;
    const int32_t own = first_column + int32_t(threadIdx.x);
    inside = own < last_column;
    column = inside ? own : last_column - 1;
  }
};

// An output row between low-resolution ones, and how exponentials get there from the row before.
enum class Move : int32_t { start, keep, walk };
struct Row {
  At at;
  Move move;

  FASTMT_INLINE Row(const Grid& grid, int32_t first, int i) : move(Move::start) {
    constexpr int longest = 8;  // rows until a walk starts anew: roundings multiply
    constexpr float rounding = 1e-6f;
    at = locate(grid.rows, int64_t(first) + i);
    if (i % longest == 0) return;
    const At before = locate(grid.rows, int64_t(first) + i - 1);
    if (at.index != before.index) return;
    if (at.t == before.t)
      move = Move::keep;
    else if (fabsf(at.t - (before.t + grid.step())) <= rounding)
      move = Move::walk;
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
      : t(shared),
        index(reinterpret_cast<int32_t*>(t + cells.grids * cells.tile)),
        row(reinterpret_cast<Row*>(index + cells.grids * cells.tile)),
        start(reinterpret_cast<int32_t*>(row + cells.grids * MAX_ROWS)),
        tile(cells.tile) {}

  FASTMT_INLINE void put(int number, const Grid& grid, const Place& place) const {
    const At at = locate(grid.columns, place.column);
    t[number * tile + threadIdx.x] = at.t;
    index[number * tile + threadIdx.x] = at.index;
    for (int i = threadIdx.x; i < place.rows; i += blockDim.x)
      row[number * MAX_ROWS + i] = Row(grid, place.first_row, i);
  }

  FASTMT_INLINE void put_starts(const Cells& cells, const Place& place) const {
    const Axis& columns = cells.first.columns;
    const int64_t index = locate(columns, place.first_column).index;
    for (int j = threadIdx.x; j <= cells.reach; j += blockDim.x) {
      const int32_t first = columns.first(index + j), last = place.last_column;
      start[j] = (first < place.first_column ? place.first_column
                  : first > last             ? last
                                             : first) -
                 place.first_column;
    }
  }

  FASTMT_INLINE Row row_at(int grid, int i) const { return row[grid * MAX_ROWS + i]; }
  FASTMT_INLINE At column_at(int grid) const {
    return {index[grid * tile + threadIdx.x], t[grid * tile + threadIdx.x]};
  }

  static FASTMT_BOTH int64_t floats_of(const Cells& cells) {
    return int64_t(cells.grids) * (3 * MAX_ROWS + 2 * cells.tile) + cells.reach + 1;
  }
};

// The two logits on an axis that a position lies between: the offset of the first, from there to
// the second, and the share t of that. A logit of weight 0 does not count, whatever it holds: where
// only one has any weight it is both of them, half each.
struct Between {
  int64_t first, next;
  float t;

  FASTMT_INLINE Between(At at, int64_t stride) : first(at.index * stride), next(stride), t(at.t) {
    if (t == 1) first += stride;
    if (t == 0 || t == 1) next = 0, t = 0.5f;
  }
  FASTMT_INLINE float mix(float a, float b) const { return (1 - t) * a + t * b; }
};

// The corners of a thread's column in one grid.
struct Across : Between {
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

// f(c, top, bottom): the logits of a column at the low-resolution row of offset `row`, and at the one
// that lies `down` from there.
template <class F>
FASTMT_INLINE void each_corner(const Grid& grid, const Across& across, int64_t row, int64_t down,
                               int classes, F f) {
  with_type(grid.type, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* left = static_cast<const T*>(grid.data) + row + across.first;
    FASTMT_UNROLL
    for (int c = 0; c < classes; ++c, left += grid.channel) {
      const T *right = left + across.next, *below = left + down, *opposite = below + across.next;
      f(c, across.mix(widen(*left), widen(*right)), across.mix(widen(*below), widen(*opposite)));
    }
  });
}

FASTMT_INLINE void interpolate(const Grid& grid, const Across& across, At row, int classes,
                               Column to) {
  const Between down(row, grid.row);
  each_corner(grid, across, down.first, down.next, classes,
              [&](int c, float top, float bottom) { to[c] = down.mix(top, bottom); });
}

// The logit of one class.
FASTMT_INLINE float logit_at(const Grid& grid, const Across& across, At row, int c) {
  const Between down(row, grid.row);
  float logit = 0;
  with_type(grid.type, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto* left = static_cast<const T*>(grid.data) + down.first + across.first + c * grid.channel;
    const auto *right = left + across.next, *below = left + down.next;
    logit = down.mix(across.mix(widen(*left), widen(*right)),
                     across.mix(widen(*below), widen(below[across.next])));
  });
  return logit;
}

// The exponentials of a column. Down it the logits are a line, so their exponentials are a
// geometric progression: two exps a class where a walk starts, one multiplication a pixel, and no
// registers for the corners. Where the logits reach too far apart for that, every row starts anew.
template <int C>
struct Powers {
  float column[C];  // exp(scale * (logit - top)), the pixel.h kind of Powers
  float ratio[C];
  bool walks;
  static constexpr float REACH = 60.0f;  // exp(60) times a large weight is still finite

  FASTMT_INLINE Powers() : walks(false) {}
  FASTMT_INLINE Column at() { return {column, 1}; }

  // To a row from the one above it; `column_at` says where the thread's column lies, and is asked
  // where a walk starts.
  template <class F>
  FASTMT_INLINE void go_to(const Grid& grid, int32_t image, F column_at, Row row, float scale) {
    if (!walks || row.move == Move::start)
      return start(grid, Across(grid, image, column_at()), row.at, scale);
    if (row.move == Move::keep) return;
    FASTMT_UNROLL
    for (int c = 0; c < C; ++c) column[c] *= ratio[c];
  }
  // Leaves a row out.
  FASTMT_INLINE void skip() { walks = false; }

  FASTMT_INLINE void start(const Grid& grid, const Across& across, At row, float scale) {
    float top = -INFINITY, low = INFINITY, not_finite = 0;
    const int64_t down = row.index + 1 < grid.rows.size ? grid.row : 0;
    each_corner(grid, across, row.index * grid.row, down, C, [&](int c, float above, float below) {
      top = max(top, max(above, below));
      low = min(low, min(above, below));
      not_finite += 0 * (below - above);
      column[c] = above;
      ratio[c] = below;
    });
    walks = (top - low) * scale + not_finite < REACH;
    if (!walks) top = -INFINITY;
    FASTMT_UNROLL
    for (int c = 0; c < C; ++c) {
      const float above = column[c], below = ratio[c];
      column[c] = row.t == 0 ? above : row.t == 1 ? below : (1 - row.t) * above + row.t * below;
      ratio[c] = below - above;
      if (!walks) top = max(top, column[c]);
    }
    FASTMT_UNROLL
    for (int c = 0; c < C; ++c) {
      column[c] = exp((column[c] - top) * scale);
      ratio[c] = exact_exp(ratio[c] * (grid.step() * scale));
    }
  }
};

// A student from its exponentials. Where the label's one is too small, its logarithm comes from
// logits.
template <bool WITH_LABEL, int C>
FASTMT_INLINE Student student_of(Powers<C>& powers, const Grid& grid, const Across& across, At row,
                                 int32_t label) {
  Student student = student_of_powers<WITH_LABEL>(powers.at(), label, C);
  if (WITH_LABEL && student.chosen < -Powers<C>::REACH - 1) {
    float top = -INFINITY;
#pragma unroll 1
    for (int c = 0; c < C; ++c) top = max(top, logit_at(grid, across, row, c));
    student.chosen = logit_at(grid, across, row, label) - top;
  }
  return student;
}

FASTMT_INLINE float float_at(const Map& map, int64_t image, int32_t row, int32_t column) {
  const int64_t offset = image * map.image + row * map.row + column * map.column;
  return static_cast<const float*>(map.data)[offset];
}

// A byte or a 64-bit integer.
FASTMT_INLINE int64_t integer_at(const Map& map, int64_t image, int32_t row, int32_t column) {
  const int64_t offset = image * map.image + row * map.row + column * map.column;
  if (map.type == Type::uint8) return static_cast<const uint8_t*>(map.data)[offset];
  return static_cast<const int64_t*>(map.data)[offset];
}

}  // namespace fastmt::cuda
