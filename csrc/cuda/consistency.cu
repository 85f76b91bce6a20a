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

void start(Kernel kernel, const ConsistencyCells& call, int64_t bytes, Stream stream) {
  launch(kernel, call.cells.blocks(), call.cells.tile, bytes, stream, call);
}

template <int C>
void start_fixed(const ConsistencyCells& call, int64_t bytes, Stream stream) {
  if (const Kernel powers = powers_of<C>(call)) {
    const int64_t staged = bytes + Stage<C>::bytes(call.cells.reach + call.teacher_reach);
    if (staged <= shared_memory_of_block()) return start(powers, call, staged, stream);
  }
  start(cells_consistency_logits_kernel<C>, call, bytes, stream);
}

}  // namespace

void launch_consistency(const ConsistencyCells& call, const Grid& gradient, const Finish& finish,
                        Stream stream) {
  const Cells& cells = call.cells;
  const int64_t bytes = shared_bytes(cells, 2 * cells.classes);
  const int fixed = Loss(call.loss) == Loss::bce ? 0 : cells.classes;
  if (cells.blocks() > 0) {
    if (fixed == 19)
      start_fixed<19>(call, bytes, stream);
    else if (fixed == 21)
      start_fixed<21>(call, bytes, stream);
    else
      start(cells_consistency_loop_kernel, call, bytes, stream);
  }
  launch_join<FinishConsistency>({cells, gradient, finish}, stream);
}

}  // namespace fastmt::cuda
