#include "cuda/cross_entropy_kernel.h"
#include "cuda/join_kernel.h"

namespace fastmt::cuda {

namespace {

using Kernel = void (*)(CrossEntropyCells);

void start(Kernel kernel, const CrossEntropyCells& call, int64_t bytes, Stream stream) {
  launch(kernel, call.cells.blocks(), call.cells.tile, bytes, stream, call);
}

template <int C>
void start_fixed(const CrossEntropyCells& call, Stream stream) {
  const int64_t bytes = shared_bytes(call.cells, 2 * C);
  const int64_t staged = bytes + Stage<C>::bytes(call.cells.reach);
  if (is_plain(call) && staged <= shared_memory_of_block())
    start(cells_cross_entropy_powers_kernel<C>, call, staged, stream);
  else
    start(cells_cross_entropy_logits_kernel<C>, call, bytes, stream);
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
      start(cells_cross_entropy_loop_kernel, call, shared_bytes(cells, cells.classes), stream);
  }
  launch_join<FinishCrossEntropy>({cells, gradient, finish}, stream);
}

}  // namespace fastmt::cuda
