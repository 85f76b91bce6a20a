// What every CUDA operation does around its kernels: describe the operands, allocate, find the
// stream.
#pragma once

#include "cpu/host.h"
#include "cuda/calls.h"

namespace fastmt::cuda {

using Size = std::optional<std::vector<int64_t>>;

// Makes the device of a tensor the current one, and knows its current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor);
  ~OnDevice();
  Stream stream;

 private:
  void* guard_;
};

// Logits (N, C, height, width), or their gradient, that are up-sampled to an output size.
Grid grid_of(const Tensor& logits, int64_t out_height, int64_t out_width, bool align_corners);

// A map (N, height, width), or none.
Map map_of(const std::optional<Tensor>& map);

Tensor scalar_like(const Tensor& tensor);  // float32

// Shares the cells of a call out among blocks; `columns` of C values a thread stay on the chip.
void share_out(Cells& cells, const Tensor& like, int grids, int columns);

// The scratch of a call, at low resolution.
struct Scratch {
  std::optional<Tensor> partial, sums;

  // Shares `cells` out too.
  Scratch(Cells& cells, const Tensor& like, int grids, int columns, bool wants_gradient);
};

// An uninitialised gradient, laid out like the logits, and how the join kernel writes to it.
struct Gradient {
  Tensor tensor;
  Grid grid;

  Gradient(const Tensor& logits, const Grid& like, bool wanted);
};

Finish finish_of(const Tensor& loss, const Tensor& scale, int normalize, int64_t pixels,
                 const GradientScale& gradient_scale);

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

}  // namespace fastmt::cuda
