// How a call on cells is walked, and how its gradient is handed on from one group to the next.
#pragma once

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

// The strips of a band.
class Strips {
 public:
  Strips(const Cells& cells, int band)
      : begin_(cells.band_start[band]), end_(cells.band_start[band + 1]) {}

  struct Iterator {
    int at, end;
    Strip operator*() const { return {at, std::min(at + Strip::LONGEST, end)}; }
    void operator++() { at = std::min(at + Strip::LONGEST, end); }
    bool operator!=(const Iterator& other) const { return at != other.at; }
  };
  Iterator begin() const { return {begin_, end_}; }
  Iterator end() const { return {end_, end_}; }

 private:
  int begin_, end_;
};

// Calls visit(step) for each W output pixels of chunk k in one row.
template <class Visit>
FASTMT_INLINE void walk_chunk(const Lanes& lanes, int k, Visit visit) {
  for (int s = 0; s < lanes.steps[k]; ++s) {
    const int64_t entry = lanes.start[k] + int64_t(s);
    visit(Step{k * V, s, lanes.steps[k], lanes.origin[entry], lanes.column + entry * W,
               lanes.t + entry * W, lanes.delta + k * V});
  }
}

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

}  // namespace FASTMT_ISA
