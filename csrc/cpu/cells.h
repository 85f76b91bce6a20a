// Up-sampling that never happens: logits of output pixels made from low-resolution rows when they
// are needed, and gradients given back to those rows. Another way to load and store than tile.h.
#pragma once

#include "cpu/tile.h"

namespace FASTMT_ISA {

using fastmt::Cells;
using fastmt::Grid;

// Floats between the classes of a low-resolution row in a buffer: whole chunks, and room for the
// first column once more behind the last.
inline int64_t row_pitch(int width) { return (width + W - 1) / W * W + W; }

// Two rows of one grid, and the row in between that an output row needs.
class RowSource {
 public:
  RowSource(const Grid& grid, const Cells& cells)
      : grid_(grid),
        classes_(cells.classes),
        pitch_(row_pitch(grid.width)),
        same_lanes_(grid.width == cells.first.width),
        top_(aligned_buffer<float>(classes_ * pitch_)),
        bottom_(aligned_buffer<float>(classes_ * pitch_)),
        row_(aligned_buffer<float>(classes_ * pitch_)) {
    for (auto* buffer : {&top_, &bottom_, &row_})
      std::fill_n(buffer->get(), classes_ * pitch_, 0.0f);
  }

  void go_to(int64_t image, int out_row) {
    const int index = grid_.row_index[out_row];
    if (image != image_ || index != index_) fetch(image, index);
    const floats t = splat(grid_.row_t[out_row]);
    for (int c = 0; c < classes_; ++c) {
      const int64_t first = c * pitch_;
      for (int64_t i = first; i < first + grid_.width; i += W) {
        const floats top = load(&top_[i]), bottom = load(&bottom_[i]);
        store(&row_[i], top + t * (bottom - top));
      }
      row_[first + grid_.width] = row_[first];
    }
  }

  // The logits of W output columns: lanes [x, x + W) by fraction t, or each column on its own.
  void interpolate(int x, const int32_t* columns, const float* t, Column to) const {
    if (same_lanes_)
      interpolate_lanes(x, load(t), to);
    else
      interpolate_columns(columns, to);
  }

  // Both have the same columns as the lanes, so a cell's right logits are its neighbour's left ones.
  bool same_lanes() const { return same_lanes_; }
  // The logits of the output row at the low-resolution columns, [classes][pitch].
  const float* row() const { return row_.get(); }
  int64_t pitch() const { return pitch_; }

 private:
  void fetch(int64_t image, int index) {
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

  void fetch_row(int64_t offset, float* to) const {
    load_run_of(grid_.view, offset, grid_.view.stride[2], classes_, to, pitch_, grid_.width);
  }

  void interpolate_lanes(int x, floats t, Column to) const {
    const float* row = row_.get() + x;
    for (int c = 0; c < classes_; ++c, row += pitch_) {
      const floats left = load(row), right = load_unaligned(row + 1);
      to[c] = left + t * (right - left);
    }
  }

  void interpolate_columns(const int32_t* columns, Column to) const {
    int32_t left[W], right[W];
    float t[W];
    for (int i = 0; i < W; ++i) {
      const int32_t column = std::max(columns[i], 0);
      left[i] = grid_.column_index[column];
      right[i] = std::min(left[i] + 1, grid_.width - 1);
      t[i] = grid_.column_t[column];
    }
    const float* row = row_.get();
    for (int c = 0; c < classes_; ++c, row += pitch_) {
      float* values = to.base + c * to.row;
      for (int i = 0; i < W; ++i) values[i] = row[left[i]] + t[i] * (row[right[i]] - row[left[i]]);
    }
  }

  Grid grid_;
  int classes_;
  int64_t pitch_;
  bool same_lanes_;
  int64_t image_ = -1;
  int index_ = -1;
  std::unique_ptr<float[], Free> top_, bottom_, row_;
};

// The transposed interpolation: gradients of output pixels summed into two low-resolution rows.
class RowSink {
 public:
  explicit RowSink(const Cells& cells)
      : classes_(cells.classes),
        width_(cells.first.width),
        pitch_(row_pitch(width_)),
        both_(aligned_buffer<float>(classes_ * W)),
        right_(aligned_buffer<float>(classes_ * W)),
        carry_(aligned_buffer<float>(classes_ * pitch_)),
        result_(aligned_buffer<float>(classes_ * pitch_)) {
    for (auto& corner : corner_) corner = aligned_buffer<float>(classes_ * pitch_);
    std::fill_n(carry_.get(), classes_ * pitch_, 0.0f);
  }

  void begin_band() {
    for (auto& corner : corner_) std::fill_n(corner.get(), classes_ * pitch_, 0.0f);
  }

  void begin_chunk() {
    std::fill_n(both_.get(), classes_ * W, 0.0f);
    std::fill_n(right_.get(), classes_ * W, 0.0f);
    touched_ = false;
  }

  // Takes the gradient of W output pixels; what is not active adds exactly 0.
  struct Corners {
    float *both, *right;
    floats t;
    ints active;

    struct Place {
      float *both, *right;
      floats t;
      ints active;
      FASTMT_INLINE void operator=(floats gradient) const {
        const floats g = select(active, gradient, splat(0));
        store(both, load(both) + g);
        store(right, load(right) + t * g);
      }
    };
    FASTMT_INLINE Place operator[](int c) const { return {both + c * W, right + c * W, t, active}; }
  };

  Corners at(const float* t, ints active) {
    touched_ = true;
    return {both_.get(), right_.get(), load(t), active};
  }

  void end_chunk(int x, float row_t) {
    if (!touched_) return;
    for (int c = 0; c < classes_; ++c) {
      const floats right = load(&right_[c * W]), left = load(&both_[c * W]) - right;
      const int64_t at = c * pitch_ + x;
      const floats values[4] = {left * (1 - row_t), right * (1 - row_t), left * row_t,
                                right * row_t};
      for (int k = 0; k < 4; ++k) store(&corner_[k][at], load(&corner_[k][at]) + values[k]);
    }
  }

  // The finished gradient of the band's upper row, [classes][pitch]; its lower row is carried on.
  const float* end_band() {
    for (int c = 0; c < classes_; ++c) {
      const int64_t at = c * pitch_;
      join(corner_[0].get() + at, corner_[1].get() + at, carry_.get() + at, result_.get() + at);
      std::fill_n(carry_.get() + at, width_, 0.0f);
      join(corner_[2].get() + at, corner_[3].get() + at, carry_.get() + at, carry_.get() + at);
    }
    return result_.get();
  }

  const float* carried() const { return carry_.get(); }
  int64_t pitch() const { return pitch_; }

 private:
  // A column takes the left share of its own cell and the right share of the cell before it.
  void join(const float* left, const float* right, const float* before, float* to) const {
    to[0] = before[0] + left[0] + right[width_ - 1];
    for (int x = 1; x < width_; ++x) to[x] = before[x] + left[x] + right[x - 1];
  }

  int classes_, width_;
  int64_t pitch_;
  bool touched_ = false;
  std::unique_ptr<float[], Free> both_, right_, carry_, result_, corner_[4];
};

// Values of a map (N, height, width) at W output columns of a row; `padding` where there is none.
template <class T, class To>
inline void gather(const View& map, int64_t image, int out_row, const int32_t* columns, To padding,
                   To* to, To (*convert)(T)) {
  const T* row = static_cast<const T*>(map.data) + image * map.stride[0] + out_row * map.stride[1];
  for (int i = 0; i < W; ++i)
    to[i] = columns[i] < 0 ? padding : convert(row[columns[i] * map.stride[2]]);
}

inline void gather_floats(const View& map, int64_t image, int row, const int32_t* columns,
                          float* to) {
  if (map.type == Type::float32)
    gather<float, float>(map, image, row, columns, 0, to, [](float x) { return x; });
  else if (map.type == Type::bfloat16)
    gather<bfloat16, float>(map, image, row, columns, 0, to, [](bfloat16 x) { return widen(x); });
  else
    gather<float16, float>(map, image, row, columns, 0, to, [](float16 x) { return widen(x); });
}

// A row of a map of labels, as 64-bit integers.
inline void load_row(const View& map, int64_t image, int row, int width, int64_t* to) {
  const int64_t offset = image * map.stride[0] + row * map.stride[1], step = map.stride[2];
  const auto copy = [&](const auto* source) {
    if (step == 1)
      std::copy_n(source, width, to);
    else
      for (int x = 0; x < width; ++x) to[x] = source[x * step];
  };
  if (map.type == Type::uint8)
    copy(static_cast<const uint8_t*>(map.data) + offset);
  else
    copy(static_cast<const int64_t*>(map.data) + offset);
}

inline void gather_integers(const View& map, int64_t image, int row, const int32_t* columns,
                            int64_t padding, int64_t* to) {
  if (map.type == Type::uint8)
    gather<uint8_t, int64_t>(map, image, row, columns, padding, to,
                             [](uint8_t x) { return int64_t(x); });
  else
    gather<int64_t, int64_t>(map, image, row, columns, padding, to, [](int64_t x) { return x; });
}

}  // namespace FASTMT_ISA
