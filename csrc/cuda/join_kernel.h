// The second kernel of a call on cells: its first block finishes the sums, the others join the
// partial gradients that neighbouring blocks left of the same low-resolution pixels. Fixed order,
// no atomics.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "cuda/gradient.h"

namespace fastmt::cuda {

struct Join {
  Cells cells;
  Grid gradient;  // no data where none is wanted
  Finish finish;
};

constexpr int JOIN_THREADS = 128;
constexpr int JOIN_CLASSES = 24;  // that one thread joins: where its shares lie is found once

// As in csrc/cpu/host.h.
FASTMT_INLINE double ratio(double numerator, double denominator) {
  return denominator == 0 ? 0 : numerator / denominator + 0 * denominator;
}

// d loss / d logits is scale * gradient; what the kernel has divided out is in `inside`.
FASTMT_INLINE void put_scale(const Finish& finish, double wanted) {
  *finish.scale = finish.complete ? 1.0f : float(wanted / finish.inside);
}

struct FinishConsistency {
  enum Normalize { all, valid, selected, weight };

  static FASTMT_INLINE void put(const Join& join, const double* sum) {
    const Finish& finish = join.finish;
    const double loss = sum[0], weights = sum[1], score = sum[2], selected_count = sum[3],
                 valid_count = sum[4];
    const double fraction = ratio(selected_count, valid_count);
    const double factor = finish.ratio ? fraction : 1;
    const double denominator = factor == 0                               ? 0
                               : finish.normalize == Normalize::all      ? double(finish.pixels)
                               : finish.normalize == Normalize::valid    ? valid_count
                               : finish.normalize == Normalize::selected ? selected_count
                                                                         : factor * weights;
    *finish.loss = float(ratio(factor * loss, denominator));
    *finish.selected = float(fraction);
    *finish.mean_score = float(ratio(score, valid_count));
    put_scale(finish, ratio(factor, denominator));
  }
};

struct FinishCrossEntropy {
  enum Normalize { all, valid, weight };

  static FASTMT_INLINE void put(const Join& join, const double* sum) {
    const Finish& finish = join.finish;
    const double denominator = finish.normalize == Normalize::all     ? double(finish.pixels)
                               : finish.normalize == Normalize::valid ? sum[2]
                                                                      : sum[1];
    *finish.loss = float(ratio(sum[0], denominator));
    put_scale(finish, ratio(1, denominator));
    *finish.wrong = float(sum[3]);
    if (sum[3] > 0) *finish.loss = *finish.scale = NAN;  // it would be a silent error
  }
};

template <class Kind>
FASTMT_INLINE void finish_sums(const Join& join) {
  extern __shared__ float shared[];
  auto* sums = reinterpret_cast<double*>(shared);
  const int64_t blocks = join.cells.blocks();
  const int own = threadIdx.x;
  double sum[QUANTITIES] = {};
#pragma unroll 8
  for (int64_t block = own; block < blocks; block += JOIN_THREADS)
    for (int n = 0; n < QUANTITIES; ++n) sum[n] += double(join.cells.sums[n * blocks + block]);
  for (int n = 0; n < QUANTITIES; ++n) sums[n * JOIN_THREADS + own] = sum[n];
  for (int half = JOIN_THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (own < half)
      for (int n = 0; n < QUANTITIES; ++n)
        sums[n * JOIN_THREADS + own] += sums[n * JOIN_THREADS + own + half];
  }
  __syncthreads();
  if (own != 0) return;
  for (int n = 0; n < QUANTITIES; ++n) sum[n] = sums[n * JOIN_THREADS];
  Kind::put(join, sum);
}

// f(partial) for each block that holds a share of low-resolution pixel (row, column), in order.
template <class F>
FASTMT_INLINE void each_share(const Cells& cells, int64_t image, int32_t row, int32_t column, F f) {
  const Axis& columns = cells.first.columns;
  const int32_t begin = columns.first(int64_t(column) - 1),
                end = columns.first(int64_t(column) + 1);
  if (begin >= end) return;
  const int32_t band = row < cells.bands ? row : cells.bands - 1;
  const int32_t last = int32_t(uint32_t(band) / uint32_t(cells.span));
  const bool two = last > 0 && row == last * cells.span;  // blocks, which meet in this row
  for (int32_t span = two ? last - 1 : last; span <= last; ++span)
    for (int32_t segment = 0; segment < cells.segments; ++segment)
      for (int32_t tile = begin / cells.tile; tile <= (end - 1) / cells.tile; ++tile) {
        const int64_t block =
            ((image * cells.spans + span) * cells.segments + segment) * cells.tiles + tile;
        const int32_t level = row - span * cells.span;
        const int32_t j = column - locate(columns, int64_t(tile) * cells.tile).index;
        f(cells.partial + ((block * cells.levels() + level) * cells.reach + j) * cells.classes);
      }
}

FASTMT_INLINE void join_pixel(const Join& join, uint32_t task) {
  const Cells& cells = join.cells;
  const Grid& gradient = join.gradient;
  const uint32_t width = gradient.columns.size, height = gradient.rows.size;
  const uint32_t chunks = (cells.classes + JOIN_CLASSES - 1) / JOIN_CLASSES;
  const int32_t column = int32_t(task % width), row = int32_t(task / width % height);
  const uint32_t rest = task / width / height;
  const int64_t image = rest / chunks;
  const int first = int(rest % chunks) * JOIN_CLASSES;
  float sum[JOIN_CLASSES] = {};
  each_share(cells, image, row, column, [&](const float* partial) {
    FASTMT_UNROLL
    for (int i = 0; i < JOIN_CLASSES; ++i)
      if (first + i < cells.classes) sum[i] += partial[first + i];
  });
  const int64_t at = image * gradient.image + row * gradient.row + column * gradient.column;
  with_type(gradient.type, [&](auto type) {
    using T = typename decltype(type)::type;
    FASTMT_UNROLL
    for (int i = 0; i < JOIN_CLASSES; ++i)
      if (first + i < cells.classes)
        static_cast<T*>(gradient.data)[at + (first + i) * gradient.channel] = narrow<T>(sum[i]);
  });
}

inline int64_t join_tasks(const Join& join) {
  if (!join.gradient.data) return 0;
  const int64_t chunks = (join.cells.classes + JOIN_CLASSES - 1) / JOIN_CLASSES;
  return join.cells.images * chunks * join.gradient.rows.size * join.gradient.columns.size;
}

template <class Kind>
__global__ void __launch_bounds__(JOIN_THREADS)
    cells_join_kernel(const __grid_constant__ Join join) {
  if (blockIdx.x == 0) return finish_sums<Kind>(join);
  const int64_t chunks = (join.cells.classes + JOIN_CLASSES - 1) / JOIN_CLASSES;
  const int64_t tasks =
      join.cells.images * chunks * join.gradient.rows.size * join.gradient.columns.size;
  const int64_t task = int64_t(blockIdx.x - 1) * JOIN_THREADS + threadIdx.x;
  if (task < tasks) join_pixel(join, uint32_t(task));
}

template <class Kind>
void launch_join(const Join& join, Stream stream) {
  if (join_tasks(join) > UINT32_MAX)  // whose digits are found in 32 bits
    throw std::runtime_error("fastmt: a gradient of more parts than 2^32");
  const int64_t blocks = 1 + (join_tasks(join) + JOIN_THREADS - 1) / JOIN_THREADS;
  const int64_t bytes = QUANTITIES * JOIN_THREADS * int64_t(sizeof(double));
  launch(cells_join_kernel<Kind>, blocks, JOIN_THREADS, bytes, stream, join);
}

}  // namespace fastmt::cuda
