#include "cuda/confidence_kernel.h"

#include <stdexcept>

namespace fastmt::cuda {

namespace {

template <int C>
void start(ConfidenceCells call, Stream stream) {
  call.cells.shared = shared_of(call.cells, 0);
  const int64_t bytes = call.cells.shared.end * int64_t(sizeof(float));
  launch(cells_confidence_kernel<C>, call.cells.blocks(), call.cells.tile, bytes, stream, call);
}

}  // namespace

void launch_confidence(const ConfidenceCells& call, Stream stream) {
  if (call.cells.blocks() == 0) return;
  if (call.cells.classes == 19)
    start<19>(call, stream);
  else if (call.cells.classes == 21)
    start<21>(call, stream);
  else
    throw std::runtime_error("fastmt: no CUDA C++ kernel for this number of classes");
}

}  // namespace fastmt::cuda
