// Up-sampling that never happens: logits of output pixels made from low-resolution rows when they
// are needed. Another way to load than tile.h.
#pragma once

#include "cpu/tile.h"

namespace FASTMT_ISA {

using fastmt::Cells;
using fastmt::Grid;

// Floats between the classes of a low-resolution row in a buffer: whole chunks, and room for the
// first column once more behind the last.
inline int64_t row_pitch(int width) { return (width + V - 1) / V * V + V; }

// One step of a walk along an output row: two neighbouring pixels in each cell of the chunk that
// starts at low-resolution column x.
struct Step {
  int x, index, count;     // index of `count` steps
  int origin;              // the step from which on pixels lie twice `delta` behind the step before
  const int32_t* columns;  // [W]; -1 where a cell has no more
  const float *t, *delta;  // [W], [V]
};

// The logits at the four corners of the V cells of a chunk: two columns of each of two rows.
struct CellCorners {
  const float *top, *bottom;  // of class 0; the column on the right is the next float
  int64_t pitch;

  struct Logits {
    vector_f top_left, top_right, bottom_left, bottom_right;
  };
  FASTMT_INLINE Logits operator[](int c) const {
    const float *upper = top + c * pitch, *lower = bottom + c * pitch;
    return {load_vector(upper), load_vector_unaligned(upper + 1), load_vector(lower),
            load_vector_unaligned(lower + 1)};
  }
};

// Output rows [begin, end) of one band that are worked on chunk by chunk, so that all that a chunk
// needs stays in the fast caches from one row to the next.
struct Strip {
  static constexpr int LONGEST = 8;
  int begin, end;
};

// The logits of one grid that the output rows of a strip need.
class RowSource {
 public:
  RowSource(const Grid& grid, const Cells& cells)
      : grid_(grid),
        classes_(cells.classes),
        pitch_(row_pitch(grid.width)),
        same_width_(grid.width == cells.first.width),
        same_cells_(same_width_ && grid.height == cells.first.height),
        top_(aligned_buffer<float>(elements())),
        bottom_(aligned_buffer<float>(elements())),
        rows_(aligned_buffer<float>(elements() * (same_cells_ ? 1 : Strip::LONGEST))) {}

  void go_to_strip(int64_t image, const Strip& strip) {
    strip_ = strip;
    if (same_cells_) return fetch(image, grid_.row_index[strip.begin]);
    for (int y = strip.begin; y < strip.end; ++y) {
      fetch(image, grid_.row_index[y]);
      fill(y, 0, pitch_, row_at(y));
    }
  }

  void go_to_row(int out_row) {
    out_row_ = out_row;
    filled_ = -1;
  }

  // The logits of W output pixels.
  void interpolate(const Step& step, Column to) {
    if (same_cells_ && filled_ != step.x) {
      fill(out_row_, step.x, step.x + 2 * V, row_at(out_row_));
      filled_ = step.x;
    }
    const float* row = row_at(out_row_);
    if (same_width_)
      interpolate_cells(row + step.x, step, to);
    else
      interpolate_columns(row, step.columns, to);
  }

  // Whether a step's cells are also those of this grid.
  bool same_cells() const { return same_cells_; }
  CellCorners corners(int x) const { return {top_.get() + x, bottom_.get() + x, pitch_}; }
  int out_row() const { return out_row_; }
  float row_t() const { return grid_.row_t[out_row_]; }
  float row_delta() const { return grid_.row_delta; }
  // The output row from which on each lies row_delta behind the one before.
  int row_origin() const { return grid_.row_origin[out_row_]; }
  bool is_followed() const {
    return out_row_ + 1 < strip_.end && grid_.row_origin[out_row_ + 1] <= out_row_;
  }

 private:
  int64_t elements() const { return classes_ * pitch_; }
  float* row_at(int y) const {
    return rows_.get() + (same_cells_ ? 0 : (y - strip_.begin) * elements());
  }

  void fetch(int64_t image, int index) {
    if (image == image_ && index == index_) return;
    const int64_t offset = image * grid_.view.stride[0] + index * grid_.view.stride[1];
    if (image == image_ && index == index_ + 1 && grid_.height > 1)
      top_.swap(bottom_);
    else
      fetch_row(offset, top_.get());
    const int64_t down = index + 1 < grid_.height ? grid_.view.stride[1] : 0;
    fetch_row(offset + down, bottom_.get());
    image_ = image;
    index_ = index;
  }

  // Behind the last column comes the first again: no cell of a chunk holds anything foreign.
  void fetch_row(int64_t offset, float* to) const {
    load_run_of(grid_.view, offset, grid_.view.stride[2], classes_, to, pitch_, grid_.width);
    for (int64_t at = 0; at < elements(); at += pitch_)
      std::fill(to + at + grid_.width, to + at + pitch_, to[at]);
  }

  // Columns [begin, end) of the row in between. Here as along a row, a logit of weight 0 does not
  // count, whatever it holds: beyond a border that is one of another row, or of the other border.
  void fill(int y, int64_t begin, int64_t end, float* to) const {
    const float t = grid_.row_t[y];
    const vector_f lower = splat(t).lo, upper = 1 - lower;
    for (int64_t at = 0; at < elements(); at += pitch_)
      for (int64_t i = at + begin; i < at + end; i += V) {
        const vector_f top = load_vector(&top_[i]), bottom = load_vector(&bottom_[i]);
        store_vector(to + i, t == 0 ? top : t == 1 ? bottom : upper * top + lower * bottom);
      }
  }

  void interpolate_cells(const float* row, const Step& step, Column to) const {
    const floats t = load(step.t), rest = 1.0f - t;
    const ints only_left = t == 0.0f, only_right = t == 1.0f;
    for (int c = 0; c < classes_; ++c, row += pitch_) {
      const vector_f column = load_vector(row), next = load_vector_unaligned(row + 1);
      const floats left{column, column}, right{next, next};
      const floats mixed = rest * left + t * right;
      to[c] = select(only_left, left, select(only_right, right, mixed));
    }
  }

  void interpolate_columns(const float* row, const int32_t* columns, Column to) const {
    int32_t left[W], right[W];
    float t[W];
    for (int i = 0; i < W; ++i) {
      const int32_t column = std::max(columns[i], 0);
      t[i] = grid_.column_t[column];
      left[i] = grid_.column_index[column] + (t[i] == 1 ? 1 : 0);
      right[i] = left[i] + 1;
      if (t[i] == 0 || t[i] == 1) right[i] = left[i], t[i] = 0.5f;  // 0 * inf would be NaN
    }
    for (int c = 0; c < classes_; ++c, row += pitch_) {
      float* values = to.base + c * to.row;
      for (int i = 0; i < W; ++i) values[i] = (1 - t[i]) * row[left[i]] + t[i] * row[right[i]];
    }
  }

  Grid grid_;
  int classes_;
  int64_t pitch_;
  bool same_width_, same_cells_;
  Strip strip_{};
  int64_t image_ = -1;
  int index_ = -1, out_row_ = -1, filled_ = -1;
  std::unique_ptr<float[], Free> top_, bottom_, rows_;
};

}  // namespace FASTMT_ISA
