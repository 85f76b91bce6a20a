// Exponentials of logits that are up-sampled on the way, at one multiplication a pixel.
//
// Between four low-resolution logits the logits are bilinear, so along a row as well as down a column
// their exponentials are geometric progressions: exp is needed where a walk through a cell starts,
// and for the ratios. The ratio of one row to the next is itself a progression along the row.
#pragma once

#include <vector>

#include "cpu/cells.h"

namespace FASTMT_ISA {

// exp(scale * (z - top)) of W pixels, class by class.
class Powers {
 public:
  Powers(const Cells& cells, float scale)
      : classes_(cells.classes),
        scale_(scale),
        power_(aligned_buffer<float>(int64_t(classes_) * W)),
        square_(aligned_buffer<float>(int64_t(classes_) * V)) {}

  // A chunk of another strip.
  void begin_chunk() { looked_ = false; }
  void begin_row() { at_ = NOWHERE; }

  // Whether the chunk can be walked: all its logits within reach of one maximum, and finite. A class
  // alone has exactly p = 1 only by its own maximum.
  bool serve(const RowSource& source, const Step& step) {
    if (step.count < WORTHWHILE || classes_ == 1 || !source.same_cells()) return false;
    if (!looked_) look(source, step);
    return serves_;
  }

  // f(powers) for the pixels of a step; the powers stand in the column afterwards.
  template <class F>
  FASTMT_INLINE auto read(const RowSource& source, const Step& step, F f) {
    if (at_ < step.origin) {
      const Downward downward{come_to_origin(source, step), put()};
      const bool is_there = step.origin == step.index;
      if (is_there) return downward.walk ? f(downward) : f(column());
      if (downward.walk) pass(downward);
    }
    const Onward onward{power_.get(), square_.get()};
    for (; at_ < step.index - 1; ++at_) pass(onward);
    at_ = step.index;
    return f(onward);
  }

  Column column() const { return {power_.get(), W}; }
  void forget() { at_ = NOWHERE; }  // the column has been used up

 private:
  static constexpr int WORTHWHILE = 2;       // steps; below that a ratio does not pay
  static constexpr int WORTHWHILE_ROWS = 4;  // to come down by products instead of exp
  static constexpr float REACH = 60.0f;      // exp(60) times a large weight is still finite
  static constexpr int NOWHERE = -1;

  // Of the left pixels of a step: the power, its ratio to the right ones, and those of both to what
  // they are in the output row below.
  struct Down {
    float power[V], ratio[V], down_power[V], down_ratio[V];
  };
  struct Walk {
    int row = NOWHERE;                   // the output row that it has come down to
    std::unique_ptr<Down[], Free> down;  // [classes]
  };

  struct Onward {
    float* power;
    const float* square;

    FASTMT_INLINE floats operator[](int c) const {
      const vector_f ratio = load_vector(square + c * V);
      floats e = load(power + c * W);
      e = {e.lo * ratio, e.hi * ratio};
      store(power + c * W, e);
      return e;
    }
  };

  // What a step starts from: the powers and the square of their ratio.
  struct Put {
    float *power, *square;

    FASTMT_INLINE floats operator()(int c, vector_f left, vector_f ratio) const {
      const floats e{left, left * ratio};
      store(power + c * W, e);
      store_vector(square + c * V, ratio * ratio);
      return e;
    }
  };

  // One output row down.
  struct Downward {
    Down* walk;
    Put put;

    FASTMT_INLINE floats operator[](int c) const {
      Down& at = walk[c];
      const vector_f power = load_vector(at.power) * load_vector(at.down_power);
      const vector_f ratio = load_vector(at.ratio) * load_vector(at.down_ratio);
      store_vector(at.power, power);
      store_vector(at.ratio, ratio);
      return put(c, power, ratio);
    }
  };

  Put put() const { return {power_.get(), square_.get()}; }

  template <class Reads>
  void pass(Reads powers) const {
    for (int c = 0; c < classes_; ++c) powers[c];
  }

  // The walk, where it is one row above; else null, and the powers stand in the column.
  Down* come_to_origin(const RowSource& source, const Step& step) {
    Walk& walk = walks_[step.origin];
    const int rows = source.out_row() - walk.row;
    at_ = step.origin;
    if (walk.row < source.row_origin() || rows > WORTHWHILE_ROWS) {
      start(source, step, walk);
      return nullptr;
    }
    walk.row = source.out_row();
    for (int k = 1; k < rows; ++k) pass(Downward{walk.down.get(), put()});
    if (rows > 0) return walk.down.get();
    for (int c = 0; c < classes_; ++c)
      put()(c, load_vector(walk.down[c].power), load_vector(walk.down[c].ratio));
    return nullptr;
  }

  void start(const RowSource& source, const Step& step, Walk& walk) {
    if (!source.is_followed()) return start_at<false>(source, step, nullptr);
    if (!walk.down) walk.down = aligned_buffer<Down>(classes_);
    walk.row = source.out_row();
    start_at<true>(source, step, walk.down.get());
  }

  template <bool GOES_DOWN>
  void start_at(const RowSource& source, const Step& step, Down* walk) {
    const CellCorners corners = source.corners(step.x);
    const Put put = this->put();
    const vector_f t = load_vector(step.t - (step.index - step.origin) * W);
    const vector_f delta = load_vector(step.delta);
    const vector_f top = top_;
    const float row_t = source.row_t(), row_delta = source.row_delta();
    for (int c = 0; c < classes_; ++c) {
      const auto at = corners[c];
      const vector_f fall_left = at.bottom_left - at.top_left;
      const vector_f fall_right = at.bottom_right - at.top_right;
      const vector_f left = (at.top_left - top) + row_t * fall_left;
      const vector_f slope = (at.top_right - top) + row_t * fall_right - left;
      const floats e = exp(floats{left + t * slope, delta * slope} * scale_);
      put(c, e.lo, e.hi);
      if constexpr (GOES_DOWN) {
        const vector_f twist = fall_right - fall_left;
        const floats down =
            exp(floats{fall_left + t * twist, delta * twist} * (row_delta * scale_));
        Down& to = walk[c];
        store_vector(to.power, e.lo);
        store_vector(to.ratio, e.hi);
        store_vector(to.down_power, down.lo);
        store_vector(to.down_ratio, down.hi);
      }
    }
  }

  void look(const RowSource& source, const Step& step) {
    const CellCorners corners = source.corners(step.x);
    vector_f top = corners[0].top_left, low = top, not_finite = {};
    const auto higher = [](vector_f a, vector_f b) { return a > b ? a : b; };
    const auto lower = [](vector_f a, vector_f b) { return a < b ? a : b; };
    for (int c = 0; c < classes_; ++c) {
      const auto at = corners[c];
      for (vector_f logit : {at.top_left, at.top_right, at.bottom_left, at.bottom_right}) {
        top = higher(logit, top);
        low = lower(logit, low);
        not_finite += logit * 0.0f;
      }
    }
    const vector_f range = (top - low) * scale_ + not_finite;
    const floats both{range, range};
    if (int(walks_.size()) < step.count) walks_.resize(step.count);
    for (Walk& walk : walks_) walk.row = NOWHERE;
    top_ = top;
    looked_ = true;
    serves_ = !any(~(both < REACH));
  }

  int classes_;
  float scale_;
  int at_ = NOWHERE;
  bool looked_ = false, serves_ = false;
  vector_f top_;  // of the logits of each cell
  std::unique_ptr<float[], Free> power_, square_;
  std::vector<Walk> walks_;  // [steps]; used for the origins
};

}  // namespace FASTMT_ISA
