#include "cuda/host.h"

namespace fastmt::cuda {

namespace {

enum Normalize { all, valid, selected, weight };
constexpr int CE = 3, RATIO = 2;  // loss="ce", which has no sum over classes, and weight="ratio"

}  // namespace

// (loss, selected, mean_score, scale, gradient): d loss / d student is scale * gradient.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> consistency_loss(
    const Tensor& student, const std::vector<Tensor>& teacher, const Tensor& threshold,
    const std::optional<Tensor>& pixel_weight, const std::optional<Tensor>& valid,
    const std::vector<int64_t>& options, double inverse_temperature, const Size& size,
    bool align_corners, bool wants_gradient) {
  STD_TORCH_CHECK(size && size->size() == 2,
                  "consistency_loss: the CUDA C++ kernels serve 2-D logits that they up-sample");
  STD_TORCH_CHECK(teacher.size() <= MAX_TEACHERS, "consistency_loss: more than ", MAX_TEACHERS,
                  " teachers");
  STD_TORCH_CHECK(threshold.is_cpu() == student.is_cpu(),
                  "threshold: a tensor on the CPU, expected the device of student");
  const OnDevice device(student);
  const int64_t height = (*size)[0], width = (*size)[1];
  ConsistencyCells call{};
  call.cells.first = grid_of(student, height, width, align_corners);
  call.members = int32_t(teacher.size());
  for (size_t m = 0; m < teacher.size(); ++m)
    call.teacher[m] = grid_of(teacher[m], height, width, align_corners);
  call.pixel_weight = map_of(pixel_weight);
  call.valid = map_of(valid);
  STD_TORCH_CHECK(!valid || call.valid.type == Type::uint8, "valid: expected bool");
  call.loss = int32_t(options[0]);
  const bool mean = options[1] != 0 && call.loss != CE;
  call.class_share = mean ? 1 / float(student.size(1)) : 1;
  call.kind = int32_t(options[2]);
  call.weight = int32_t(options[3]);
  call.strict = options[4] != 0;
  const int normalize = int(options[5]);
  call.inverse_temperature = float(inverse_temperature);
  call.threshold_by_label = threshold.numel() > 1;
  call.threshold = data_of<const float>(threshold);

  const int64_t pixels = student.size(0) * height * width;
  const bool known = (normalize == Normalize::all || (normalize == Normalize::valid && !valid)) &&
                     call.weight != RATIO;
  const GradientScale scale = gradient_scale(student, pixels, known, call.class_share);
  call.gradient_scale = scale.inside;
  const Gradient gradient(student, call.cells.first, wants_gradient);
  const Scratch scratch(call.cells, student, 1 + call.members, 2, wants_gradient);
  call.teacher_reach = reach_of(call.teacher[0].columns, call.cells.tile);

  const Tensor loss = scalar_like(student), factor = scalar_like(student);
  const Tensor selected = scalar_like(student), mean_score = scalar_like(student);
  Finish finish = finish_of(loss, factor, normalize, pixels, scale);
  finish.ratio = call.weight == RATIO;
  finish.selected = data_of<float>(selected);
  finish.mean_score = data_of<float>(mean_score);
  launch_consistency(call, gradient.grid, finish, device.stream);
  return {loss, selected, mean_score, factor, gradient.tensor};
}

}  // namespace fastmt::cuda
