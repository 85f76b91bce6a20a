#include "cuda/host.h"

namespace fastmt::cuda {

std::tuple<Tensor, Tensor> softmax_confidence(const std::vector<Tensor>& logits, int64_t kind,
                                              double inverse_temperature, const Size& size,
                                              bool align_corners) {
  STD_TORCH_CHECK(size && size->size() == 2,
                  "softmax_confidence: the CUDA C++ kernels serve 2-D logits that they up-sample");
  STD_TORCH_CHECK(logits.size() == 1,
                  "softmax_confidence: the CUDA C++ kernels score one teacher");
  const Tensor& teacher = logits[0];
  const OnDevice device(teacher);
  const int64_t height = (*size)[0], width = (*size)[1];
  ConfidenceCells call{};
  call.cells.first = grid_of(teacher, height, width, align_corners);
  call.kind = int32_t(kind);
  call.inverse_temperature = float(inverse_temperature);
  share_out(call.cells, teacher, 1, 0);

  const std::vector<int64_t> out{teacher.size(0), height, width};
  const Tensor score = torch::stable::new_empty(teacher, out, ScalarType::Float);
  const Tensor label = torch::stable::new_empty(teacher, out, ScalarType::Long);
  call.score = data_of<float>(score);
  call.label = data_of<int64_t>(label);
  launch_confidence(call, device.stream);
  return {score, label};
}

}  // namespace fastmt::cuda
