// What every operation does around its kernel: describe the operands, share out tiles, allocate.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/calls.h"

namespace fastmt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Type type_of(const Tensor& tensor);

// Refuses integers where kernels compute: what is neither float32 nor bfloat16 they take for float16,
// and would read past the end of bytes.
void check_floating(const char* name, const Tensor& tensor);

// A tensor (N, C, *spatial) with its class dimension, or a map (N, *spatial) without one.
struct Operand {
  View* view;
  const Tensor* tensor;
  bool has_classes;
};

// Fills in the views, and merges the dimensions that are adjacent in memory in all of them.
Pixels describe(const std::vector<Operand>& operands);

// Pixels in a tile: student and teacher buffers of a tile stay in the fast caches.
int tile_size(int64_t classes);

// f(queue) on as many threads as there is work for, each of which takes numbers below `count` until
// there are none. Results must not depend on which thread takes which.
template <class F>
void share_out(int64_t count, const F& f) {
  kernels();  // may throw, and parallel_for would lose the message
  Queue queue{count};
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads < count ? threads : count, 1,
                              [&](int64_t, int64_t) { f(queue); });
}

// f(begin, end) over [0, tiles), in short stretches that are shared out.
template <class F>
void for_each_stretch(int64_t tiles, int64_t stretch, const F& f) {
  share_out((tiles + stretch - 1) / stretch, [&](Queue& stretches) {
    for (int64_t index; (index = stretches.next++) < stretches.count;) {
      const int64_t begin = index * stretch, end = begin + stretch;
      f(begin, end < tiles ? end : tiles);
    }
  });
}

// An uninitialised tensor like `tensor`; a large one uses memory of an earlier result again, or huge
// pages, because the page faults of a fresh gradient cost as much time as the kernel that fills it.
Tensor empty_output_like(const Tensor& tensor);

// Whether a result is gone from the caches before anybody reads it.
bool outgrows_caches(const Tensor& tensor);

// How a gradient is scaled: `inside` the kernel, and by the rest when backward hands it out.
struct GradientScale {
  float inside;
  bool complete;
  double outside(double wanted) const { return complete ? 1 : wanted / double(inside); }
};

// A gradient takes its denominator, the number of pixels, inside where that is known. In float16 it
// would drown in the subnormals before the caller's loss scale lifts it; there only the pixels of
// one low-resolution cell are divided out, so that their sum stays in range, and the `class_share`
// that the kernel multiplies by is left out.
GradientScale gradient_scale(const Tensor& logits, int64_t pixels, bool by_pixels,
                             double class_share = 1);

// 0 where there is nothing to divide by; NaN by infinity, so that the gradient is NaN like the loss.
inline double ratio(double numerator, double denominator) {
  return denominator == 0 ? 0 : numerator / denominator + 0 * denominator;
}

Tensor scalar_tensor(double value);  // float32

}  // namespace fastmt
