#include "cpu/cells_host.h"
#include "cpu/host.h"

namespace fastmt {

namespace {

enum class Normalize : int64_t { all, valid, selected, weight };  // as in fastmt/consistency.py
constexpr int CE = 3, RATIO = 2;  // Loss::ce, which has no sum over classes, and Weight::ratio

struct Maps {
  const std::optional<Tensor>&pixel_weight, &valid;
};

ConsistencySums add(const std::vector<ConsistencySums>& parts) {
  ConsistencySums total{};
  for (const ConsistencySums& part : parts) {
    total.loss += part.loss;
    total.weight += part.weight;
    total.score += part.score;
    total.selected += part.selected;
    total.valid += part.valid;
  }
  return total;
}

ConsistencySums run_dense(ConsistencyCall call, const Tensor& student,
                          const std::vector<Tensor>& teacher, const Maps& maps,
                          const std::optional<Tensor>& gradient) {
  std::vector<View> views(teacher.size());
  std::vector<Operand> operands{{&call.student, &student, true}};
  for (size_t m = 0; m < teacher.size(); ++m) operands.push_back({&views[m], &teacher[m], true});
  if (gradient) operands.push_back({&call.gradient, &*gradient, true});
  if (maps.pixel_weight) operands.push_back({&call.pixel_weight, &*maps.pixel_weight, false});
  if (maps.valid) operands.push_back({&call.valid, &*maps.valid, false});
  call.pixels = describe(operands);
  call.gradient.streams = gradient && outgrows_caches(*gradient);
  call.teacher = views.data();
  call.tile = tile_size(call.classes);
  const int64_t tiles = (call.pixels.count + call.tile - 1) / call.tile;
  std::vector<ConsistencySums> sums(tiles);
  call.sums = sums.data();
  for_each_stretch(tiles, 16, [&](int64_t begin, int64_t end) {
    kernels().consistency(call, begin, end);
  });
  return add(sums);
}

ConsistencySums run_cells(ConsistencyCall call, const Tensor& student,
                          const std::vector<Tensor>& teacher, const Maps& maps,
                          const std::optional<Tensor>& gradient, const std::vector<int64_t>& size,
                          bool align_corners) {
  CellTables tables(student, teacher, size[0], size[1], align_corners);
  if (gradient) {
    tables.make_edges(student);
    call.gradient = image_view(*gradient);
  }
  call.pixel_weight = map_view(maps.pixel_weight);
  call.valid = map_view(maps.valid);
  std::vector<ConsistencySums> sums(tables.groups());
  call.sums = sums.data();
  share_out(tables.groups(),
            [&](Queue& groups) { kernels().cells_consistency(call, tables.cells, groups); });
  if (gradient)
    for_each_stretch(tables.groups(), 4, [&](int64_t begin, int64_t end) {
      kernels().cells_join(call.gradient, tables.cells, begin, end);
    });
  return add(sums);
}

int64_t pixel_count(const Tensor& student, const std::optional<std::vector<int64_t>>& size) {
  int64_t count = student.size(0);
  for (int64_t d = 2; d < student.dim(); ++d) count *= size ? (*size)[d - 2] : student.size(d);
  return count;
}

}  // namespace

// (loss, selected, mean_score, scale, gradient): d loss / d student is scale * gradient.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> consistency_loss(
    const Tensor& student, const std::vector<Tensor>& teacher, const Tensor& threshold,
    const std::optional<Tensor>& pixel_weight, const std::optional<Tensor>& valid,
    const std::vector<int64_t>& options, double inverse_temperature,
    const std::optional<std::vector<int64_t>>& size, bool align_corners, bool wants_gradient) {
  check_floating("student", student);
  for (const Tensor& member : teacher) check_floating("teacher", member);
  if (pixel_weight) check_floating("pixel_weight", *pixel_weight);
  ConsistencyCall call{};
  call.members = int(teacher.size());
  call.classes = int(student.size(1));
  call.loss = int(options[0]);
  const bool mean = options[1] != 0 && call.loss != CE;
  call.class_share = mean ? 1 / float(student.size(1)) : 1;
  call.kind = int(options[2]);
  call.weight = int(options[3]);
  call.strict = options[4] != 0;
  const auto normalize = Normalize(options[5]);
  call.inverse_temperature = float(inverse_temperature);
  call.threshold = static_cast<const float*>(threshold.data_ptr());
  call.threshold_by_label = threshold.numel() > 1;

  const int64_t pixels = pixel_count(student, size);
  const bool known = (normalize == Normalize::all || (normalize == Normalize::valid && !valid)) &&
                     call.weight != RATIO;
  const GradientScale scale = gradient_scale(student, pixels, known, call.class_share);
  call.gradient_scale = scale.inside;

  std::optional<Tensor> gradient;
  if (wants_gradient) gradient = empty_output_like(student);
  ConsistencySums total{};
  if (pixels > 0)
    total = size ? run_cells(call, student, teacher, {pixel_weight, valid}, gradient, *size,
                             align_corners)
                 : run_dense(call, student, teacher, {pixel_weight, valid}, gradient);

  const double fraction = ratio(double(total.selected), double(total.valid));
  const double factor = call.weight == RATIO ? fraction : 1;
  const double denominator = factor == 0                        ? 0
                             : normalize == Normalize::all      ? double(pixels)
                             : normalize == Normalize::valid    ? double(total.valid)
                             : normalize == Normalize::selected ? double(total.selected)
                                                                : factor * total.weight;
  return {scalar_tensor(ratio(factor * total.loss, denominator)), scalar_tensor(fraction),
          scalar_tensor(ratio(total.score, double(total.valid))),
          scalar_tensor(scale.outside(ratio(factor, denominator))),
          gradient ? *gradient : torch::stable::new_empty(student, {0})};
}

}  // namespace fastmt
