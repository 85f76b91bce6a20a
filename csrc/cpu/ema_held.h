// Tensors that are held from one update to the next, and what shows that they have kept their layout.
#pragma once

#include <atomic>
#include <vector>

#include "cpu/host.h"

namespace fastmt {

// A tensor, and the layout that it had when it was bound. Whoever holds it keeps it alive.
struct Held {
  AtenTensorHandle handle;  // null while it is not held
  void* pointer;
  const void* const* record;  // of PyTorch, to be fetched ahead; null where it is not known
  int64_t layout;             // where in `layouts` its sizes start, then strides
  int32_t dtype, rank;
};

// Appends the tensor's sizes and strides to `layouts`.
Held described(const Tensor& tensor, std::vector<int64_t>& layouts);

// Where the tensor's storage begins.
const char* storage_of(const Held& held);

// Reads the pointer anew, and sets `moved` where it is another than before. False where the tensor has
// another layout than it was bound with, or not the memory for it.
bool holds(Held& held, const std::vector<int64_t>& layouts, std::atomic<bool>& moved);

// The same of all that have a handle; `moved` also on the way to false. Many tensors are shared out to
// the threads if a kernel that needs these follows anyway; the first ones stay near to this thread.
bool all_hold(std::vector<Held>& tensors, const std::vector<int64_t>& layouts,
              std::atomic<bool>& moved, bool share);

}  // namespace fastmt
