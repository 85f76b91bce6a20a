#include "cuda/confidence_kernel.h"

#include <stdexcept>

namespace fastmt::cuda {

void launch_confidence(const ConfidenceCells& call, Stream stream) {
  if (call.cells.blocks() == 0) return;
  if (call.cells.classes == 19)
    launch_cells(cells_confidence_kernel<19>, call, 0, 0, stream);
  else if (call.cells.classes == 21)
    launch_cells(cells_confidence_kernel<21>, call, 0, 0, stream);
  else
    throw std::runtime_error("fastmt: no CUDA C++ kernel for this number of classes");
}

}  // namespace fastmt::cuda
