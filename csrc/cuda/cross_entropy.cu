#include "cuda/cross_entropy_kernel.h"
#include "cuda/join_kernel.h"

namespace fastmt::cuda {

namespace {

template <int C>
auto kernel_of(const CrossEntropyCells& call) {
  return is_plain(call) ? cells_cross_entropy_powers_kernel<C>
                        : cells_cross_entropy_logits_kernel<C>;
}

}  // namespace

void launch_cross_entropy(const CrossEntropyCells& call, const Grid& gradient, const Finish& finish,
                          Stream stream) {
  const Cells& cells = call.cells;
  const auto kernel = cells.classes == 19   ? kernel_of<19>(call)
                      : cells.classes == 21 ? kernel_of<21>(call)
                                            : cells_cross_entropy_loop_kernel;
  const int rows = is_fixed(cells.classes) ? 2 * cells.classes : cells.classes;
  if (cells.blocks() > 0)
    launch(kernel, cells.blocks(), cells.tile, shared_bytes(cells, rows), stream, call);
  launch_join<FinishCrossEntropy>({cells, gradient, finish, call.wrong_label}, stream);
}

}  // namespace fastmt::cuda
