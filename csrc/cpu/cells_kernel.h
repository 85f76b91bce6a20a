// The three pixel operations on cells: the same pixel mathematics as the tiles, walked cell by cell.
#pragma once

#include <vector>

#include "cpu/cells.h"
#include "cpu/confidence_kernel.h"
#include "cpu/consistency_kernel.h"
#include "cpu/cross_entropy_kernel.h"

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

// Calls visit(x, columns, t) for each step of W output pixels of a row; begin and end around chunks.
template <class Begin, class Visit, class End>
inline void walk_row(const Lanes& lanes, Begin begin, Visit visit, End end) {
  for (int k = 0; k < lanes.chunks; ++k) {
    begin();
    for (int s = 0; s < lanes.steps[k]; ++s) {
      const int64_t entry = (lanes.start[k] + int64_t(s)) * W;
      visit(k * W, lanes.column + entry, lanes.t + entry);
    }
    end(k * W);
  }
}

// One teacher or an ensemble of them at W output pixels.
class TeacherCells {
 public:
  TeacherCells(const Cells& cells, const Grid* grids, int members, Kind kind,
               float inverse_temperature)
      : classes_(cells.classes),
        kind_(kind),
        inverse_temperature_(inverse_temperature),
        column_(aligned_buffer<float>(int64_t(classes_) * W)),
        member_(aligned_buffer<float>(int64_t(classes_) * W)) {
    for (int m = 0; m < members; ++m) sources_.emplace_back(grids[m], cells);
  }

  void go_to(int64_t image, int out_row) {
    for (RowSource& source : sources_) source.go_to(image, out_row);
  }

  Column column() const { return {column_.get(), W}; }

  Teacher look(int x, const int32_t* columns, const float* t) const {
    const Column to = column();
    if (sources_.size() == 1) {
      sources_[0].interpolate(x, columns, t, to);
      return scored(to);
    }
    const Column member{member_.get(), W};
    for (int c = 0; c < classes_; ++c) to[c] = splat(0);
    for (const RowSource& source : sources_) {
      source.interpolate(x, columns, t, member);
      add_member(member, to, classes_, inverse_temperature_, 1.0f / float(sources_.size()));
    }
    return scored(to);
  }

 private:
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
  float inverse_temperature_;
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
  TeacherCells teacher(cells, cells.others, call.members, Kind(call.kind),
                       call.inverse_temperature);
  alignas(64) float score[W];
  alignas(64) int32_t label[W];
  for (int64_t index = begin; index < end; ++index) {
    const Group group(cells, index);
    for (int y = cells.band_start[group.begin]; y < cells.band_start[group.end]; ++y) {
      teacher.go_to(group.image, y);
      const int64_t row = (group.image * cells.out_height + y) * cells.out_width;
      const auto visit = [&](int x, const int32_t* columns, const float* t) {
        const Teacher result = teacher.look(x, columns, t);
        store(score, result.score);
        store(label, result.label);
        for (int i = 0; i < W; ++i) {
          if (columns[i] < 0) continue;
          call.score[row + columns[i]] = score[i];
          call.label[row + columns[i]] = label[i];
        }
      };
      walk_row(cells.lanes, [] {}, visit, [](int) {});
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

inline void cells_consistency(const ConsistencyCall& call, const Cells& cells, int64_t begin,
                              int64_t end) {
  TeacherCells teacher(cells, cells.others, call.members, Kind(call.kind),
                       call.inverse_temperature);
  RowSource student(cells.first, cells);
  const auto buffer = aligned_buffer<float>(int64_t(call.classes) * W);
  const Column z{buffer.get(), W};
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
        const auto visit = [&](int x, const int32_t* columns, const float* t) {
          const Teacher belief = teacher.look(x, columns, t);
          const floats weight =
              weigh(call, belief, valid_at(call, group.image, y, columns),
                    pixel_weight_at(call.pixel_weight, group.image, y, columns), tally);
          if (!any(weight != 0.0f)) return;
          student.interpolate(x, columns, t, z);
          add_loss(call, z, teacher.column(), belief, weight, tally);
          if (wants_gradient) sink.add(z, t);
        };
        const float row_t = cells.first.row_t[y];
        walk_row(cells.lanes, [&] { sink.begin_chunk(); }, visit,
                 [&](int x) { sink.end_chunk(x, row_t); });
        tally.add_to(sums);
      }
      const float* finished = sink.end_band();
      if (wants_gradient) rows.put(group, band, finished, sink.pitch());
    }
    if (wants_gradient) rows.put(group, group.end, sink.carried(), sink.pitch());
  }
}

inline void cells_cross_entropy(const CrossEntropyCall& call, const Cells& cells, int64_t begin,
                                int64_t end) {
  RowSource logits(cells.first, cells);
  const auto buffer = aligned_buffer<float>(int64_t(call.classes) * W);
  const Column z{buffer.get(), W};
  const GradientRows rows(call.gradient, cells);
  const bool wants_gradient = call.gradient.data;
  LabelBlock block;
  for (int64_t index = begin; index < end; ++index) {
    const Group group(cells, index);
    RowSink sink(cells);
    CrossEntropySums& sums = call.sums[index] = {};
    for (int band = group.begin; band < group.end; ++band) {
      sink.begin_band();
      for (int y = cells.band_start[band]; y < cells.band_start[band + 1]; ++y) {
        floats loss = splat(0);
        logits.go_to(group.image, y);
        const auto visit = [&](int x, const int32_t* columns, const float* t) {
          gather_integers(call.labels, group.image, y, columns, call.ignore_index, block.labels);
          store(block.weight, pixel_weight_at(call.pixel_weight, group.image, y, columns));
          if (!weigh_labels(call, block, sums)) return;
          logits.interpolate(x, columns, t, z);
          loss += label_loss(call, z, load(block.label), load(block.weight));
          if (wants_gradient) sink.add(z, t);
        };
        const float row_t = cells.first.row_t[y];
        walk_row(cells.lanes, [&] { sink.begin_chunk(); }, visit,
                 [&](int x) { sink.end_chunk(x, row_t); });
        sums.loss += sum_lanes(loss);
      }
      const float* finished = sink.end_band();
      if (wants_gradient) rows.put(group, band, finished, sink.pitch());
    }
    if (wants_gradient) rows.put(group, group.end, sink.carried(), sink.pitch());
  }
}

}  // namespace FASTMT_ISA
