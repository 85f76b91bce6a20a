// What the host tells the CUDA kernels of a call.
#pragma once

#include <cstdint>

#include "cpu/calls.h"

#if defined(__CUDACC__)
#define FASTMT_BOTH __host__ __device__ inline
#else
#define FASTMT_BOTH inline
#endif

namespace fastmt::cuda {

using Stream = void*;  // a cudaStream_t

constexpr int MAX_TEACHERS = 16;
constexpr int QUANTITIES = 5;  // that a call sums over its pixels, at most
constexpr int MAX_ROWS = 32;   // output rows that one block walks

// floor(n / d) and what remains, by a reciprocal and one correction: a division of 64-bit integers
// is a function call on a GPU, and calls make registers spill.
struct Quotient {
  int64_t floor, rest;
};
FASTMT_BOTH Quotient floor_divide(int64_t n, int64_t d, double reciprocal) {
  Quotient quotient{int64_t(double(n) * reciprocal), 0};
  quotient.rest = n - quotient.floor * d;
  if (quotient.rest < 0) --quotient.floor, quotient.rest += d;
  if (quotient.rest >= d) ++quotient.floor, quotient.rest -= d;
  return quotient;
}

// One axis of a linear interpolation, as F.interpolate defines it, in integers: output position o
// lies at (scale * o + offset) / divisor, clamped to the input positions 0 .. size - 1. Exact for
// any size.
struct Axis {
  int64_t scale, offset, divisor;
  double per_scale, per_divisor;  // their reciprocals
  int32_t size, out;

  FASTMT_BOTH int32_t highest() const { return size > 1 ? size - 2 : 0; }

  // The first output position whose lower neighbour is `index` or lies behind it.
  FASTMT_BOTH int32_t first(int64_t index) const {
    if (index <= 0) return 0;
    if (index > highest()) return out;
    const int64_t behind = index * divisor - offset + scale - 1;
    if (behind < scale) return 0;
    const int64_t position = floor_divide(behind, scale, per_scale).floor;
    return position > out ? out : int32_t(position);
  }
};

// Low-resolution logits (N, C, height, width), or their gradient; strides in elements.
struct Grid {
  void* data;
  int64_t image, channel, row, column;
  Axis rows, columns;
  Type type;

  // From one output row to the next.
  FASTMT_BOTH float step() const { return float(double(rows.scale) * rows.per_divisor); }
};

// A map (N, height, width) at the resolution of the output; may have no data.
struct Map {
  const void* data;
  int64_t image, row, column;
  Type type;
};

// Where the parts of a block's shared memory begin, in floats: rows of values whose columns are
// joined, `pitch` apart; tallies; a number for each column; place and tables of the tile (cells.h).
// They end at a multiple of 16 bytes, behind which stages may lie. Worked out once a call: a thread
// has no registers for them, and would make them anew wherever a walk starts.
struct Shared {
  int64_t pitch, tallies, weights, place, t, index, row, start, end;
};

// How a call is shared out. A band is the output rows between two low-resolution ones. A block owns
// `tile` output columns and at most MAX_ROWS output rows: `span` bands, or a segment of one. It
// leaves what its pixels give to the low-resolution rows at both sides of each band, its levels,
// and to the `reach` columns that they touch, in partial[block][level][reach][classes].
struct Cells {
  int64_t images;
  int32_t classes, grids, tile, tiles, bands, span, spans, segments, reach;
  Shared shared;
  Grid first;      // what gets the gradient
  float* partial;  // null where no gradient is wanted
  float* sums;     // [quantity][block]

  FASTMT_BOTH int32_t levels() const { return span + 1; }
  FASTMT_BOTH int64_t blocks() const { return images * spans * segments * tiles; }
};

struct ConfidenceCells {
  Cells cells;
  int32_t kind;
  float inverse_temperature;
  float* score;  // (N, height, width), both
  int64_t* label;
};

struct ConsistencyCells {
  Cells cells;
  Grid teacher[MAX_TEACHERS];
  Map pixel_weight, valid;
  int32_t teacher_reach;  // low-resolution columns that a tile touches of the first one
  int32_t members, loss, kind, weight;
  bool strict, threshold_by_label;
  float class_share;  // of a mean over classes, else 1
  float inverse_temperature, gradient_scale;
  const float* threshold;  // one, or one for each class
};

struct CrossEntropyCells {
  Cells cells;
  Map labels, pixel_weight;
  const float* class_weight;  // may be null
  int64_t ignore_index;
  float label_smoothing, gradient_scale;
};

// What turns the sums of a call into its results. The gradient has been multiplied by `inside`,
// which is all of its scale where it is `complete`.
struct Finish {
  int32_t normalize;
  bool ratio, complete;
  int64_t pixels;
  double inside;
  float *loss, *scale;
  float *selected, *mean_score;  // of consistency
  float* wrong;                  // labels, of cross-entropy
};

constexpr int64_t EMA_CHUNK = 16 * 1024;  // elements between two entries of `starts`

// `starts` counts the chunks before each row. A negative decay changes nothing. `draws`, one for
// each decay, are there where a row is rounded at random or with what that loses.
struct EmaCall {
  const EmaRow* table;
  const int64_t* starts;
  int64_t rows;
  const double* decays;
  const int64_t* draws;
};

struct ScaleCall {
  void* data;
  Type type;
  int64_t count;
  const float *scale, *factor;
};

void launch_confidence(const ConfidenceCells&, Stream);
void launch_consistency(const ConsistencyCells&, const Grid& gradient, const Finish&, Stream);
void launch_cross_entropy(const CrossEntropyCells&, const Grid& gradient, const Finish&, Stream);
void launch_ema(const EmaCall&, Stream);
void launch_scale(const ScaleCall&, Stream);

// Class counts with kernels of their own, which keep a pixel's values in registers.
FASTMT_BOTH constexpr bool is_fixed(int classes) { return classes == 19 || classes == 21; }

// Fills in how a call is shared out among blocks. Of any other class count a thread keeps `columns`
// times the classes in shared memory; 0 where no gradient is ever joined.
void plan(Cells& cells, int columns);

// The shared memory of a block that joins so many rows.
Shared shared_of(const Cells& cells, int64_t rows);
inline int64_t shared_bytes(const Cells& cells, int64_t rows) {
  return shared_of(cells, rows).end * int64_t(sizeof(float));
}

// Low-resolution columns that a tile touches, at most.
int32_t reach_of(const Axis& columns, int32_t tile);

}  // namespace fastmt::cuda
