// cross_entropy over tiles of pixels, with the gradient. Mirrors reference.cross_entropy.
#pragma once

#include "cpu/tile.h"

namespace FASTMT_ISA {

using fastmt::CrossEntropyCall;
using fastmt::CrossEntropySums;

struct CrossEntropyTile {
  std::unique_ptr<float[], Free> logits, weight;
  std::unique_ptr<int64_t[], Free> labels;
  std::unique_ptr<int32_t[], Free> label;

  explicit CrossEntropyTile(const CrossEntropyCall& call)
      : logits(aligned_buffer<float>(call.classes * row(call.tile))),
        weight(aligned_buffer<float>(row(call.tile))),
        labels(aligned_buffer<int64_t>(call.tile)),
        label(aligned_buffer<int32_t>(call.tile)) {}
};

// Labels of W pixels as they come (`labels`), then as classes (`label`), and their weights.
struct LabelBlock {
  int64_t labels[W];
  alignas(64) int32_t label[W];
  alignas(64) float weight[W];
};

// Turns labels into classes, and weights into 0 where they are ignored; true if any weight is not 0.
inline bool weigh_labels(const CrossEntropyCall& call, LabelBlock& block, CrossEntropySums& sums) {
  bool any_active = false;
  for (int i = 0; i < W; ++i) {
    const int64_t label = block.labels[i];
    const bool valid = label != call.ignore_index;
    const bool wrong = valid && (label < 0 || label >= call.classes);
    if (wrong && !sums.wrong) sums.wrong_label = label;
    sums.wrong += wrong;
    sums.valid += valid;
    block.label[i] = valid && !wrong ? int32_t(label) : 0;
    const float weight = valid ? block.weight[i] : 0.0f;
    block.weight[i] = weight;
    const float share = call.class_weight ? call.class_weight[block.label[i]] : 1.0f;
    sums.weight += weight != 0 ? weight * share : 0.0f;
    any_active |= weight != 0;
  }
  return any_active;
}

// The labels and weights of a tile; true if any weight is not 0.
inline bool label_tile(const CrossEntropyCall& call, int64_t first, int count,
                       CrossEntropyTile& tile, CrossEntropySums& sums) {
  load_integers(call.pixels, call.labels, first, count, tile.labels.get(), call.tile,
                call.ignore_index);
  std::fill_n(tile.weight.get(), call.tile, 1.0f);
  if (call.pixel_weight.data)
    load_tile(call.pixels, call.pixel_weight, first, count, 1, tile.weight.get(), call.tile);
  LabelBlock block;
  bool any_active = false;
  for (int lane = 0; lane < count; lane += W) {
    std::copy_n(&tile.labels[lane], W, block.labels);
    std::copy_n(&tile.weight[lane], W, block.weight);
    any_active |= weigh_labels(call, block, sums);
    std::copy_n(block.label, W, &tile.label[lane]);
    std::copy_n(block.weight, W, &tile.weight[lane]);
  }
  return any_active;
}

// Without class weights and smoothing the loss needs no logit but the label's.
inline bool is_plain(const CrossEntropyCall& call) {
  return !call.class_weight && call.label_smoothing == 0;
}

// Loss of W pixels from their logits, which are used up.
template <class Gradient>
inline floats label_loss(const CrossEntropyCall& call, Column z, ints label, floats weight,
                         Gradient gradient) {
  const floats scaled = weight * call.gradient_scale;
  floats value;
  if (is_plain(call)) {
    const Student student = student_pixel<true>(z, label, call.classes);
    value = ce_pixel(z, student, label, scaled, gradient, call.classes);
  } else {
    value = weighted_ce_pixel(z, label, call.class_weight, call.mean_class_weight,
                              call.label_smoothing, scaled, gradient, call.classes);
  }
  return select(weight != 0.0f, weight * value, splat(0));
}

inline double label_loss_tile(const CrossEntropyCall& call, int64_t first, int count,
                              CrossEntropyTile& tile) {
  floats sum = splat(0);
  for (int lane = 0; lane < count; lane += W) {
    prefetch_pixels(call.pixels, call.logits, first + call.tile + lane, call.classes);
    const Column z{&tile.logits[lane], row(call.tile)};
    const floats weight = load(&tile.weight[lane]);
    const ints active = weight != 0.0f;
    if (any(active))
      sum += label_loss(call, z, load(&tile.label[lane]), weight,
                        MaskedColumn{z.base, z.row, active});
    else
      for (int c = 0; c < call.classes; ++c) z[c] = splat(0);
  }
  return sum_lanes(sum);
}

inline void cross_entropy(const CrossEntropyCall& call, int64_t begin_tile, int64_t end_tile) {
  CrossEntropyTile tile(call);
  const int64_t elements = call.classes * row(call.tile);
  for (int64_t t = begin_tile; t < end_tile; ++t) {
    const int64_t first = t * call.tile;
    const int count = int(std::min<int64_t>(call.tile, call.pixels.count - first));
    CrossEntropySums& sums = call.sums[t] = {};
    if (label_tile(call, first, count, tile, sums)) {
      load_tile(call.pixels, call.logits, first, count, call.classes, tile.logits.get(), call.tile);
      sums.loss = label_loss_tile(call, first, count, tile);
    } else if (call.gradient.data) {
      std::fill_n(tile.logits.get(), elements, 0.0f);
    }
    if (call.gradient.data)
      store_tile(call.pixels, call.gradient, first, count, call.classes, tile.logits.get(),
                 call.tile);
  }
}

}  // namespace FASTMT_ISA
