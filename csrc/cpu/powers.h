// Exponentials of logits that are up-sampled on the way, at one multiplication a pixel.
//
// Along an output row the logits between two low-resolution columns are linear, so their exponentials
// are a geometric progression: exp is needed where a walk through the cells starts, and for the ratio.
#pragma once

#include "cpu/cells.h"

namespace FASTMT_ISA {

// One step of a walk: W output pixels, one in each cell of the chunk at low-resolution column x.
struct Step {
  int x, index, count;     // index of `count` steps
  bool follows;            // each pixel lies `delta` behind that of the step before
  const int32_t* columns;  // -1 where a cell has no more
  const float *t, *delta;  // [W]
};

// exp(scale * (z - top)) of W pixels, class by class.
class Powers {
 public:
  Powers(int classes, float scale)
      : classes_(classes),
        scale_(scale),
        power_(aligned_buffer<float>(int64_t(classes) * W)),
        ratio_(aligned_buffer<float>(int64_t(classes) * W)) {}

  void begin_chunk() {
    looked_ = has_ratio_ = false;
    at_ = -2;
  }

  // Whether the chunk can be walked: all its logits within reach of one maximum, and finite.
  bool serve(const RowSource& source, const Step& step) {
    if (step.count < WORTHWHILE || !source.same_lanes()) return false;
    if (!looked_) serves_ = look(source, step.x);
    looked_ = true;
    return serves_;
  }

  // f(powers) for the pixels of a step; its reads of powers[c] fill the column.
  template <class F>
  auto read(const RowSource& source, const Step& step, F f) {
    const bool onward = step.follows && at_ == step.index - 1 && has_ratio_;
    at_ = step.index;
    if (onward) return f(Onward{power_.get(), ratio_.get()});
    const Start start{source.row() + step.x, source.pitch(), top_, load(step.t), scale_,
                      power_.get()};
    if (has_ratio_) return f(start);
    has_ratio_ = true;
    return f(StartWithRatio{start, load(step.delta), ratio_.get()});
  }

  Column column() const { return {power_.get(), W}; }
  void forget() { at_ = -2; }  // the column has been used up

 private:
  static constexpr int WORTHWHILE = 3;    // steps; below that a ratio does not pay
  static constexpr float REACH = 80.0f;   // exp(-80) is a normal number

  struct Start {
    const float* row;
    int64_t pitch;
    floats top, t;
    float scale;
    float* power;

    FASTMT_INLINE floats operator[](int c) const {
      const floats left = load(row + c * pitch), right = load_unaligned(row + c * pitch + 1);
      const floats e = exp(((left - top) + t * (right - left)) * scale);
      store(power + c * W, e);
      return e;
    }
  };
  struct StartWithRatio {
    Start start;
    floats delta;
    float* ratio;

    FASTMT_INLINE floats operator[](int c) const {
      const float* at = start.row + c * start.pitch;
      store(ratio + c * W, exp((load_unaligned(at + 1) - load(at)) * (delta * start.scale)));
      return start[c];
    }
  };
  struct Onward {
    float* power;
    const float* ratio;

    FASTMT_INLINE floats operator[](int c) const {
      const floats e = load(power + c * W) * load(ratio + c * W);
      store(power + c * W, e);
      return e;
    }
  };

  bool look(const RowSource& source, int x) {
    const float* at = source.row() + x;
    floats low = load(at), not_finite = splat(0);
    top_ = low;
    for (int c = 0; c < classes_; ++c, at += source.pitch()) {
      const floats left = load(at), right = load_unaligned(at + 1);
      const floats higher = max(left, right), lower = min(left, right);
      top_ = max(higher, top_);
      low = min(lower, low);
      not_finite += (left + right) * 0.0f;
    }
    return !any(~((top_ - low) * scale_ + not_finite < REACH));
  }

  int classes_;
  float scale_;
  std::unique_ptr<float[], Free> power_, ratio_;
  floats top_;
  bool looked_ = false, serves_ = false, has_ratio_ = false;
  int at_ = -2;
};

}  // namespace FASTMT_ISA
