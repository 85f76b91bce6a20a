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

// The sum of pixel_weight * class_weight[label] over what is not ignored; `shares` are class weights
// that are no part of the weights yet.
inline double sum_of_weights(const CrossEntropyCall& call, const float* shares,
                             const int32_t* label, const float* weight, int count, int64_t valid) {
  if (!call.class_weight && !call.pixel_weight.data) return double(valid);
  double sum = 0;
  for (int i = 0; i < count; ++i)
    if (weight[i] != 0) sum += weight[i] * (shares ? shares[label[i]] : 1.0f);
  return sum;
}

// Without smoothing the loss needs no logit but the label's.
inline bool is_plain(const CrossEntropyCall& call) { return call.label_smoothing == 0; }

// Turns labels as they come into classes, and weights into 0 where they are ignored; true if any
// weight is not 0. Where the loss is plain, the weight of its class is part of a pixel's.
inline bool weigh_labels(const CrossEntropyCall& call, const int64_t* labels, int count,
                         int32_t* label, float* weight, CrossEntropySums& sums) {
  const int64_t classes = call.classes, ignored = call.ignore_index;
  const float* shares = call.class_weight;
  int64_t valid = 0, wrong = 0;
  int32_t active = 0;
  for (int i = 0; i < count; ++i) {
    const int64_t given = labels[i];
    const bool is_valid = given != ignored, in_range = (given >= 0) & (given < classes);
    valid += is_valid;
    wrong += is_valid & !in_range;
    label[i] = (is_valid & in_range) ? int32_t(given) : 0;
    weight[i] = is_valid ? weight[i] : 0.0f;
    active |= weight[i] != 0;
  }
  sums.valid += valid;
  sums.wrong += wrong;
  if (shares && is_plain(call)) {
    for (int i = 0; i < count; ++i) {
      const float share = shares[label[i]];
      weight[i] = weight[i] == 0 || share == 0 ? 0.0f : weight[i] * share;
    }
    shares = nullptr;
  }
  sums.weight += sum_of_weights(call, shares, label, weight, count, valid);
  return active;
}

// The labels and weights of a tile; true if any weight is not 0.
inline bool label_tile(const CrossEntropyCall& call, int64_t first, int count,
                       CrossEntropyTile& tile, CrossEntropySums& sums) {
  load_integers(call.pixels, call.labels, first, count, tile.labels.get(), call.tile,
                call.ignore_index);
  std::fill_n(tile.weight.get(), call.tile, 1.0f);
  if (call.pixel_weight.data)
    load_tile(call.pixels, call.pixel_weight, first, count, 1, tile.weight.get(), call.tile);
  return weigh_labels(call, tile.labels.get(), call.tile, tile.label.get(), tile.weight.get(),
                      sums);
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
    const ints label = load(&tile.label[lane]), active = weight != 0.0f;
    const bool some = any(active);
    if (!call.gradient.data) {
      if (some) sum += label_loss(call, z, label, weight, NoGradient());
    } else if (some) {
      sum += label_loss(call, z, label, weight, MaskedColumn{z.base, z.row, active});
    } else {
      for (int c = 0; c < call.classes; ++c) z[c] = splat(0);
    }
  }
  return sum_lanes(sum);
}

// All sums of cross_entropy but the loss.
inline void label_sums(const CrossEntropyCall& call, int64_t begin_tile, int64_t end_tile) {
  CrossEntropyTile tile(call);
  for (int64_t t = begin_tile; t < end_tile; ++t) {
    const int64_t first = t * call.tile;
    const int count = int(std::min<int64_t>(call.tile, call.pixels.count - first));
    label_tile(call, first, count, tile, call.sums[t] = {});
  }
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
  if (call.gradient.streams) end_streams();
}

}  // namespace FASTMT_ISA
