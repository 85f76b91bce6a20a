// cross_entropy on cells, with the gradient. Mirrors reference.cross_entropy and
// csrc/cpu/cross_entropy_kernel.h.
#pragma once

#include "cuda/cells.h"
#include "cuda/gradient.h"
#include "cuda/powers.h"

namespace fastmt::cuda {

struct LabelSums {
  enum { loss, weight, valid, wrong };
};

FASTMT_INLINE bool is_wrong(const CrossEntropyCells& call, int64_t label) {
  return label != call.ignore_index && (label < 0 || label >= call.cells.classes);
}

// Neither the label's class has a weight nor, where smoothing spreads those of others, has any.
FASTMT_INLINE bool weighs_nothing(const CrossEntropyCells& call, const float* class_weight,
                                  int32_t label) {
  if (!class_weight || class_weight[label] != 0.0f) return false;
  if (call.label_smoothing == 0.0f) return true;
#pragma unroll 1
  for (int c = 0; c < call.cells.classes; ++c)
    if (class_weight[c] != 0.0f) return false;
  return true;
}

// What a call says of a pixel, asked for long before it is needed.
struct GivenLabel {
  Integer label;
  float weight = 1;

  FASTMT_INLINE GivenLabel(const CrossEntropyCells& call, const Place& place, int i)
      : label(call.labels, place.image, place.first_row + i, place.column()) {
    if (call.pixel_weight.data)
      weight = value_at<float>(call.pixel_weight, place.image, place.first_row + i, place.column());
  }
};

// The label and weight of a pixel. What is ignored, beyond the tile or out of range has no weight;
// the last is counted.
struct Labelled {
  int32_t label;
  float weight;

  FASTMT_INLINE Labelled(const CrossEntropyCells& call, Block& block, const GivenLabel& pixel,
                         const float* class_weight)
      : label(0), weight(0) {
    const int64_t given = pixel.label.of(call.labels);
    if (!block.place.inside() || given == call.ignore_index) return;
    if (is_wrong(call, given)) {
      block.tally.add(LabelSums::wrong, 1);
      return;
    }
    label = int32_t(given);
    weight = weighs_nothing(call, class_weight, label) ? 0.0f : pixel.weight;
    block.tally.add(LabelSums::valid, 1);
    const float share = class_weight ? class_weight[label] : 1;
    if (weight != 0.0f) block.tally.add(LabelSums::weight, weight * share);
  }
};

// Without class weights and smoothing the loss needs no logit but the label's.
FASTMT_BOTH bool is_plain(const CrossEntropyCells& call) {
  return !call.class_weight && call.label_smoothing == 0;
}

FASTMT_INLINE float mean_class_weight(const CrossEntropyCells& call) {
  if (!call.class_weight || call.label_smoothing == 0) return 1;
  float sum = 0;
#pragma unroll 1
  for (int c = 0; c < call.cells.classes; ++c) sum += call.class_weight[c];
  return sum / float(call.cells.classes);
}

template <class Gradient>
FASTMT_INLINE float label_loss(const CrossEntropyCells& call, Column z, int32_t label, float scaled,
                               float mean_weight, Gradient gradient, int classes) {
  if (!is_plain(call))
    return weighted_ce_pixel(z, label, call.class_weight, mean_weight, call.label_smoothing, scaled,
                             gradient, classes);
  const Student student = student_pixel<true>(z, label, classes);
  return ce_pixel(z, student, label, scaled, gradient, classes);
}

// Without class weights and smoothing. Registers of a thread: power, ratio and two sums of the
// gradient, 4 C.
template <int C>
__global__ void __launch_bounds__(FIXED_TILE, 3)
    cells_cross_entropy_powers_kernel(const __grid_constant__ CrossEntropyCells call) {
  extern __shared__ float shared[];
  const Grid& grid = call.cells.first;
  Block block(call.cells, shared);
  const Place& place = block.place;
  block.put_tile();
  __syncthreads();
  const auto column_at = [&] { return block.tile.column_at(0); };
  const Stage<C> stage(block.stage, call.cells.reach, block.tile.first(0), block.weights);
  Corners<C> corners{};
  each_level(block, corners, [&](int32_t band, int begin, int end) {
    GivenLabel given(call, place, begin);
    stage.bring(grid, place.image, band, stage.ask(grid, place.image, band));
    __syncthreads();
    Powers<C> student;
    for (int i = begin; i < end; ++i) {
      const Labelled pixel(call, block, given, nullptr);
      if (i + 1 < end) given = GivenLabel(call, place, i + 1);
      if (!any(pixel.weight != 0.0f)) {
        student.skip();
        continue;
      }
      const Row row = block.tile.row_at(0, i);
      student.go_to(stage, column_at, row, grid.step(), 1.0f);
      if (pixel.weight == 0.0f) continue;
      const Student state = student_of<true>(student, stage, column_at, row.at, pixel.label);
      const float value = ce_pixel(student.at(), state, pixel.label,
                                   pixel.weight * call.gradient_scale, corners.at(row.at.t), C);
      block.tally.add(LabelSums::loss, pixel.weight * value);
    }
  });
  block.tally.put(call.cells);
}

template <class Gradient>
FASTMT_INLINE float visit(const CrossEntropyCells& call, Block& block, int i, Column z,
                          float mean_weight, Gradient gradient, int classes) {
  const Labelled pixel(call, block, GivenLabel(call, block.place, i), call.class_weight);
  if (pixel.weight == 0.0f) return pixel.weight;
  const Grid& grid = call.cells.first;
  const Across across(grid, block.place.image, block.tile.column_at(0));
  interpolate(grid, across, block.tile.row_at(0, i).at, classes, z);
  const float scaled = pixel.weight * call.gradient_scale;
  const float value = label_loss(call, z, pixel.label, scaled, mean_weight, gradient, classes);
  block.tally.add(LabelSums::loss, pixel.weight * value);
  return pixel.weight;
}

template <int C>
__global__ void __launch_bounds__(FIXED_TILE, 3)
    cells_cross_entropy_logits_kernel(const __grid_constant__ CrossEntropyCells call) {
  extern __shared__ float shared[];
  Block block(call.cells, shared);
  block.put_tile();
  __syncthreads();
  const float mean_weight = mean_class_weight(call);
  SharedCorners<C> corners(block);
  float z[C];
  each_level(block, corners, [&](int32_t, int begin, int end) {
    for (int i = begin; i < end; ++i)
      visit(call, block, i, Column{z, 1}, mean_weight, corners.at(block.tile.row_at(0, i).at.t), C);
  });
  block.tally.put(call.cells);
}

// Any number of classes, their columns in shared memory.
__global__ void __launch_bounds__(256, 2)
    cells_cross_entropy_loop_kernel(const __grid_constant__ CrossEntropyCells call) {
  extern __shared__ float shared[];
  const int classes = call.cells.classes;
  Block block(call.cells, shared);
  const Column z{block.rows + threadIdx.x, block.pitch};
  block.put_tile();
  __syncthreads();
  const float mean_weight = mean_class_weight(call);
  if (call.cells.partial) clear_rows(block);
  for (int i = 0; i < block.place.rows; ++i) {
    block.weights[threadIdx.x] = visit(call, block, i, z, mean_weight, z, classes);
    if (call.cells.partial) put_row(block, block.tile.row_at(0, i).at);
  }
  block.tally.put(call.cells);
}

}  // namespace fastmt::cuda
