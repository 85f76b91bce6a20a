#include "cpu/cells_host.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace fastmt {

namespace {

// A progression starts afresh every few pixels, so that the rounding of a product does not grow with
// the scale.
constexpr int LONGEST = 8;

bool is_even(float t, float before, double step) {
  constexpr double rounding = 1e-6;
  return std::abs(double(t) - (double(before) + step)) <= rounding;
}

}  // namespace

Axis::Axis(int64_t size, int64_t out, bool align_corners)
    : step(!align_corners ? double(size) / double(out)
           : out > 1      ? double(size - 1) / double(out - 1)
                          : 0) {
  const int64_t highest = std::max<int64_t>(size - 2, 0);
  // Positions in whole parts of a low-resolution one: rounded, one that falls on a logit would give
  // a little weight to the next, which may hold a NaN.
  const int64_t unit = align_corners ? std::max<int64_t>(out - 1, 1) : 2 * out;
  for (int64_t o = 0; o < out; ++o) {
    const int64_t place = align_corners ? o * (size - 1) : (2 * o + 1) * size - out;
    const int64_t clamped = std::clamp<int64_t>(place, 0, (size - 1) * unit);
    const int64_t lower = std::min(clamped / unit, highest);
    index.push_back(int32_t(lower));
    t.push_back(float(double(clamped - lower * unit) / double(unit)));
    side.push_back(place < 0 ? -1 : place > (size - 1) * unit ? 1 : 0);
  }
  for (int64_t o = 0; o < out; ++o) {
    const bool follows = o > 0 && index[o] == index[o - 1] && is_even(t[o], t[o - 1], step) &&
                         o < origin[o - 1] + LONGEST;
    origin.push_back(follows ? origin[o - 1] : int32_t(o));
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
  grid.row_delta = float(rows.step);
  grid.row_origin = rows.origin.data();
  return grid;
}

template <class T>
T* CellTables::keep(int64_t count) {
  const int64_t bytes = (count * int64_t(sizeof(T)) + 63) / 64 * 64;
  kept_.emplace_back(std::aligned_alloc(64, bytes), std::free);
  return static_cast<T*>(kept_.back().get());
}

void CellTables::make_lanes(const Axis& columns) {
  const int lanes = kernels().lanes, chunk = lanes / 2, width = cells.first.width;
  const auto of_cell = pixels_of_cells(columns, width);
  int32_t entries = 0;
  for (int x = 0; x < width; x += chunk) {
    size_t longest = 0;
    for (int cell = x; cell < std::min(x + chunk, width); ++cell)
      longest = std::max(longest, (of_cell[cell].size() + 1) / 2);
    start_.push_back(entries);
    steps_.push_back(int32_t(longest));
    entries += int32_t(longest);
  }
  auto* column = keep<int32_t>(int64_t(entries) * lanes);
  auto* t = keep<float>(int64_t(entries) * lanes);
  std::fill_n(column, int64_t(entries) * lanes, -1);
  std::fill_n(t, int64_t(entries) * lanes, 0.0f);
  for (int cell = 0; cell < width; ++cell) {
    int64_t at = int64_t(start_[cell / chunk]) * lanes + cell % chunk;
    for (const auto& [output, fraction] : of_cell[cell]) {
      column[at] = output;
      t[at] = fraction;
      at += chunk;
    }
  }
  auto* delta = keep<float>(int64_t(steps_.size()) * chunk);
  std::fill_n(delta, int64_t(steps_.size()) * chunk, float(columns.step));
  delta[width - 1] = 0;  // beyond the borders the logits stay the same
  cells.lanes = {int(steps_.size()), steps_.data(), start_.data(), column, t, nullptr, delta};
  make_walk(delta);
}

// Output column and t of the pixels of each cell. The right one of each two lies evenly behind the
// left one: where it would not, there is a column -1.
std::vector<std::vector<std::pair<int32_t, float>>> CellTables::pixels_of_cells(
    const Axis& columns, int width) const {
  std::vector<std::vector<std::pair<int32_t, float>>> of_cell(width);
  for (int32_t o = 0; o < out_width_; ++o) {
    const bool inside = columns.side[o] == 0;
    const float t = inside ? columns.t[o] : columns.side[o] < 0 ? 1.0f : 0.0f;
    const int at = inside ? columns.index[o] : width - 1;
    auto& cell = of_cell[at];
    const double delta = at == width - 1 ? 0 : columns.step;
    if (cell.size() % 2 && !is_even(t, cell.back().second, delta)) cell.push_back({-1, t});
    cell.push_back({o, t});
  }
  return of_cell;
}

void CellTables::make_walk(const float* delta) {
  const int lanes = kernels().lanes, chunk = lanes / 2;
  const Lanes& table = cells.lanes;
  for (int k = 0; k < table.chunks; ++k)
    for (int s = 0; s < table.steps[k]; ++s) {
      bool follows = s % (LONGEST / 2) != 0;
      const int64_t entry = int64_t(table.start[k] + s) * lanes;
      for (int64_t i = entry; follows && i < entry + chunk; ++i)
        follows = table.column[i] < 0 ||
                  is_even(table.t[i], table.t[i - lanes], 2 * delta[k * chunk + i - entry]);
      origin_.push_back(follows ? origin_.back() : s);
    }
  cells.lanes.origin = origin_.data();
}

void CellTables::make_bands(const Axis& rows) {
  cells.bands = std::max(cells.first.height - 1, 1);
  band_start_.assign(cells.bands + 1, 0);
  for (int32_t index : rows.index) ++band_start_[index + 1];
  for (int band = 0; band < cells.bands; ++band) band_start_[band + 1] += band_start_[band];
  cells.band_start = band_start_.data();
  // Larger groups share fewer rows; smaller ones feed more threads. The shape alone decides.
  constexpr int64_t enough = 256;  // groups of all images
  const int in_many = int(std::min<int64_t>(cells.images * cells.bands / enough, cells.bands));
  cells.bands_in_group = std::max(std::clamp(cells.bands / 16, 1, 8), in_many);
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
