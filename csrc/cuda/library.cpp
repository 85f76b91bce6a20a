// The CUDA implementations of the operations whose schemas stand in csrc/library.cpp.
#include "cuda/ops.h"

STABLE_TORCH_LIBRARY_IMPL(fastmt, CUDA, m) {
  m.impl("softmax_confidence", TORCH_BOX(&fastmt::cuda::softmax_confidence));
  m.impl("consistency_loss", TORCH_BOX(&fastmt::cuda::consistency_loss));
  m.impl("cross_entropy", TORCH_BOX(&fastmt::cuda::cross_entropy));
  m.impl("ema_update_", TORCH_BOX(&fastmt::cuda::ema_update_));
  m.impl("scale_", TORCH_BOX(&fastmt::cuda::scale_));
}
