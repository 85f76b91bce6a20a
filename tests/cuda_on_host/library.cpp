// The operations of csrc/cuda for tensors on the CPU, in a library of their own.
#include <utility>

#include "cuda/device.h"
#include "cuda/ops.h"

namespace fastmt::cuda {

OnDevice::OnDevice(const Tensor&) : stream(nullptr), guard_(nullptr) {}
OnDevice::~OnDevice() {}

// Of any launch since the last call.
int64_t most_shared_bytes() { return std::exchange(cuda_on_host::most_shared_bytes, 0); }

// Blocks share no more bands than leave so many of them; 0 for as many as they can.
void keep_busy(int64_t blocks) { cuda_on_host::busy_blocks = blocks; }

}  // namespace fastmt::cuda

STABLE_TORCH_LIBRARY_IMPL(fastmt_cuda_on_host, CPU, m) {
  m.impl("softmax_confidence", TORCH_BOX(&fastmt::cuda::softmax_confidence));
  m.impl("consistency_loss", TORCH_BOX(&fastmt::cuda::consistency_loss));
  m.impl("cross_entropy", TORCH_BOX(&fastmt::cuda::cross_entropy));
  m.impl("ema_update_", TORCH_BOX(&fastmt::cuda::ema_update_));
  m.impl("scale_", TORCH_BOX(&fastmt::cuda::scale_));
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastmt_cuda_on_host, m) {
  m.def("most_shared_bytes() -> int");
  m.def("keep_busy(int blocks) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastmt_cuda_on_host, CompositeExplicitAutograd, m) {
  m.impl("most_shared_bytes", TORCH_BOX(&fastmt::cuda::most_shared_bytes));
  m.impl("keep_busy", TORCH_BOX(&fastmt::cuda::keep_busy));
}
