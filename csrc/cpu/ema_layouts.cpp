// Whether tensors of any device lie where they did: what a table of their addresses depends on.
#include <atomic>
#include <vector>

#include "cpu/ema_held.h"
#include "cpu/registry.h"
#include "exported.h"

namespace fastmt {

namespace {

struct Layouts {
  std::vector<Tensor> owned;
  std::vector<Held> tensors;
  std::vector<int64_t> sizes_and_strides;
  std::atomic<bool> moved{false};  // ever
  std::mutex lock;
};

Registry<Layouts> registry;

}  // namespace

// Holds tensors that have memory until ema_release_layouts; returns the key.
int64_t ema_hold_layouts(const std::vector<Tensor>& tensors) {
  auto layouts = std::make_shared<Layouts>();
  layouts->owned = tensors;
  for (const Tensor& tensor : tensors) {
    layouts->tensors.push_back(described(tensor, layouts->sizes_and_strides));
    layouts->tensors.back().pointer = tensor.mutable_data_ptr();
  }
  return registry.add(std::move(layouts));
}

void ema_release_layouts(int64_t key) { registry.release(key); }

}  // namespace fastmt

// False, from then on, where a tensor has another address or layout than when it was first held; false
// also where something was thrown, which must not pass through C.
FASTMT_EXPORTED bool fastmt_ema_layouts_hold(int64_t key) {
  try {
    const auto layouts = fastmt::registry.find(key);
    const std::lock_guard<std::mutex> guard(layouts->lock);
    if (!fastmt::all_hold(layouts->tensors, layouts->sizes_and_strides, layouts->moved, false))
      layouts->moved = true;
    return !layouts->moved;
  } catch (...) {
    return false;
  }
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastmt, m) {
  m.def("ema_hold_layouts(Tensor[] tensors) -> int");
  m.def("ema_release_layouts(int key) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastmt, CompositeExplicitAutograd, m) {
  m.impl("ema_hold_layouts", TORCH_BOX(&fastmt::ema_hold_layouts));
  m.impl("ema_release_layouts", TORCH_BOX(&fastmt::ema_release_layouts));
}
