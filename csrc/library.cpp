// The schemas of the operations and their CPU implementations, through PyTorch's stable ABI.
#include <string>
#include <tuple>

#include "cpu/host.h"

namespace fastmt {

using Size = std::optional<std::vector<int64_t>>;

std::tuple<Tensor, Tensor> softmax_confidence(const std::vector<Tensor>&, int64_t, double,
                                              const Size&, bool);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> consistency_loss(
    const Tensor&, const std::vector<Tensor>&, const Tensor&, const std::optional<Tensor>&,
    const std::optional<Tensor>&, const std::vector<int64_t>&, double, const Size&, bool, bool);
std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy(
    const Tensor&, const Tensor&, const std::optional<Tensor>&, const std::optional<Tensor>&,
    const std::vector<int64_t>&, double, bool, bool);
void ema_update_(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&);
void scale_(Tensor, const Tensor&, const Tensor&);

std::string instruction_set() { return kernels().name; }

}  // namespace fastmt

STABLE_TORCH_LIBRARY(fastmt, m) {
  m.def("instruction_set() -> str");
  m.def(
      "softmax_confidence(Tensor[] logits, int kind, float inverse_temperature, SymInt[]? size,"
      " bool align_corners) -> (Tensor score, Tensor label)");
  m.def(
      "consistency_loss(Tensor student, Tensor[] teacher, Tensor threshold, Tensor? pixel_weight,"
      " Tensor? valid, int[] options, float inverse_temperature, SymInt[]? size, bool align_corners,"
      " bool wants_gradient)"
      " -> (Tensor loss, Tensor selected, Tensor mean_score, Tensor scale, Tensor gradient)");
  m.def(
      "cross_entropy(Tensor logits, Tensor labels, Tensor? pixel_weight, Tensor? class_weight,"
      " int[] options, float label_smoothing, bool align_corners, bool wants_gradient)"
      " -> (Tensor loss, Tensor scale, Tensor gradient, Tensor wrong)");
  // Writes the teachers whose addresses the table holds, which no schema can say: a graph calls
  // ema_update_traced_ of fastmt/ema.py instead, which names them.
  m.def("ema_update_(Tensor table, Tensor starts, Tensor decays, Tensor? draws=None) -> ()");
  m.def("scale_(Tensor(a!) data, Tensor scale, Tensor factor) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastmt, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&fastmt::instruction_set));
}

STABLE_TORCH_LIBRARY_IMPL(fastmt, CPU, m) {
  m.impl("softmax_confidence", TORCH_BOX(&fastmt::softmax_confidence));
  m.impl("consistency_loss", TORCH_BOX(&fastmt::consistency_loss));
  m.impl("cross_entropy", TORCH_BOX(&fastmt::cross_entropy));
  m.impl("ema_update_", TORCH_BOX(&fastmt::ema_update_));
  m.impl("scale_", TORCH_BOX(&fastmt::scale_));
}
