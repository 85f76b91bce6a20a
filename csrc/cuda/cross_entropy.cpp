#include "cuda/host.h"

namespace fastmt::cuda {

namespace {

enum Normalize { all, valid, weight };

}  // namespace

// (loss, scale, gradient, labels out of range): d loss / d logits is scale * gradient. Such a label
// makes loss and scale NaN; its pixel is ignored.
std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy(
    const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& pixel_weight,
    const std::optional<Tensor>& class_weight, const std::vector<int64_t>& options,
    double label_smoothing, bool align_corners, bool wants_gradient) {
  STD_TORCH_CHECK(logits.dim() == 4, "cross_entropy: the CUDA C++ kernels serve 2-D logits");
  const OnDevice device(logits);
  const int64_t height = labels.size(1), width = labels.size(2);
  CrossEntropyCells call{};
  call.cells.first = grid_of(logits, height, width, align_corners);
  call.labels = map_of(labels);
  call.pixel_weight = map_of(pixel_weight);
  call.class_weight = class_weight ? data_of<const float>(*class_weight) : nullptr;
  call.ignore_index = options[0];
  const int normalize = int(options[1]);
  call.label_smoothing = float(label_smoothing);

  const int64_t pixels = labels.numel();
  const GradientScale scale = gradient_scale(logits, pixels, normalize == Normalize::all);
  call.gradient_scale = scale.inside;
  const Gradient gradient(logits, call.cells.first, wants_gradient);
  const Scratch scratch(call.cells, logits, 1, 1, wants_gradient);

  const Tensor loss = scalar_like(logits), factor = scalar_like(logits),
               wrong = scalar_like(logits);
  Finish finish = finish_of(loss, factor, normalize, pixels, scale);
  finish.wrong = data_of<float>(wrong);
  launch_cross_entropy(call, gradient.grid, finish, device.stream);
  return {loss, factor, gradient.tensor, wrong};
}

}  // namespace fastmt::cuda
