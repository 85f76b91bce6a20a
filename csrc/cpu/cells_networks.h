// Teacher and student at W output pixels, from low-resolution logits.
#pragma once

#include "cpu/powers.h"

namespace FASTMT_ISA {

// One teacher or an ensemble of them at W output pixels.
class TeacherCells {
 public:
  TeacherCells(const Cells& cells, const Grid* grids, int members, Kind kind, bool with_label,
               float inverse_temperature)
      : classes_(cells.classes),
        kind_(kind),
        with_label_(with_label),
        inverse_temperature_(inverse_temperature),
        powers_(cells, inverse_temperature),
        column_(aligned_buffer<float>(int64_t(classes_) * W)),
        member_(aligned_buffer<float>(int64_t(classes_) * W)) {
    for (int m = 0; m < members; ++m) sources_.emplace_back(grids[m], cells);
  }

  void go_to_strip(int64_t image, const Strip& strip) {
    for (RowSource& source : sources_) source.go_to_strip(image, strip);
  }
  void begin_chunk() { powers_.begin_chunk(); }
  void go_to_row(int out_row) {
    for (RowSource& source : sources_) source.go_to_row(out_row);
    powers_.begin_row();
  }

  // The teacher's column at the last look, and whether it holds powers.
  Column column() const { return walks_ ? powers_.column() : Column{column_.get(), W}; }
  bool walks() const { return walks_; }
  void used_up() { powers_.forget(); }

  FASTMT_INLINE Teacher look(const Step& step) {
    RowSource& first = sources_[0];
    const bool one = sources_.size() == 1;
    walks_ = one && kind_ != Kind::entropy && powers_.serve(first, step);
    if (walks_) return powers_.read(first, step, [&](auto powers) FASTMT_INLINED { return believed(powers); });
    const Column to = column();
    if (one) {
      first.interpolate(step, to);
      return scored(to);
    }
    const Column member{member_.get(), W};
    for (int c = 0; c < classes_; ++c) to[c] = splat(0);
    for (RowSource& source : sources_) {
      source.interpolate(step, member);
      add_member(member, to, classes_, inverse_temperature_);
    }
    return scored(to);
  }

 private:
  template <class Reads>
  FASTMT_INLINE Teacher believed(Reads powers) const {
    if (kind_ == Kind::margin) return teacher_of_powers<Kind::margin, true>(powers, classes_);
    return with_label_ ? teacher_of_powers<Kind::max_prob, true>(powers, classes_)
                       : teacher_of_powers<Kind::max_prob, false>(powers, classes_);
  }

  Teacher scored(Column column) const {
    const int members = int(sources_.size());
    const bool one = members == 1;
    const float scale = inverse_temperature_;
    switch (kind_) {
      case Kind::max_prob:
        return one ? teacher_pixel<Kind::max_prob>(column, classes_, scale)
                   : ensemble_pixel<Kind::max_prob>(column, classes_, members);
      case Kind::entropy:
        return one ? teacher_pixel<Kind::entropy>(column, classes_, scale)
                   : ensemble_pixel<Kind::entropy>(column, classes_, members);
      default:
        return one ? teacher_pixel<Kind::margin>(column, classes_, scale)
                   : ensemble_pixel<Kind::margin>(column, classes_, members);
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

// The student at W output pixels.
class StudentCells {
 public:
  explicit StudentCells(const Cells& cells)
      : classes_(cells.classes),
        source_(cells.first, cells),
        powers_(cells, 1.0f),
        column_(aligned_buffer<float>(int64_t(classes_) * W)) {}

  void go_to_strip(int64_t image, const Strip& strip) { source_.go_to_strip(image, strip); }
  void begin_chunk() { powers_.begin_chunk(); }
  void go_to_row(int out_row) {
    source_.go_to_row(out_row);
    powers_.begin_row();
  }

  bool walks(const Step& step) { return powers_.serve(source_, step); }
  Column powers() const { return powers_.column(); }
  template <bool WITH_LABEL>
  FASTMT_INLINE Student walk(const Step& step, ints label) {
    return powers_.read(source_, step, [&](auto powers) FASTMT_INLINED {
      return student_of_powers<WITH_LABEL>(powers, label, classes_);
    });
  }

  Column logits(const Step& step) {
    const Column to{column_.get(), W};
    source_.interpolate(step, to);
    return to;
  }

 private:
  int classes_;
  RowSource source_;
  Powers powers_;
  std::unique_ptr<float[], Free> column_;
};

}  // namespace FASTMT_ISA
