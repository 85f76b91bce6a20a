// consistency_loss over tiles of pixels, with the gradient. Mirrors reference.consistency_loss.
#pragma once

#include "cpu/confidence_kernel.h"

namespace FASTMT_ISA {

using fastmt::ConsistencyCall;
using fastmt::ConsistencySums;

enum class Weight { mask, confidence, ratio, none };

struct ConsistencyTile {
  TeacherTile teacher;
  std::unique_ptr<float[], Free> student, weight;
  std::unique_ptr<int64_t[], Free> integers;
  std::unique_ptr<int32_t[], Free> valid;

  explicit ConsistencyTile(const ConsistencyCall& call)
      : teacher(call.classes, call.tile, call.members),
        student(aligned_buffer<float>(call.classes * row(call.tile))),
        weight(aligned_buffer<float>(row(call.tile))),
        integers(aligned_buffer<int64_t>(call.tile)),
        valid(aligned_buffer<int32_t>(call.tile)) {}
};

// True (all bits) in the lanes of the tile that hold a valid pixel.
inline void find_valid(const ConsistencyCall& call, int64_t first, int count,
                       ConsistencyTile& tile) {
  if (call.valid.data) {
    load_integers(call.pixels, call.valid, first, count, tile.integers.get(), call.tile, 0);
    for (int i = 0; i < call.tile; ++i) tile.valid[i] = tile.integers[i] ? -1 : 0;
  } else {
    std::fill_n(tile.valid.get(), count, -1);
    std::fill(tile.valid.get() + count, tile.valid.get() + call.tile, 0);
  }
}

inline floats limit_of(const ConsistencyCall& call, ints label) {
  if (!call.threshold_by_label) return splat(call.threshold[0]);
  alignas(64) int32_t labels[W];
  alignas(64) float limits[W];
  store(labels, label);
  for (int i = 0; i < W; ++i) limits[i] = call.threshold[labels[i]];
  return load(limits);
}

// What a stretch of pixels adds to the sums, lane by lane.
struct Tally {
  ints valid{}, passing{};
  floats score{}, weight{}, loss{};

  void add_to(ConsistencySums& sums) const {
    sums.valid += count_lanes(valid);
    sums.selected += count_lanes(passing);
    sums.score += sum_lanes(score);
    sums.weight += sum_lanes(weight);
    sums.loss += sum_lanes(loss);
  }
};

inline bool needs_label(const ConsistencyCall& call) {
  return call.threshold_by_label || Loss(call.loss) == Loss::ce;
}

// The weight of each pixel. "ratio" is 1 here: its factor is only known when every pixel has been
// counted.
inline floats weigh(const ConsistencyCall& call, const Teacher& teacher, ints valid,
                    floats pixel_weight, Tally& tally) {
  const Weight kind = Weight(call.weight);
  const floats limit = limit_of(call, teacher.label);
  const ints passing = valid & (call.strict ? teacher.score > limit : teacher.score >= limit);
  const ints counts = kind <= Weight::confidence ? passing : valid;
  const floats base = kind == Weight::confidence ? teacher.score : splat(1);
  const floats weight = select(counts & (base != 0.0f), base * pixel_weight, splat(0));
  tally.valid += valid;
  tally.passing += passing;
  tally.score += select(valid, teacher.score, splat(0));
  tally.weight += weight;
  return weight;
}

// The weight of each pixel with the share of one class in it.
inline floats scaled_weight(const ConsistencyCall& call, floats weight) {
  return weight * call.class_share;
}

// Calls f(constant<LOSS>) for the loss of the call.
template <Loss LOSS>
struct constant {
  static constexpr Loss value = LOSS;
};
template <class F>
inline floats with_loss(Loss loss, F f) {
  switch (loss) {
    case Loss::mse: return f(constant<Loss::mse>());
    case Loss::kl: return f(constant<Loss::kl>());
    case Loss::soft_ce: return f(constant<Loss::soft_ce>());
    case Loss::ce: return f(constant<Loss::ce>());
    case Loss::bce: return f(constant<Loss::bce>());
    default: return f(constant<Loss::js>());
  }
}

// Loss of W pixels added to the tally, from their logits; z and y may be used up.
template <class Gradient>
inline void add_loss(const ConsistencyCall& call, Column z, Column y, const Teacher& teacher,
                     floats weight, Gradient gradient, Tally& tally) {
  const floats scaled = scaled_weight(call, weight), coefficient = scaled * call.gradient_scale;
  const floats value = with_loss(Loss(call.loss), [&](auto loss) {
    return consistency_pixel<loss.value>(z, y, teacher, coefficient, gradient, call.classes);
  });
  tally.loss += select(weight != 0.0f, scaled * value, splat(0));
}

// The weights of a tile; true if any is not 0.
inline bool weigh_tile(const ConsistencyCall& call, int64_t first, int count,
                       ConsistencyTile& tile, Tally& tally) {
  find_valid(call, first, count, tile);
  if (call.pixel_weight.data)
    load_tile(call.pixels, call.pixel_weight, first, count, 1, tile.weight.get(), call.tile);
  ints active = isplat(0);
  for (int lane = 0; lane < count; lane += W) {
    const floats factor = call.pixel_weight.data ? load(&tile.weight[lane]) : splat(1);
    const floats weight =
        weigh(call, tile.teacher.at(lane), load(&tile.valid[lane]), factor, tally);
    store(&tile.weight[lane], weight);
    active = active | (weight != 0.0f);
  }
  return any(active);
}

inline void loss_tile(const ConsistencyCall& call, int64_t first, int count, ConsistencyTile& tile,
                      Tally& tally) {
  for (int lane = 0; lane < count; lane += W) {
    prefetch_pixels(call.pixels, call.student, first + call.tile + lane, call.classes);
    const Column z{&tile.student[lane], row(call.tile)};
    const Column y{&tile.teacher.column[lane], row(call.tile)};
    const floats weight = load(&tile.weight[lane]);
    const ints active = weight != 0.0f;
    const bool some = any(active);
    if (!call.gradient.data) {
      if (some) add_loss(call, z, y, tile.teacher.at(lane), weight, NoGradient(), tally);
    } else if (some) {
      add_loss(call, z, y, tile.teacher.at(lane), weight, MaskedColumn{z.base, z.row, active},
               tally);
    } else {
      for (int c = 0; c < call.classes; ++c) z[c] = splat(0);
    }
  }
}

inline void consistency(const ConsistencyCall& call, int64_t begin_tile, int64_t end_tile) {
  ConsistencyTile tile(call);
  const auto find_teacher = needs_label(call) ? teacher_tile<true> : teacher_tile<false>;
  const int64_t elements = call.classes * row(call.tile);
  for (int64_t t = begin_tile; t < end_tile; ++t) {
    const int64_t first = t * call.tile;
    const int count = int(std::min<int64_t>(call.tile, call.pixels.count - first));
    find_teacher(Kind(call.kind), call.pixels, call.teacher, call.members, call.classes,
                 call.inverse_temperature, first, count, call.tile, tile.teacher);
    Tally tally;
    if (weigh_tile(call, first, count, tile, tally)) {
      load_tile(call.pixels, call.student, first, count, call.classes, tile.student.get(),
                call.tile);
      loss_tile(call, first, count, tile, tally);
    } else if (call.gradient.data) {
      std::fill_n(tile.student.get(), elements, 0.0f);
    }
    call.sums[t] = {};
    tally.add_to(call.sums[t]);
    if (call.gradient.data)
      store_tile(call.pixels, call.gradient, first, count, call.classes, tile.student.get(),
                 call.tile);
  }
  if (call.gradient.streams) end_streams();
}

}  // namespace FASTMT_ISA
