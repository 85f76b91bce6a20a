#include <algorithm>
#include <cmath>
#include <numeric>

#include "cpu/cells_host.h"
#include "cpu/host.h"

namespace fastmt {

namespace {

enum class Normalize : int64_t { all, valid, weight };  // as in fastmt/cross_entropy.py

CrossEntropySums add(const std::vector<CrossEntropySums>& parts) {
  CrossEntropySums total{};
  for (const CrossEntropySums& part : parts) {
    total.loss += part.loss;
    total.weight += part.weight;
    total.valid += part.valid;
    total.wrong += part.wrong;
  }
  return total;
}

double denominator_of(Normalize normalize, int64_t pixels, const CrossEntropySums& total) {
  if (normalize == Normalize::all) return double(pixels);
  return normalize == Normalize::valid ? double(total.valid) : total.weight;
}

using Kernel = void (*)(const CrossEntropyCall&, int64_t begin_tile, int64_t end_tile);

CrossEntropySums add_tiles(Kernel kernel, CrossEntropyCall& call) {
  const int64_t tiles = (call.pixels.count + call.tile - 1) / call.tile;
  std::vector<CrossEntropySums> sums(tiles);
  call.sums = sums.data();
  for_each_stretch(tiles, 16, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  return add(sums);
}

// A denominator that takes the labels alone is found before the logits are read, so that the
// gradient is written as it is handed out: the backward pass would read and write it again. Not one
// that is not finite, or 0: that has to reach also the pixels without a weight, or whose logits are
// not finite.
GradientScale scale_by_labels(CrossEntropyCall& call, Normalize normalize, GradientScale otherwise) {
  const CrossEntropySums total = add_tiles(kernels().label_sums, call);
  const double inside = ratio(1, denominator_of(normalize, call.pixels.count, total));
  return std::isfinite(inside) && inside != 0 ? GradientScale{float(inside), true} : otherwise;
}

CrossEntropySums run_dense(CrossEntropyCall call, const Tensor& logits, const Tensor& labels,
                           const std::optional<Tensor>& pixel_weight,
                           const std::optional<Tensor>& gradient, Normalize normalize,
                           GradientScale& scale) {
  std::vector<Operand> operands{{&call.logits, &logits, true}, {&call.labels, &labels, false}};
  if (gradient) operands.push_back({&call.gradient, &*gradient, true});
  if (pixel_weight) operands.push_back({&call.pixel_weight, &*pixel_weight, false});
  call.pixels = describe(operands);
  call.gradient.streams = gradient && outgrows_caches(*gradient);
  call.tile = tile_size(call.classes);
  if (gradient && !scale.complete && type_of(logits) != Type::float16)
    scale = scale_by_labels(call, normalize, scale);
  call.gradient_scale = scale.inside;
  return add_tiles(kernels().cross_entropy, call);
}

CrossEntropySums run_cells(CrossEntropyCall call, const Tensor& logits, const Tensor& labels,
                           const std::optional<Tensor>& pixel_weight,
                           const std::optional<Tensor>& gradient, bool align_corners) {
  CellTables tables(logits, {}, labels.size(1), labels.size(2), align_corners);
  if (gradient) {
    tables.make_edges(logits);
    call.gradient = image_view(*gradient);
  }
  call.labels = map_view(labels);
  call.pixel_weight = map_view(pixel_weight);
  std::vector<CrossEntropySums> sums(tables.groups());
  call.sums = sums.data();
  share_out(tables.groups(),
            [&](Queue& groups) { kernels().cells_cross_entropy(call, tables.cells, groups); });
  if (gradient)
    for_each_stretch(tables.groups(), 4, [&](int64_t begin, int64_t end) {
      kernels().cells_join(call.gradient, tables.cells, begin, end);
    });
  return add(sums);
}

float mean_of(const float* class_weight, int classes) {
  if (!class_weight) return 1;
  return float(std::accumulate(class_weight, class_weight + classes, 0.0) / classes);
}

bool any_of(const float* class_weight, int classes) {
  return std::any_of(class_weight, class_weight + classes, [](float w) { return w != 0; });
}

bool same_size(const Tensor& logits, const Tensor& labels) {
  for (int64_t d = 1; d < labels.dim(); ++d)
    if (labels.size(d) != logits.size(d + 1)) return false;
  return true;
}

}  // namespace

// (loss, scale, gradient, labels out of range): d loss / d logits is scale * gradient.
std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy(
    const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& pixel_weight,
    const std::optional<Tensor>& class_weight, const std::vector<int64_t>& options,
    double label_smoothing, bool align_corners, bool wants_gradient) {
  check_floating("logits", logits);
  if (pixel_weight) check_floating("pixel_weight", *pixel_weight);
  CrossEntropyCall call{};
  call.classes = int(logits.size(1));
  call.class_weight = class_weight ? static_cast<const float*>(class_weight->data_ptr()) : nullptr;
  call.mean_class_weight = mean_of(call.class_weight, call.classes);
  call.ignore_index = options[0];
  const auto normalize = Normalize(options[1]);
  const bool spreads = !call.class_weight || any_of(call.class_weight, call.classes);
  call.label_smoothing = spreads ? float(label_smoothing) : 0.0f;

  const int64_t pixels = labels.numel();
  GradientScale scale = gradient_scale(logits, pixels, normalize == Normalize::all);
  call.gradient_scale = scale.inside;

  std::optional<Tensor> gradient;
  if (wants_gradient) gradient = empty_output_like(logits);
  CrossEntropySums total{};
  if (pixels > 0)
    total = same_size(logits, labels)
                ? run_dense(call, logits, labels, pixel_weight, gradient, normalize, scale)
                : run_cells(call, logits, labels, pixel_weight, gradient, align_corners);

  const double denominator = denominator_of(normalize, pixels, total);
  return {scalar_tensor(ratio(total.loss, denominator)),
          scalar_tensor(scale.outside(ratio(1, denominator))),
          gradient ? *gradient : torch::stable::new_empty(logits, {0}),
          scalar_tensor(double(total.wrong))};
}

}  // namespace fastmt
