// The three pixel operations on cells: the same pixel mathematics as the tiles, walked cell by cell.
#pragma once

#include <vector>

#include "cpu/cells.h"
#include "cpu/confidence_kernel.h"
#include "cpu/consistency_kernel.h"
#include "cpu/cross_entropy_kernel.h"
#include "cpu/powers.h"

namespace FASTMT_ISA {

using fastmt::Lanes;

// Where a group of bands is: image and bands [begin, end).
struct Group {
  int64_t image;
  int begin, end;

  Group(const Cells& cells, int64_t index)
      : image(index / cells.groups),
        begin(int(index % cells.groups) * cells.bands_in_group),
        end(std::min(begin + cells.bands_in_group, cells.bands)) {}
};

// Calls visit(step) for each W output pixels of a row; begin and end around chunks.
template <class Begin, class Visit, class End>
inline void walk_row(const Lanes& lanes, Begin begin, Visit visit, End end) {
  for (int k = 0; k < lanes.chunks; ++k) {
    begin();
    for (int s = 0; s < lanes.steps[k]; ++s) {
      const int64_t entry = lanes.start[k] + int64_t(s);
      visit(Step{k * W, s, lanes.steps[k], lanes.follows[entry] != 0, lanes.column + entry * W,
                 lanes.t + entry * W, lanes.delta + k * W});
    }
    end(k * W);
  }
}

// One teacher or an ensemble of them at W output pixels.
class TeacherCells {
 public:
  TeacherCells(const Cells& cells, const Grid* grids, int members, Kind kind, bool with_label,
               float inverse_temperature)
      : classes_(cells.classes),
        kind_(kind),
        with_label_(with_label),
        inverse_temperature_(inverse_temperature),
        powers_(cells.classes, inverse_temperature),
        column_(aligned_buffer<float>(int64_t(classes_) * W)),
        member_(aligned_buffer<float>(int64_t(classes_) * W)) {
    for (int m = 0; m < members; ++m) sources_.emplace_back(grids[m], cells);
  }

  void go_to(int64_t image, int out_row) {
    for (RowSource& source : sources_) source.go_to(image, out_row);
  }

  void begin_chunk() { powers_.begin_chunk(); }

  // The teacher's column at the last look.
  Column column() const { return walks_ ? powers_.column() : Column{column_.get(), W}; }
  void used_up() { powers_.forget(); }

  Teacher look(const Step& step) {
    const RowSource& first = sources_[0];
    const bool one = sources_.size() == 1;
    walks_ = one && kind_ != Kind::entropy && powers_.serve(first, step);
    if (walks_) return powers_.read(first, step, [&](auto powers) { return believed(powers); });
    const Column to = column();
    if (one) {
      first.interpolate(step.x, step.columns, step.t, to);
      return scored(to);
    }
    const Column member{member_.get(), W};
    for (int c = 0; c < classes_; ++c) to[c] = splat(0);
    for (const RowSource& source : sources_) {
      source.interpolate(step.x, step.columns, step.t, member);
      add_member(member, to, classes_, inverse_temperature_, 1.0f / float(sources_.size()));
    }
    return scored(to);
  }

 private:
  template <class Reads>
  Teacher believed(Reads powers) const {
    if (kind_ == Kind::margin) return teacher_of_powers<Kind::margin, true>(powers, classes_);
    return with_label_ ? teacher_of_powers<Kind::max_prob, true>(powers, classes_)
                       : teacher_of_powers<Kind::max_prob, false>(powers, classes_);
  }

  Teacher scored(Column column) const {
    const bool one = sources_.size() == 1;
    const float scale = inverse_temperature_;
    switch (kind_) {
      case Kind::max_prob:
        return one ? teacher_pixel<Kind::max_prob>(column, classes_, scale)
                   : ensemble_pixel<Kind::max_prob>(column, classes_);
      case Kind::entropy:
        return one ? teacher_pixel<Kind::entropy>(column, classes_, scale)
                   : ensemble_pixel<Kind::entropy>(column, classes_);
      default:
        return one ? teacher_pixel<Kind::margin>(column, classes_, scale)
                   : ensemble_pixel<Kind::margin>(column, classes_);
    }
  }

  int classes_;
  Kind kind_;
  bool with_label_, walks_ = false;
  float inverse_temperature_;
  Powers powers_;
  std::unique_ptr<float[], Free> column_, member_;
  std::vector<RowSource> sources_;
};

// Hands the rows of a group on: those it shares with a neighbour to the edges, the others to the
// gradient itself.
class GradientRows {
 public:
  GradientRows(const View& gradient, const Cells& cells) : gradient_(gradient), cells_(cells) {}

  void put(const Group& group, int band, const float* row, int64_t pitch) const {
    const int64_t index = group.image * cells_.groups + group.begin / cells_.bands_in_group;
    if (band == group.begin || band == group.end) {
      const int64_t elements = int64_t(cells_.classes) * cells_.first.width;
      float* edge = cells_.edges + (2 * index + (band == group.end)) * elements;
      for (int c = 0; c < cells_.classes; ++c)
        std::copy_n(row + c * pitch, cells_.first.width, edge + int64_t(c) * cells_.first.width);
    } else {
      const int64_t offset = group.image * gradient_.stride[0] + band * gradient_.stride[1];
      store_run_of(gradient_, offset, gradient_.stride[2], cells_.classes, row, pitch,
                   cells_.first.width);
    }
  }

 private:
  const View& gradient_;
  const Cells& cells_;
};

// The rows that groups share: the last row of one group plus the first of the next.
inline void cells_join(const View& gradient, const Cells& cells, int64_t begin, int64_t end) {
  const int width = cells.first.width, height = cells.first.height;
  const int64_t elements = int64_t(cells.classes) * width;
  const auto sum = aligned_buffer<float>(elements);
  for (int64_t index = begin; index < end; ++index) {
    const Group group(cells, index);
    const auto put = [&](int band) {
      const int64_t offset = group.image * gradient.stride[0] +
                             std::min(band, height - 1) * gradient.stride[1];
      store_run_of(gradient, offset, gradient.stride[2], cells.classes, sum.get(), width, width);
    };
    const float* own = cells.edges + 2 * index * elements;
    std::copy_n(own, elements, sum.get());
    if (group.begin > 0)
      for (int64_t i = 0; i < elements; ++i) sum[i] += own[i - elements];
    if (height == 1)
      for (int64_t i = 0; i < elements; ++i) sum[i] += own[i + elements];
    put(group.begin);
    if (group.end < cells.bands || height == 1) continue;
    std::copy_n(own + elements, elements, sum.get());
    put(group.end);
  }
}

inline void cells_confidence(const ConfidenceCall& call, const Cells& cells, int64_t begin,
                             int64_t end) {
  TeacherCells teacher(cells, cells.others, call.members, Kind(call.kind), true,
                       call.inverse_temperature);
  alignas(64) float score[W];
  alignas(64) int32_t label[W];
  for (int64_t index = begin; index < end; ++index) {
    const Group group(cells, index);
    for (int y = cells.band_start[group.begin]; y < cells.band_start[group.end]; ++y) {
      teacher.go_to(group.image, y);
      const int64_t row = (group.image * cells.out_height + y) * cells.out_width;
      const auto visit = [&](const Step& step) {
        const Teacher result = teacher.look(step);
        store(score, result.score);
        store(label, result.label);
        for (int i = 0; i < W; ++i) {
          if (step.columns[i] < 0) continue;
          call.score[row + step.columns[i]] = score[i];
          call.label[row + step.columns[i]] = label[i];
        }
      };
      walk_row(cells.lanes, [&] { teacher.begin_chunk(); }, visit, [](int) {});
    }
  }
}

inline ints valid_at(const ConsistencyCall& call, int64_t image, int y, const int32_t* columns) {
  if (!call.valid.data) return ~(load(columns) >> 31);
  alignas(64) int32_t valid[W];
  int64_t values[W];
  gather_integers(call.valid, image, y, columns, 0, values);
  for (int i = 0; i < W; ++i) valid[i] = values[i] ? -1 : 0;
  return load(valid);
}

inline floats pixel_weight_at(const View& map, int64_t image, int y, const int32_t* columns) {
  if (!map.data) return splat(1);
  alignas(64) float values[W];
  gather_floats(map, image, y, columns, values);
  return load(values);
}

// The student at W output pixels.
class StudentCells {
 public:
  explicit StudentCells(const Cells& cells)
      : classes_(cells.classes),
        source_(cells.first, cells),
        powers_(cells.classes, 1.0f),
        column_(aligned_buffer<float>(int64_t(classes_) * W)) {}

  void go_to(int64_t image, int out_row) { source_.go_to(image, out_row); }
  void begin_chunk() { powers_.begin_chunk(); }

  bool walks(const Step& step) { return powers_.serve(source_, step); }
  Column powers() const { return powers_.column(); }
  template <bool WITH_LABEL>
  Student walk(const Step& step, ints label) {
    return powers_.read(source_, step, [&](auto powers) {
      return student_of_powers<WITH_LABEL>(powers, label, classes_);
    });
  }

  Column logits(const Step& step) const {
    const Column to{column_.get(), W};
    source_.interpolate(step.x, step.columns, step.t, to);
    return to;
  }

 private:
  int classes_;
  RowSource source_;
  Powers powers_;
  std::unique_ptr<float[], Free> column_;
};

template <Loss LOSS, class Gradient>
inline void add_loss_of_powers(const ConsistencyCall& call, StudentCells& student,
                               const TeacherCells& teacher, const Step& step,
                               const Teacher& belief, floats weight, Gradient gradient,
                               Tally& tally) {
  const floats scaled = scaled_weight(call, weight), coefficient = scaled * call.gradient_scale;
  const Student state = student.walk<LOSS == Loss::ce>(step, belief.label);
  const floats value = loss_of_powers<LOSS>(student.powers(), teacher.column(), state, belief,
                                            coefficient, gradient, call.classes);
  tally.loss += select(weight != 0.0f, scaled * value, splat(0));
}

template <class Gradient>
inline void add_loss_at(const ConsistencyCall& call, StudentCells& student, TeacherCells& teacher,
                        const Step& step, const Teacher& belief, floats weight, Gradient gradient,
                        Tally& tally) {
  const Loss loss = Loss(call.loss);
  if ((loss == Loss::mse || loss == Loss::ce) && student.walks(step)) {
    const auto add = loss == Loss::mse ? add_loss_of_powers<Loss::mse, Gradient>
                                       : add_loss_of_powers<Loss::ce, Gradient>;
    return add(call, student, teacher, step, belief, weight, gradient, tally);
  }
  add_loss(call, student.logits(step), teacher.column(), belief, weight, gradient, tally);
  if (loss == Loss::bce || loss == Loss::js) teacher.used_up();
}

inline void cells_consistency(const ConsistencyCall& call, const Cells& cells, int64_t begin,
                              int64_t end) {
  const bool with_label = call.threshold_by_label || Loss(call.loss) == Loss::ce;
  TeacherCells teacher(cells, cells.others, call.members, Kind(call.kind), with_label,
                       call.inverse_temperature);
  StudentCells student(cells);
  const GradientRows rows(call.gradient, cells);
  const bool wants_gradient = call.gradient.data;
  for (int64_t index = begin; index < end; ++index) {
    const Group group(cells, index);
    RowSink sink(cells);
    ConsistencySums& sums = call.sums[index] = {};
    for (int band = group.begin; band < group.end; ++band) {
      sink.begin_band();
      for (int y = cells.band_start[band]; y < cells.band_start[band + 1]; ++y) {
        Tally tally;
        teacher.go_to(group.image, y);
        student.go_to(group.image, y);
        const auto visit = [&](const Step& step) {
          const Teacher belief = teacher.look(step);
          const floats weight =
              weigh(call, belief, valid_at(call, group.image, y, step.columns),
                    pixel_weight_at(call.pixel_weight, group.image, y, step.columns), tally);
          const ints active = weight != 0.0f;
          if (!any(active)) return;
          if (wants_gradient)
            add_loss_at(call, student, teacher, step, belief, weight, sink.at(step.t, active),
                        tally);
          else
            add_loss_at(call, student, teacher, step, belief, weight, NoGradient(), tally);
        };
        const auto begin_chunk = [&] {
          teacher.begin_chunk();
          student.begin_chunk();
          sink.begin_chunk();
        };
        const float row_t = cells.first.row_t[y];
        walk_row(cells.lanes, begin_chunk, visit, [&](int x) { sink.end_chunk(x, row_t); });
        tally.add_to(sums);
      }
      const float* finished = sink.end_band();
      if (wants_gradient) rows.put(group, band, finished, sink.pitch());
    }
    if (wants_gradient) rows.put(group, group.end, sink.carried(), sink.pitch());
  }
}

// The labels and weights of one output row.
class LabelRow {
 public:
  LabelRow(const CrossEntropyCall& call, int width)
      : call_(call),
        width_(width),
        label_(aligned_buffer<int32_t>(width)),
        weight_(aligned_buffer<float>(width)),
        labels_(aligned_buffer<int64_t>(width)) {}

  // False where no pixel of the row has a weight.
  bool go_to(int64_t image, int row, CrossEntropySums& sums) {
    load_row(call_.labels, image, row, width_, labels_.get());
    std::fill_n(weight_.get(), width_, 1.0f);
    if (call_.pixel_weight.data) {
      const View& map = call_.pixel_weight;
      const int64_t offset = image * map.stride[0] + row * map.stride[1];
      load_run_of(map, offset, map.stride[2], 1, weight_.get(), width_, width_);
    }
    return weigh_labels(call_, labels_.get(), width_, label_.get(), weight_.get(), sums);
  }

  ints classes(const int32_t* columns) const { return load(pick(label_.get(), columns).at); }
  // 0 where there is no column.
  floats weights(const int32_t* columns) const {
    return select(load(columns) < 0, splat(0), load(pick(weight_.get(), columns).at));
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

  const CrossEntropyCall& call_;
  int width_;
  std::unique_ptr<int32_t[], Free> label_;
  std::unique_ptr<float[], Free> weight_;
  std::unique_ptr<int64_t[], Free> labels_;
};

template <class Gradient>
inline floats label_loss_at(const CrossEntropyCall& call, StudentCells& student, const Step& step,
                            ints label, floats weight, Gradient gradient) {
  if (!is_plain(call) || !student.walks(step))
    return label_loss(call, student.logits(step), label, weight, gradient);
  const Student state = student.walk<true>(step, label);
  const floats value = ce_pixel(student.powers(), state, label, weight * call.gradient_scale,
                                gradient, call.classes);
  return select(weight != 0.0f, weight * value, splat(0));
}

inline void cells_cross_entropy(const CrossEntropyCall& call, const Cells& cells, int64_t begin,
                                int64_t end) {
  StudentCells student(cells);
  LabelRow labels(call, cells.out_width);
  const GradientRows rows(call.gradient, cells);
  const bool wants_gradient = call.gradient.data;
  for (int64_t index = begin; index < end; ++index) {
    const Group group(cells, index);
    RowSink sink(cells);
    CrossEntropySums& sums = call.sums[index] = {};
    for (int band = group.begin; band < group.end; ++band) {
      sink.begin_band();
      for (int y = cells.band_start[band]; y < cells.band_start[band + 1]; ++y) {
        floats loss = splat(0);
        if (!labels.go_to(group.image, y, sums)) continue;
        student.go_to(group.image, y);
        const auto visit = [&](const Step& step) {
          const ints label = labels.classes(step.columns);
          const floats weight = labels.weights(step.columns);
          const ints active = weight != 0.0f;
          if (!any(active)) return;
          if (wants_gradient)
            loss += label_loss_at(call, student, step, label, weight, sink.at(step.t, active));
          else
            loss += label_loss_at(call, student, step, label, weight, NoGradient());
        };
        const auto begin_chunk = [&] {
          student.begin_chunk();
          sink.begin_chunk();
        };
        const float row_t = cells.first.row_t[y];
        walk_row(cells.lanes, begin_chunk, visit, [&](int x) { sink.end_chunk(x, row_t); });
        sums.loss += sum_lanes(loss);
      }
      const float* finished = sink.end_band();
      if (wants_gradient) rows.put(group, band, finished, sink.pitch());
    }
    if (wants_gradient) rows.put(group, group.end, sink.carried(), sink.pitch());
  }
}

}  // namespace FASTMT_ISA
