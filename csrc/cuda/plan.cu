#include <algorithm>
#include <stdexcept>

#include "cuda/cells.h"
#include "cuda/gradient.h"

namespace fastmt::cuda {

namespace {

constexpr int WARP = 32;

// Threads of a block are output columns of a row.
void set_tile(Cells& cells, int32_t tile) {
  const Axis& columns = cells.first.columns;
  cells.tile = tile;
  cells.tiles = (columns.out + tile - 1) / tile;
  cells.reach = reach_of(columns, tile);
}

int32_t largest_band(const Axis& rows, int32_t bands) {
  const int64_t inner = rows.scale > 0 ? rows.divisor / rows.scale + 1 : 0;
  const int32_t outer = std::max(rows.first(1), rows.out - rows.first(bands - 1));
  return int32_t(std::max<int64_t>(inner, outer));
}

}  // namespace

int32_t reach_of(const Axis& columns, int32_t tile) {
  const int64_t crossed = (tile - 1) * columns.scale / columns.divisor;
  return int32_t(std::min<int64_t>(crossed + 3, columns.size));
}

void plan(Cells& cells, int columns) {
  const Axis& rows = cells.first.rows;
  cells.bands = std::max(rows.size - 1, 1);
  cells.segments = (largest_band(rows, cells.bands) + MAX_ROWS - 1) / MAX_ROWS;
  const int32_t width = (cells.first.columns.out + WARP - 1) / WARP * WARP;
  const bool fixed = is_fixed(cells.classes);
  set_tile(cells, std::min(width, fixed ? FIXED_TILE : 8 * WARP));
  const int32_t least = fixed ? WARP : 1;  // put_corners has a thread for each class
  const int values = (fixed ? 2 : columns) * cells.classes;
  const int64_t limit = shared_memory_of_block();
  while (shared_bytes(cells, values) > limit) {
    if (cells.tile == least)
      throw std::runtime_error(
          "fastmt: a row of the logits is too long for the CUDA C++ kernels; use "
          "fastmt.backend(\"triton\")");
    set_tile(cells, cells.tile > WARP ? cells.tile - WARP : cells.tile / 2);
  }
}

}  // namespace fastmt::cuda
