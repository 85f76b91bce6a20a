// softmax_confidence on cells: scores and labels are all that is written. Mirrors
// reference.softmax_confidence and csrc/cpu/confidence_kernel.h.
#pragma once

#include "cuda/block.h"

namespace fastmt::cuda {

// What a softmax takes of a column between two low-resolution rows, logits by temperature: a line
// for each class, made from four corners once.
template <int C>
struct Lines {
  float above[C], rise[C];
  bool finite;

  FASTMT_INLINE Lines(const Grid& grid, const Across& across, int32_t band, float scale) {
    const int64_t down = band + 1 < grid.rows.size ? grid.row : 0;
    float not_finite = 0;
    with_type(grid.type, [&](auto type) {
      using T = typename decltype(type)::type;
      const T* left = static_cast<const T*>(grid.data) + band * grid.row + across.first;
      FASTMT_UNROLL
      for (int c = 0; c < C; ++c, left += grid.channel) {
        const T *right = left + across.next, *below = left + down;
        const float first = across.mix(widen(*left), widen(*right));
        above[c] = first * scale;
        rise[c] = (across.mix(widen(*below), widen(below[across.next])) - first) * scale;
        not_finite += 0 * rise[c];
      }
    });
    finite = not_finite == 0;
  }
  FASTMT_INLINE void put(float t, Column y) const {
    FASTMT_UNROLL
    for (int c = 0; c < C; ++c) y[c] = fmaf(t, rise[c], above[c]);
  }
};

// The same where a line would be wrong: beside a corner that is not finite, and at its lower end,
// which it misses by a rounding of the upper one. A logit of weight 0 does not count.
FASTMT_INLINE void put_logits(const Grid& grid, const Across& across, At row, float scale,
                              int classes, Column y) {
  interpolate(grid, across, row, classes, y);
  FASTMT_UNROLL
  for (int c = 0; c < classes; ++c) y[c] *= scale;
}

FASTMT_INLINE Teacher score_of(Kind kind, Column y, int classes) {
  if (kind == Kind::max_prob) return teacher_pixel<Kind::max_prob>(y, classes, 1);
  if (kind == Kind::entropy) return teacher_pixel<Kind::entropy>(y, classes, 1);
  return teacher_pixel<Kind::margin>(y, classes, 1);
}

FASTMT_INLINE void put_confidence(const ConfidenceCells& call, const Place& place, int i,
                                  const Teacher& teacher) {
  if (!place.inside()) return;
  const Grid& grid = call.cells.first;
  const int64_t row = int64_t(place.image) * grid.rows.out + place.first_row + i;
  const int64_t at = row * grid.columns.out + place.first_column + this_thread();
  call.score[at] = teacher.score;
  call.label[at] = teacher.label;
}

// Registers of a thread: lines and what is exponentiated, 3 C.
template <int C>
__global__ void __launch_bounds__(FIXED_TILE)
    cells_confidence_kernel(const __grid_constant__ ConfidenceCells call) {
  extern __shared__ float shared[];
  const Grid& grid = call.cells.first;
  const float scale = call.inverse_temperature;
  const Block block(call.cells, shared);
  const Place& place = block.place;
  block.tile.put(0, grid, place);
  __syncthreads();
  const Across across(grid, place.image, block.tile.column_at(0));
  each_level(block, NoCorners(), [&](int32_t band, int begin, int end) {
    const Lines<C> lines(grid, across, band, scale);
    float values[C];
    const Column y{values, 1};
    for (int i = begin; i < end; ++i) {
      const At row = block.tile.row_at(0, i).at;
      if (lines.finite && row.t < 1)
        lines.put(row.t, y);
      else
        put_logits(grid, across, row, scale, C, y);
      put_confidence(call, place, i, score_of(Kind(call.kind), y, C));
    }
  });
}

}  // namespace fastmt::cuda
