#include "cuda/consistency_kernel.h"
#include "cuda/join_kernel.h"

namespace fastmt::cuda {

namespace {

template <int C>
auto kernel_of(const ConsistencyCells& call) {
  const Loss loss = Loss(call.loss);
  if (loss == Loss::bce) return cells_consistency_loop_kernel;
  if (Kind(call.kind) == Kind::entropy || call.members > 1)
    return cells_consistency_logits_kernel<C>;
  if (loss == Loss::mse) return cells_consistency_powers_kernel<C>;
  if (loss == Loss::ce) return cells_consistency_ce_powers_kernel<C>;
  return cells_consistency_logits_kernel<C>;
}

}  // namespace

void launch_consistency(const ConsistencyCells& call, const Grid& gradient, const Finish& finish,
                        Stream stream) {
  const Cells& cells = call.cells;
  const auto kernel = cells.classes == 19   ? kernel_of<19>(call)
                      : cells.classes == 21 ? kernel_of<21>(call)
                                            : cells_consistency_loop_kernel;
  if (cells.blocks() > 0)
    launch(kernel, cells.blocks(), cells.tile, shared_bytes(cells, 2 * cells.classes), stream,
           call);
  launch_join<FinishConsistency>({cells, gradient, finish, nullptr}, stream);
}

}  // namespace fastmt::cuda
