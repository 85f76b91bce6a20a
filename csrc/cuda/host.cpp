#include "cuda/host.h"

#include <limits>

namespace fastmt::cuda {

namespace {

Axis axis_of(int64_t size, int64_t out, bool align_corners) {
  STD_TORCH_CHECK(
      size <= std::numeric_limits<int32_t>::max() && out <= std::numeric_limits<int32_t>::max(),
      "a side of more than 2^31 pixels");
  Axis axis{};
  axis.scale = align_corners ? size - 1 : 2 * size;
  axis.offset = align_corners ? 0 : size - out;
  axis.divisor = align_corners ? (out > 1 ? out - 1 : 1) : 2 * out;
  axis.per_scale = axis.scale ? 1 / double(axis.scale) : 0;
  axis.per_divisor = 1 / double(axis.divisor);
  axis.size = int32_t(size);
  axis.out = int32_t(out);
  return axis;
}

}  // namespace

Grid grid_of(const Tensor& logits, int64_t out_height, int64_t out_width, bool align_corners) {
  Grid grid{};
  grid.data = logits.data_ptr();
  grid.image = logits.stride(0);
  grid.channel = logits.stride(1);
  grid.row = logits.stride(2);
  grid.column = logits.stride(3);
  grid.rows = axis_of(logits.size(2), out_height, align_corners);
  grid.columns = axis_of(logits.size(3), out_width, align_corners);
  grid.type = type_of(logits);
  return grid;
}

Map map_of(const std::optional<Tensor>& map) {
  if (!map) return {};
  return {map->data_ptr(), map->stride(0), map->stride(1), map->stride(2), type_of(*map)};
}

Tensor scalar_like(const Tensor& tensor) {
  return torch::stable::new_empty(tensor, {}, ScalarType::Float);
}

void share_out(Cells& cells, const Tensor& like, int grids, int columns) {
  cells.images = like.size(0);
  cells.classes = int32_t(like.size(1));
  cells.grids = grids;
  plan(cells, columns);
  STD_TORCH_CHECK(cells.blocks() <= std::numeric_limits<int32_t>::max(),
                  "more than 2^31 blocks of a launch");
}

Scratch::Scratch(Cells& cells, const Tensor& like, int grids, int columns, bool wants_gradient) {
  share_out(cells, like, grids, columns);
  const int64_t blocks = cells.blocks();
  sums = torch::stable::new_empty(like, {QUANTITIES, blocks}, ScalarType::Float);
  cells.sums = data_of<float>(*sums);
  if (!wants_gradient) return;
  const std::vector<int64_t> shape{blocks, cells.levels(), cells.reach, cells.classes};
  partial = torch::stable::new_empty(like, shape, ScalarType::Float);
  cells.partial = data_of<float>(*partial);
}

Gradient::Gradient(const Tensor& logits, const Grid& like, bool wanted)
    : tensor(wanted ? torch::stable::empty_like(logits) : torch::stable::new_empty(logits, {0})),
      grid(like) {
  grid.data = nullptr;
  if (!wanted) return;
  const auto strides = tensor.strides();
  grid.data = tensor.data_ptr();
  grid.image = strides[0];
  grid.channel = strides[1];
  grid.row = strides[2];
  grid.column = strides[3];
}

Finish finish_of(const Tensor& loss, const Tensor& scale, int normalize, int64_t pixels,
                 const GradientScale& gradient_scale) {
  Finish finish{};
  finish.normalize = normalize;
  finish.pixels = pixels;
  finish.inside = gradient_scale.inside;
  finish.complete = gradient_scale.complete;
  finish.loss = data_of<float>(loss);
  finish.scale = data_of<float>(scale);
  return finish;
}

}  // namespace fastmt::cuda
