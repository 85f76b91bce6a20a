#include "cuda/ema_kernel.h"

namespace fastmt::cuda {

namespace {

// Four are there at once; who is done early makes room for the next.
constexpr int BLOCKS_OF_PROCESSOR = 16;

}  // namespace

void launch_ema(const EmaCall& call, Stream stream) {
  const auto kernel = call.draws ? ema_rounding_kernel : ema_kernel;
  launch(kernel, processors() * BLOCKS_OF_PROCESSOR, EMA_THREADS, 0, stream, call);
}

void launch_scale(const ScaleCall& call, Stream stream) {
  const int64_t pieces = (call.count + PIECE - 1) / PIECE,
                most = processors() * BLOCKS_OF_PROCESSOR;
  launch(scale_kernel, pieces < most ? pieces : most, EMA_THREADS, 0, stream, call);
}

}  // namespace fastmt::cuda
