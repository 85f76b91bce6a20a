// Gradients of output pixels given back to low-resolution rows: cells.h the other way round, and
// another way to store than tile.h.
#pragma once

#include "cpu/cells.h"

namespace FASTMT_ISA {

// The transposed interpolation: gradients of output pixels summed into two low-resolution rows.
class RowSink {
 public:
  explicit RowSink(const Cells& cells)
      : classes_(cells.classes),
        width_(cells.first.width),
        pitch_(row_pitch(width_)),
        both_(aligned_buffer<float>(classes_ * V)),
        right_(aligned_buffer<float>(classes_ * V)),
        chunk_(aligned_buffer<ChunkSums>(classes_)),
        carry_(aligned_buffer<float>(classes_ * pitch_)),
        result_(aligned_buffer<float>(classes_ * pitch_)) {
    for (auto& corner : corner_) corner = aligned_buffer<float>(classes_ * pitch_);
    for (auto* sum : {&both_, &right_}) std::fill_n(sum->get(), classes_ * V, 0.0f);
  }

  void begin_group() { std::fill_n(carry_.get(), classes_ * pitch_, 0.0f); }

  void begin_band() {
    for (auto& corner : corner_) std::fill_n(corner.get(), classes_ * pitch_, 0.0f);
  }

  void begin_chunk() { std::fill_n(chunk_.get(), classes_, ChunkSums{}); }

  // Takes the gradient of W output pixels.
  struct Corners {
    float *both, *right;
    floats t;

    struct Place {
      float *both, *right;
      floats t;
      FASTMT_INLINE void operator=(floats gradient) const {
        const floats share = t * gradient;
        store_vector(both, load_vector(both) + (gradient.lo + gradient.hi));
        store_vector(right, load_vector(right) + (share.lo + share.hi));
      }
    };
    FASTMT_INLINE Place operator[](int c) const { return {both + c * V, right + c * V, t}; }
  };

  // The same where what is not active may be anything, and adds exactly 0.
  struct MaskedCorners {
    Corners corners;
    ints active;

    struct Place {
      Corners::Place place;
      ints active;
      FASTMT_INLINE void operator=(floats gradient) const {
        place = select(active, gradient, splat(0));
      }
    };
    FASTMT_INLINE Place operator[](int c) const { return {corners[c], active}; }
  };

  Corners at(const float* t) {
    touched_ = true;
    return {both_.get(), right_.get(), load(t)};
  }

  // Shares what one row of a chunk has summed up among the chunk's corners, and begins anew.
  void end_row(float row_t) {
    if (!touched_) return;
    touched_ = false;
    const vector_f lower = splat(row_t).lo, upper = 1 - lower, zero = {};
    float *both = both_.get(), *share = right_.get();
    ChunkSums* chunk = chunk_.get();
    for (const ChunkSums* end = chunk + classes_; chunk < end; ++chunk, both += V, share += V) {
      const vector_f right = load_vector(share), left = load_vector(both) - right;
      store_vector(both, zero);
      store_vector(share, zero);
      const vector_f values[4] = {left * upper, right * upper, left * lower, right * lower};
      for (int k = 0; k < 4; ++k)
        store_vector(chunk->corner[k], load_vector(chunk->corner[k]) + values[k]);
    }
  }

  void end_chunk(int x) {
    for (int c = 0; c < classes_; ++c)
      for (int k = 0; k < 4; ++k) {
        float* corner = &corner_[k][c * pitch_ + x];
        store_vector(corner, load_vector(corner) + load_vector(chunk_[c].corner[k]));
      }
  }

  // The finished gradient of the band's upper row, [classes][pitch]; its lower row is carried on.
  const float* end_band() {
    float *result = result_.get(), *carry = carry_.get();
    for (int64_t at = 0; at < classes_ * pitch_; at += pitch_) {
      join(corner_[0].get() + at, corner_[1].get() + at, result + at);
      for (int x = 0; x < width_; ++x) result[at + x] += carry[at + x];
      join(corner_[2].get() + at, corner_[3].get() + at, carry + at);
    }
    return result;
  }

  const float* carried() const { return carry_.get(); }
  int64_t pitch() const { return pitch_; }

 private:
  struct ChunkSums {
    float corner[4][V];  // upper left, upper right, lower left, lower right
  };

  // A column takes the left share of its own cell and the right share of the cell before it.
  void join(const float* left, const float* right, float* __restrict to) const {
    to[0] = left[0] + right[width_ - 1];
    for (int x = 1; x < width_; ++x) to[x] = left[x] + right[x - 1];
  }

  int classes_, width_;
  int64_t pitch_;
  bool touched_ = false;
  std::unique_ptr<float[], Free> both_, right_;
  std::unique_ptr<ChunkSums[], Free> chunk_;
  std::unique_ptr<float[], Free> carry_, result_, corner_[4];
};

}  // namespace FASTMT_ISA
