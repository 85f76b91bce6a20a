// Tables of a call on cells: where output rows and columns fall between the low-resolution ones.
#pragma once

#include <memory>
#include <vector>

#include "cpu/host.h"

namespace fastmt {

// One axis of a linear interpolation, as F.interpolate defines it.
struct Axis {
  std::vector<int32_t> index;   // of each output position: the lower neighbour, at most size - 2
  std::vector<float> t;         // its distance from there, in [0, 1]
  std::vector<int8_t> side;     // -1 before the first input position, 1 behind the last, else 0
  std::vector<int32_t> origin;  // the output position from which on t has grown by step
  double step;                  // from one output position to the next

  Axis(int64_t size, int64_t out, bool align_corners);
};

// Owns what a Cells points to.
class CellTables {
 public:
  // `first` gives the lanes; `others` may have other resolutions and dtypes.
  CellTables(const Tensor& first, const std::vector<Tensor>& others, int64_t out_height,
             int64_t out_width, bool align_corners);

  Cells cells;
  int64_t groups() const { return cells.images * cells.groups; }
  // Scratch for the rows that groups share; only a call that wants a gradient needs it.
  void make_edges(const Tensor& like);

 private:
  Grid grid_of(const Tensor& logits, bool align_corners);
  void make_lanes(const Axis& columns);
  std::vector<std::vector<std::pair<int32_t, float>>> pixels_of_cells(const Axis& columns,
                                                                      int width) const;
  void make_walk(const float* delta);
  void make_bands(const Axis& rows);

  template <class T>
  T* keep(int64_t count);

  int out_height_, out_width_;
  std::vector<std::unique_ptr<Axis>> axes_;
  std::vector<Grid> grids_;
  std::vector<int32_t> steps_, start_, origin_, band_start_;
  std::vector<std::shared_ptr<void>> kept_;
  Tensor edges_;
};

// Low-resolution logits or their gradient (N, C, height, width) as the cells read and write them.
View image_view(const Tensor& image);

// A map (N, height, width) as the cells read it.
View map_view(const std::optional<Tensor>& map);

}  // namespace fastmt
