// The exponentials of a column of output pixels. Down it the logits are a line, so their
// exponentials are a geometric progression: two exps a class where a walk starts, one
// multiplication a pixel, and no registers for the corners, which the block keeps in shared memory.
// Where the logits reach too far apart for that, every row starts anew.
#pragma once

#include "cuda/stage.h"

namespace fastmt::cuda {

template <int C>
struct Powers {
  float column[C];  // exp(scale * (logit - top)), the pixel.h kind of Powers
  float ratio[C];
  bool walks;
  static constexpr float REACH = 60.0f;  // exp(60) times a large weight is still finite

  // Cleared, or registers would hold what the band before left here.
  FASTMT_INLINE Powers() : column{}, ratio{}, walks(false) {}
  FASTMT_INLINE Column at() { return {column, 1}; }

  // To a row from the one above it; `column_at` says where the thread's column lies, and is asked
  // where a walk starts.
  template <class F>
  FASTMT_INLINE void go_to(const Stage<C>& stage, F column_at, Row row, float step, float scale) {
    if (!walks || row.move <= Move::start) return start(stage, column_at(), row.at, step, scale);
    if (row.move == Move::keep) return;
    FASTMT_UNROLL
    for (int c = 0; c < C; ++c) column[c] *= ratio[c];
  }
  // Leaves a row out.
  FASTMT_INLINE void skip() { walks = false; }

  FASTMT_INLINE void start(const Stage<C>& stage, At column_at, At row, float step, float scale) {
    constexpr float per_octave = 1.44269504f;
    const Between<int> across = stage.across(column_at);
    each_corner(stage, across, [&](int c, float above, float below) {
      const float rise = below - above;
      column[c] = above + row.t * rise;
      ratio[c] = exp2_unit(rise * (step * scale * per_octave));
    });
    float top = stage.top(across);
    walks = (top - stage.low(across)) * scale < REACH;
    if (!walks) top = interpolate(stage, across, row);
    if (stage.shifts) stage.shifts[this_thread()] = top;
    const float slope = scale * per_octave, shift = top * slope;
    FASTMT_UNROLL
    for (int c = 0; c < C; ++c) column[c] = exp2_unit(fmaf(column[c], slope, -shift));
  }

 private:
  // f(c, above, below): the logits of a column in the two rows of the stage.
  template <class F>
  static FASTMT_INLINE void each_corner(const Stage<C>& stage, const Between<int>& across, F f) {
    const float *left = stage.at + across.first, *right = left + across.next;
    FASTMT_UNROLL
    for (int c = 0; c < C; c += 4) {
      const Four above[2] = {four_at(left + c), four_at(right + c)};
      const Four below[2] = {four_at(left + Stage<C>::ROW + c), four_at(right + Stage<C>::ROW + c)};
      FASTMT_UNROLL
      for (int i = 0; i < 4 && c + i < C; ++i)
        f(c + i, across.mix(above[0].at[i], above[1].at[i]),
          across.mix(below[0].at[i], below[1].at[i]));
    }
  }

  // The logits of one row, and the largest of them.
  FASTMT_INLINE float interpolate(const Stage<C>& stage, const Between<int>& across, At row) {
    const Between<int> down({0, row.t}, Stage<C>::ROW);
    float top = -INFINITY;
    FASTMT_UNROLL
    for (int c = 0; c < C; ++c) {
      column[c] = stage.logit(across, down, c);
      top = max(top, column[c]);
    }
    return top;
  }
};

// A student from its exponentials, of temperature 1.
template <bool WITH_LABEL, int C, class F>
FASTMT_INLINE Student student_of(Powers<C>& powers, const Stage<C>& stage, F column_at, At row,
                                 int32_t label) {
  Student student = student_of_powers<false>(powers.at(), label, C);
  if constexpr (WITH_LABEL) {
    // From the logit: a power may be too small.
    const Between<int> down({0, row.t}, Stage<C>::ROW);
    const float logit = stage.logit(stage.across(column_at()), down, label);
    student.chosen = logit - stage.shifts[this_thread()];
  }
  return student;
}

}  // namespace fastmt::cuda
