#include "cuda/consistency_kernel.h"
#include "cuda/join_kernel.h"

namespace fastmt::cuda {

namespace {

using Kernel = void (*)(ConsistencyCells);

// The kernel that walks powers, where one serves the call.
template <int C>
Kernel powers_of(const ConsistencyCells& call) {
  if (Kind(call.kind) == Kind::entropy || call.members > 1) return nullptr;
  if (Loss(call.loss) == Loss::mse) return cells_consistency_powers_kernel<C>;
  if (Loss(call.loss) == Loss::ce) return cells_consistency_ce_powers_kernel<C>;
  return nullptr;
}

template <int C>
void start_fixed(const ConsistencyCells& call, Stream stream) {
  const int64_t staged = Stage<C>::bytes(call.cells.reach + call.teacher_reach);
  const Kernel powers = powers_of<C>(call);
  if (powers && shared_bytes(call.cells, C) + staged <= shared_memory_of_block())
    launch_cells(powers, call, C, staged, stream);
  else
    launch_cells(cells_consistency_logits_kernel<C>, call, 2 * C, 0, stream);
}

}  // namespace

void launch_consistency(const ConsistencyCells& call, const Grid& gradient, const Finish& finish,
                        Stream stream) {
  const Cells& cells = call.cells;
  const int fixed = Loss(call.loss) == Loss::bce ? 0 : cells.classes;
  if (cells.blocks() > 0) {
    if (fixed == 19)
      start_fixed<19>(call, stream);
    else if (fixed == 21)
      start_fixed<21>(call, stream);
    else
      launch_cells(cells_consistency_loop_kernel, call, 2 * cells.classes, 0, stream);
  }
  launch_join<FinishConsistency>({cells, gradient, finish}, stream);
}

}  // namespace fastmt::cuda
