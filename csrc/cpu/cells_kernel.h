// The three pixel operations on cells: the same pixel mathematics as the tiles, walked cell by cell.
#pragma once

#include "cpu/cells_maps.h"
#include "cpu/cells_networks.h"
#include "cpu/cells_sink.h"
#include "cpu/cells_walk.h"
#include "cpu/confidence_kernel.h"
#include "cpu/consistency_kernel.h"
#include "cpu/cross_entropy_kernel.h"

namespace FASTMT_ISA {

using fastmt::Queue;

inline void cells_confidence(const ConfidenceCall& call, const Cells& cells, Queue& groups) {
  TeacherCells teacher(cells, cells.others, call.members, Kind(call.kind), true,
                       call.inverse_temperature);
  alignas(64) float score[W];
  alignas(64) int32_t label[W];
  const auto add_strip = [&](int64_t image, const Strip& strip) {
    teacher.go_to_strip(image, strip);
    for (int k = 0; k < cells.lanes.chunks; ++k) {
      teacher.begin_chunk();
      for (int y = strip.begin; y < strip.end; ++y) {
        teacher.go_to_row(y);
        const int64_t row = (image * cells.out_height + y) * cells.out_width;
        walk_chunk(cells.lanes, k, [&](const Step& step) {
          const Teacher result = teacher.look(step);
          store(score, result.score);
          store(label, result.label);
          for (int i = 0; i < W; ++i) {
            if (step.columns[i] < 0) continue;
            call.score[row + step.columns[i]] = score[i];
            call.label[row + step.columns[i]] = label[i];
          }
        });
      }
    }
  };
  for (int64_t index; (index = groups.next++) < groups.count;) {
    const Group group(cells, index);
    for (int band = group.begin; band < group.end; ++band)
      for (const Strip strip : Strips(cells, band)) add_strip(group.image, strip);
  }
}

inline ints valid_at(const ConsistencyCall& call, int64_t image, int y, const int32_t* columns) {
  if (!call.valid.data) return ~(load(columns) >> 31);
  alignas(64) int32_t valid[W];
  gather<uint8_t, int32_t>(call.valid, image, y, columns, valid,
                           [](uint8_t x) { return x ? -1 : 0; });
  return load(valid);
}

inline floats pixel_weight_at(const View& map, int64_t image, int y, const int32_t* columns) {
  if (!map.data) return splat(1);
  alignas(64) float values[W];
  gather_floats(map, image, y, columns, values);
  return load(values);
}

template <Loss LOSS, class Gradient>
FASTMT_INLINE void add_loss_of_powers(const ConsistencyCall& call, StudentCells& student,
                                      const TeacherCells& teacher, const Step& step,
                                      const Teacher& belief, floats weight, Gradient gradient,
                                      Tally& tally) {
  const floats scaled = scaled_weight(call, weight), coefficient = scaled * call.gradient_scale;
  const Student state = student.walk<LOSS == Loss::ce>(step, belief.label);
  const floats value = loss_of_powers<LOSS>(student.powers(), teacher.column(), state, belief,
                                            coefficient, gradient, call.classes);
  tally.loss += select(weight != 0.0f, scaled * value, splat(0));
}

// Powers are finite, so that a weight of 0 makes each gradient 0: only what is not walked is masked.
template <class Gradient, class MaskedGradient>
FASTMT_INLINE void add_loss_at(const ConsistencyCall& call, StudentCells& student,
                               TeacherCells& teacher, const Step& step, const Teacher& belief,
                               floats weight, Gradient gradient, MaskedGradient masked,
                               Tally& tally) {
  const Loss loss = Loss(call.loss);
  if (loss == Loss::mse && teacher.walks() && student.walks(step))
    return add_loss_of_powers<Loss::mse>(call, student, teacher, step, belief, weight, gradient,
                                         tally);
  if (loss == Loss::ce && student.walks(step))
    return add_loss_of_powers<Loss::ce>(call, student, teacher, step, belief, weight, gradient,
                                        tally);
  add_loss(call, student.logits(step), teacher.column(), belief, weight, masked, tally);
  if (loss == Loss::bce || loss == Loss::js) teacher.used_up();
}

inline void cells_consistency(const ConsistencyCall& call, const Cells& cells, Queue& groups) {
  TeacherCells teacher(cells, cells.others, call.members, Kind(call.kind), needs_label(call),
                       call.inverse_temperature);
  StudentCells student(cells);
  RowSink sink(cells);
  const GradientRows rows(call.gradient, cells);
  const bool wants_gradient = call.gradient.data;
  const auto visit = [&](const Step& step, int64_t image, int y, Tally& tally) {
    const Teacher belief = teacher.look(step);
    const floats weight = weigh(call, belief, valid_at(call, image, y, step.columns),
                                pixel_weight_at(call.pixel_weight, image, y, step.columns), tally);
    const ints active = weight != 0.0f;
    if (!any(active)) return;
    if (!wants_gradient)
      return add_loss_at(call, student, teacher, step, belief, weight, NoGradient(), NoGradient(),
                         tally);
    const RowSink::Corners corners = sink.at(step.t);
    add_loss_at(call, student, teacher, step, belief, weight, corners,
                RowSink::MaskedCorners{corners, active}, tally);
  };
  const auto add_strip = [&](int64_t image, const Strip& strip, ConsistencySums& sums) {
    teacher.go_to_strip(image, strip);
    student.go_to_strip(image, strip);
    for (int k = 0; k < cells.lanes.chunks; ++k) {
      Tally tally;
      teacher.begin_chunk();
      student.begin_chunk();
      sink.begin_chunk();
      for (int y = strip.begin; y < strip.end; ++y) {
        teacher.go_to_row(y);
        student.go_to_row(y);
        walk_chunk(cells.lanes, k, [&](const Step& step) { visit(step, image, y, tally); });
        sink.end_row(cells.first.row_t[y]);
      }
      sink.end_chunk(k * V);
      tally.add_to(sums);
    }
  };
  for (int64_t index; (index = groups.next++) < groups.count;) {
    const Group group(cells, index);
    sink.begin_group();
    ConsistencySums& sums = call.sums[index] = {};
    for (int band = group.begin; band < group.end; ++band) {
      sink.begin_band();
      for (const Strip strip : Strips(cells, band)) add_strip(group.image, strip, sums);
      const float* finished = sink.end_band();
      if (wants_gradient) rows.put(group, band, finished, sink.pitch());
    }
    if (wants_gradient) rows.put(group, group.end, sink.carried(), sink.pitch());
  }
}

// The labels and weights of the output rows of a strip.
class LabelStrip {
 public:
  LabelStrip(const CrossEntropyCall& call, int width)
      : call_(call),
        width_(width),
        label_(aligned_buffer<int32_t>(int64_t(width) * Strip::LONGEST)),
        weight_(aligned_buffer<float>(int64_t(width) * Strip::LONGEST)),
        labels_(aligned_buffer<int64_t>(width)) {}

  // False where no pixel has a weight.
  bool go_to_strip(int64_t image, const Strip& strip, CrossEntropySums& sums) {
    begin_ = strip.begin;
    bool any = false;
    for (int y = strip.begin; y < strip.end; ++y) any |= active_[y - begin_] = fill(image, y, sums);
    return any;
  }

  bool active(int y) const { return active_[y - begin_]; }
  ints classes(int y, const int32_t* columns) const {
    return load(pick(&label_[at(y)], columns).at);
  }
  // 0 where there is no column.
  floats weights(int y, const int32_t* columns) const {
    return select(load(columns) < 0, splat(0), load(pick(&weight_[at(y)], columns).at));
  }

 private:
  template <class T>
  struct Picked {
    alignas(64) T at[W];
  };
  template <class T>
  static Picked<T> pick(const T* row, const int32_t* columns) {
    Picked<T> picked;
    for (int i = 0; i < W; ++i) picked.at[i] = row[std::max(columns[i], 0)];
    return picked;
  }

  int64_t at(int y) const { return int64_t(y - begin_) * width_; }

  bool fill(int64_t image, int y, CrossEntropySums& sums) {
    float* weight = &weight_[at(y)];
    load_row(call_.labels, image, y, width_, labels_.get());
    std::fill_n(weight, width_, 1.0f);
    if (call_.pixel_weight.data) {
      const View& map = call_.pixel_weight;
      const int64_t offset = image * map.stride[0] + y * map.stride[1];
      load_run_of(map, offset, map.stride[2], 1, weight, width_, width_);
    }
    return weigh_labels(call_, labels_.get(), width_, &label_[at(y)], weight, sums);
  }

  const CrossEntropyCall& call_;
  int width_, begin_ = 0;
  bool active_[Strip::LONGEST];
  std::unique_ptr<int32_t[], Free> label_;
  std::unique_ptr<float[], Free> weight_;
  std::unique_ptr<int64_t[], Free> labels_;
};

template <class Gradient, class MaskedGradient>
inline floats label_loss_at(const CrossEntropyCall& call, StudentCells& student, const Step& step,
                            ints label, floats weight, Gradient gradient, MaskedGradient masked) {
  if (!is_plain(call) || !student.walks(step))
    return label_loss(call, student.logits(step), label, weight, masked);
  const Student state = student.walk<true>(step, label);
  const floats value = ce_pixel(student.powers(), state, label, weight * call.gradient_scale,
                                gradient, call.classes);
  return select(weight != 0.0f, weight * value, splat(0));
}

inline void cells_cross_entropy(const CrossEntropyCall& call, const Cells& cells, Queue& groups) {
  StudentCells student(cells);
  LabelStrip labels(call, cells.out_width);
  RowSink sink(cells);
  const GradientRows rows(call.gradient, cells);
  const bool wants_gradient = call.gradient.data;
  const auto visit = [&](const Step& step, int y) {
    const ints label = labels.classes(y, step.columns);
    const floats weight = labels.weights(y, step.columns);
    const ints active = weight != 0.0f;
    if (!any(active)) return splat(0);
    if (!wants_gradient)
      return label_loss_at(call, student, step, label, weight, NoGradient(), NoGradient());
    const RowSink::Corners corners = sink.at(step.t);
    return label_loss_at(call, student, step, label, weight, corners,
                         RowSink::MaskedCorners{corners, active});
  };
  const auto add_strip = [&](int64_t image, const Strip& strip, CrossEntropySums& sums) {
    if (!labels.go_to_strip(image, strip, sums)) return;
    student.go_to_strip(image, strip);
    for (int k = 0; k < cells.lanes.chunks; ++k) {
      floats loss = splat(0);
      student.begin_chunk();
      sink.begin_chunk();
      for (int y = strip.begin; y < strip.end; ++y) {
        if (!labels.active(y)) continue;
        student.go_to_row(y);
        walk_chunk(cells.lanes, k, [&](const Step& step) { loss += visit(step, y); });
        sink.end_row(cells.first.row_t[y]);
      }
      sink.end_chunk(k * V);
      sums.loss += sum_lanes(loss);
    }
  };
  for (int64_t index; (index = groups.next++) < groups.count;) {
    const Group group(cells, index);
    sink.begin_group();
    CrossEntropySums& sums = call.sums[index] = {};
    for (int band = group.begin; band < group.end; ++band) {
      sink.begin_band();
      for (const Strip strip : Strips(cells, band)) add_strip(group.image, strip, sums);
      const float* finished = sink.end_band();
      if (wants_gradient) rows.put(group, band, finished, sink.pitch());
    }
    if (wants_gradient) rows.put(group, group.end, sink.carried(), sink.pitch());
  }
}

}  // namespace FASTMT_ISA
