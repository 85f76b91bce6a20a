// The operations of csrc/cuda for tensors on the CPU, in a library of their own.
#include "cuda/ops.h"

namespace fastmt::cuda {

OnDevice::OnDevice(const Tensor&) : stream(nullptr), guard_(nullptr) {}
OnDevice::~OnDevice() {}

}  // namespace fastmt::cuda

STABLE_TORCH_LIBRARY_IMPL(fastmt_cuda_on_host, CPU, m) {
  m.impl("consistency_loss", TORCH_BOX(&fastmt::cuda::consistency_loss));
  m.impl("cross_entropy", TORCH_BOX(&fastmt::cuda::cross_entropy));
  m.impl("ema_update_", TORCH_BOX(&fastmt::cuda::ema_update_));
  m.impl("scale_", TORCH_BOX(&fastmt::cuda::scale_));
}
