// The operations that the CUDA library registers, with the schemas of csrc/library.cpp.
#pragma once

#include "cuda/host.h"

namespace fastmt::cuda {

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

}  // namespace fastmt::cuda
