#include "cuda/cross_entropy_kernel.h"
#include "cuda/join_kernel.h"

namespace fastmt::cuda {

namespace {

template <int C>
void start_fixed(const CrossEntropyCells& call, Stream stream) {
  const int64_t staged = Stage<C>::bytes(call.cells.reach);
  if (is_plain(call) && shared_bytes(call.cells, C) + staged <= shared_memory_of_block())
    launch_cells(cells_cross_entropy_powers_kernel<C>, call, C, staged, stream);
  else
    launch_cells(cells_cross_entropy_logits_kernel<C>, call, 2 * C, 0, stream);
}

}  // namespace

void launch_cross_entropy(const CrossEntropyCells& call, const Grid& gradient, const Finish& finish,
                          Stream stream) {
  const Cells& cells = call.cells;
  if (cells.blocks() > 0) {
    if (cells.classes == 19)
      start_fixed<19>(call, stream);
    else if (cells.classes == 21)
      start_fixed<21>(call, stream);
    else
      launch_cells(cells_cross_entropy_loop_kernel, call, cells.classes, 0, stream);
  }
  launch_join<FinishCrossEntropy>({cells, gradient, finish}, stream);
}

}  // namespace fastmt::cuda
