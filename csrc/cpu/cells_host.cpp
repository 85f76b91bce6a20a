#include "cpu/cells_host.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace fastmt {

Axis::Axis(int64_t size, int64_t out, bool align_corners)
    : step(!align_corners ? double(size) / double(out)
           : out > 1      ? double(size - 1) / double(out - 1)
                          : 0) {
  const int32_t highest = int32_t(std::max<int64_t>(size - 2, 0));
  for (int64_t o = 0; o < out; ++o) {
    const double position = align_corners ? step * double(o) : step * (double(o) + 0.5) - 0.5;
    const double clamped = std::clamp(position, 0.0, double(size - 1));
    const int32_t lower = std::min(int32_t(clamped), highest);
    index.push_back(lower);
    t.push_back(float(clamped - lower));
    side.push_back(position < 0 ? -1 : position > double(size - 1) ? 1 : 0);
  }
}

CellTables::CellTables(const Tensor& first, const std::vector<Tensor>& others, int64_t out_height,
                       int64_t out_width, bool align_corners)
    : out_height_(int(out_height)), out_width_(int(out_width)) {
  cells = {};
  cells.images = first.size(0);
  cells.classes = int(first.size(1));
  cells.out_height = out_height_;
  cells.out_width = out_width_;
  cells.first = grid_of(first, align_corners);
  make_bands(*axes_[0]);
  make_lanes(*axes_[1]);
  for (const Tensor& other : others) grids_.push_back(grid_of(other, align_corners));
  cells.others = grids_.data();
}

View image_view(const Tensor& image) {
  const auto strides = image.strides();
  View view{};
  view.data = image.data_ptr();
  view.type = type_of(image);
  view.class_stride = strides[1];
  view.stride[0] = strides[0];
  view.stride[1] = strides[2];
  view.stride[2] = strides[3];
  return view;
}

Grid CellTables::grid_of(const Tensor& logits, bool align_corners) {
  Grid grid{};
  grid.view = image_view(logits);
  grid.height = int(logits.size(2));
  grid.width = int(logits.size(3));
  axes_.push_back(std::make_unique<Axis>(grid.height, out_height_, align_corners));
  axes_.push_back(std::make_unique<Axis>(grid.width, out_width_, align_corners));
  const Axis &rows = *axes_[axes_.size() - 2], &columns = *axes_.back();
  grid.row_index = rows.index.data();
  grid.row_t = rows.t.data();
  grid.column_index = columns.index.data();
  grid.column_t = columns.t.data();
  return grid;
}

template <class T>
T* CellTables::keep(int64_t count) {
  const int64_t bytes = (count * int64_t(sizeof(T)) + 63) / 64 * 64;
  kept_.emplace_back(std::aligned_alloc(64, bytes), std::free);
  return static_cast<T*>(kept_.back().get());
}

void CellTables::make_lanes(const Axis& columns) {
  const int lanes = kernels().lanes, width = cells.first.width;
  // The pixels beyond both borders share the cell between the last column and the first.
  std::vector<std::vector<std::pair<int32_t, float>>> of_lane(width);
  for (int32_t o = 0; o < out_width_; ++o) {
    if (columns.side[o] == 0)
      of_lane[columns.index[o]].push_back({o, columns.t[o]});
    else
      of_lane[width - 1].push_back({o, columns.side[o] < 0 ? 1.0f : 0.0f});
  }
  int32_t entries = 0;
  for (int x = 0; x < width; x += lanes) {
    size_t longest = 0;
    for (int lane = x; lane < std::min(x + lanes, width); ++lane)
      longest = std::max(longest, of_lane[lane].size());
    start_.push_back(entries);
    steps_.push_back(int32_t(longest));
    entries += int32_t(longest);
  }
  auto* column = keep<int32_t>(int64_t(entries) * lanes);
  auto* t = keep<float>(int64_t(entries) * lanes);
  std::fill_n(column, int64_t(entries) * lanes, -1);
  std::fill_n(t, int64_t(entries) * lanes, 0.0f);
  for (int lane = 0; lane < width; ++lane) {
    int64_t at = int64_t(start_[lane / lanes]) * lanes + lane % lanes;
    for (const auto& [output, fraction] : of_lane[lane]) {
      column[at] = output;
      t[at] = fraction;
      at += lanes;
    }
  }
  auto* delta = keep<float>(int64_t(steps_.size()) * lanes);
  std::fill_n(delta, int64_t(steps_.size()) * lanes, float(columns.step));
  delta[width - 1] = 0;  // beyond the borders the logits stay the same
  cells.lanes = {int(steps_.size()), steps_.data(), start_.data(), column, t, nullptr, delta};
  make_walk(delta);
}

// Where a walk through the cells goes on evenly. It starts afresh every few steps, so that the
// rounding of a product does not grow with the scale.
void CellTables::make_walk(const float* delta) {
  constexpr int longest = 8;
  constexpr float rounding = 1e-6f;
  const int lanes = kernels().lanes;
  const Lanes& table = cells.lanes;
  for (int k = 0; k < table.chunks; ++k)
    for (int s = 0; s < table.steps[k]; ++s) {
      bool follows = s % longest != 0;
      const int64_t entry = int64_t(table.start[k] + s) * lanes;
      for (int i = 0; follows && i < lanes; ++i) {
        const float expected = table.t[entry + i - lanes] + delta[k * lanes + i];
        const bool even = std::abs(table.t[entry + i] - expected) <= rounding;
        follows = table.column[entry + i] < 0 || even;
      }
      follows_.push_back(follows);
    }
  cells.lanes.follows = follows_.data();
}

void CellTables::make_bands(const Axis& rows) {
  cells.bands = std::max(cells.first.height - 1, 1);
  band_start_.assign(cells.bands + 1, 0);
  for (int32_t index : rows.index) ++band_start_[index + 1];
  for (int band = 0; band < cells.bands; ++band) band_start_[band + 1] += band_start_[band];
  cells.band_start = band_start_.data();
  // Larger groups share fewer rows; smaller ones feed more threads. The shape alone decides.
  cells.bands_in_group = std::clamp(cells.bands / 16, 1, 8);
  cells.groups = (cells.bands + cells.bands_in_group - 1) / cells.bands_in_group;
}

void CellTables::make_edges(const Tensor& like) {
  const std::vector<int64_t> shape{groups(), 2, cells.classes, cells.first.width};
  edges_ = torch::stable::new_empty(like, shape, ScalarType::Float);
  cells.edges = static_cast<float*>(edges_.data_ptr());
}

View map_view(const std::optional<Tensor>& map) {
  View view{};
  if (!map) return view;
  view.data = map->data_ptr();
  view.type = type_of(*map);
  for (int d = 0; d < 3; ++d) view.stride[d] = map->stride(d);
  return view;
}

}  // namespace fastmt
