#include <algorithm>
#include <stdexcept>

#include "cuda/block.h"

namespace fastmt::cuda {

namespace {

constexpr int WARP = 32;

// Threads of a block are output columns of a row.
void set_tile(Cells& cells, int32_t tile, bool joins) {
  const Axis& columns = cells.first.columns;
  cells.tile = tile;
  cells.tiles = (columns.out + tile - 1) / tile;
  cells.reach = joins ? reach_of(columns, tile) : 0;
}

// Output rows of a band, at most; the first and the last also have what lies beyond the border.
int32_t largest_band(const Axis& rows, int32_t bands) {
  const int64_t inner = rows.scale > 0 ? (rows.divisor + rows.scale - 1) / rows.scale : 0;
  const int32_t outer = std::max(rows.first(1), rows.out - rows.first(bands - 1));
  return int32_t(std::max<int64_t>(inner, outer));
}

// Bands that have at most MAX_ROWS rows together, wherever they are.
int64_t bands_of_rows(const Axis& rows, int32_t bands) {
  if (rows.out <= MAX_ROWS) return bands;
  const int32_t left = MAX_ROWS - largest_band(rows, bands);
  if (bands == 1 || left < 0) return 1;
  return std::min<int64_t>(1 + left * rows.scale / rows.divisor, bands - 1);
}

// Bands of a block: what it does once weighs as much as some of them, but there have to be blocks
// enough.
int32_t span_of(const Cells& cells) {
  const int64_t blocks = cells.images * cells.bands * cells.tiles;
  const int64_t most = blocks / std::max<int64_t>(busy_blocks(), 1);
  return int32_t(std::clamp<int64_t>(most, 1, bands_of_rows(cells.first.rows, cells.bands)));
}

template <class T>
constexpr int64_t floats_of() {
  return sizeof(T) / sizeof(float);
}

}  // namespace

int32_t reach_of(const Axis& columns, int32_t tile) {
  const int64_t crossed = (tile - 1) * columns.scale / columns.divisor;
  return int32_t(std::min<int64_t>(crossed + 3, columns.size));
}

Shared shared_of(const Cells& cells, int64_t rows) {
  const int64_t columns = int64_t(cells.grids) * cells.tile;
  Shared at{};
  at.pitch = is_fixed(cells.classes) ? FIXED_PITCH : cells.tile | 1;
  at.tallies = rows * at.pitch;
  at.weights = at.tallies + QUANTITIES * cells.tile;
  at.place = at.weights + cells.tile;
  at.t = (at.place + floats_of<Place>() + 3) / 4 * 4;
  at.index = at.t + columns;
  at.row = at.index + columns;
  at.start = at.row + cells.grids * MAX_ROWS * floats_of<Row>();
  at.end = (at.start + cells.reach + 1 + 3) / 4 * 4;
  return at;
}

void plan(Cells& cells, int columns) {
  const Axis& rows = cells.first.rows;
  cells.bands = std::max(rows.size - 1, 1);
  cells.segments = (largest_band(rows, cells.bands) + MAX_ROWS - 1) / MAX_ROWS;
  const int32_t width = (cells.first.columns.out + WARP - 1) / WARP * WARP;
  const bool fixed = is_fixed(cells.classes);
  const bool joins = columns > 0;
  set_tile(cells, std::min(width, fixed ? FIXED_TILE : 8 * WARP), joins);
  const int32_t least = fixed ? WARP : 1;  // put_level has a thread for each class
  const int values = (joins && fixed ? 2 : columns) * cells.classes;
  const int64_t limit = shared_memory_of_block();
  while (shared_bytes(cells, values) > limit) {
    if (cells.tile == least)
      throw std::runtime_error(
          "fastmt: a row of the logits is too long for the CUDA C++ kernels; use "
          "fastmt.backend(\"triton\")");
    set_tile(cells, cells.tile > WARP ? cells.tile - WARP : cells.tile / 2, joins);
  }
  cells.span = span_of(cells);
  cells.spans = (cells.bands + cells.span - 1) / cells.span;
}

}  // namespace fastmt::cuda
