#include "cpu/ema_held.h"

#include <algorithm>

namespace fastmt {

namespace {

void* pointer_of(AtenTensorHandle tensor) {
  void* pointer = nullptr;
  return aoti_torch_get_data_ptr(tensor, &pointer) ? nullptr : pointer;
}

bool has_memory(const Held& held, const int64_t* bound, const void* at) {
  int64_t last = 0, bytes = 0;
  int32_t device = -1;
  aoti_torch_get_storage_offset(held.handle, &last);
  for (int d = 0; d < held.rank; ++d) {
    if (bound[d] == 0) return true;
    last += (bound[d] - 1) * bound[held.rank + d];
  }
  aoti_torch_get_storage_size(held.handle, &bytes);
  aoti_torch_get_device_type(held.handle, &device);
  const auto size = int64_t(aoti_torch_dtype_element_size(held.dtype));
  return at && device == aoti_torch_device_type_cpu() && (last + 1) * size <= bytes;
}

// Whether a tensor whose data is at `now` has the layout that it was bound with, and its memory.
bool holds(Held& held, const int64_t* bound, void* now, std::atomic<bool>& moved) {
  int32_t dtype = -1;
  int64_t rank = -1, *strides = nullptr, *sizes = nullptr;
  aoti_torch_get_dtype(held.handle, &dtype);
  aoti_torch_get_dim(held.handle, &rank);
  if (dtype != held.dtype || rank != held.rank) return false;
  aoti_torch_get_sizes(held.handle, &sizes);
  aoti_torch_get_strides(held.handle, &strides);
  for (int64_t d = 0; d < rank; ++d)
    if (sizes[d] != bound[d] || strides[d] != bound[rank + d]) return false;
  held.sizes = sizes;
  if (now && now == held.pointer) return true;
  if (!has_memory(held, bound, now)) return false;
  held.pointer = now;
  moved = true;
  return true;
}

// A tensor's record takes three cache lines, its sizes in the middle one. The records of many
// tensors are in no near cache when they are looked at once an update.
void fetch_ahead(const Held& held) {
  const auto middle = reinterpret_cast<uintptr_t>(held.sizes);  // 0 before the first look
  __builtin_prefetch(held.handle);
  for (uintptr_t line : {middle - 64, middle, middle + 64})
    __builtin_prefetch(reinterpret_cast<const void*>(line));
}

}  // namespace

bool all_hold(std::vector<Held>& tensors, const std::vector<int64_t>& layouts,
              std::atomic<bool>& moved, bool share) {
  constexpr int64_t block = 8, stretch = 16;  // blocks that a thread takes at once
  const auto count = int64_t(tensors.size());
  const int64_t blocks = (count + block - 1) / block;
  std::atomic<bool> fine{true};
  const auto check = [&](int64_t first_block, int64_t last_block) {
    void* now[block];
    for (int64_t k = first_block; k < last_block && fine.load(std::memory_order_relaxed); ++k) {
      const int64_t begin = k * block, end = std::min(begin + block, count);
      for (int64_t i = end; i < std::min(end + block, count); ++i) fetch_ahead(tensors[i]);
      for (int64_t i = begin; i < end; ++i) now[i - begin] = pointer_of(tensors[i].handle);
      for (int64_t i = begin; i < end; ++i)
        if (!holds(tensors[i], layouts.data() + tensors[i].layout, now[i - begin], moved))
          fine = false;
    }
  };
  if (share && blocks > 4 * stretch)
    for_each_stretch(blocks, stretch, check);
  else
    check(0, blocks);
  return fine;
}

Held described(const Tensor& tensor, std::vector<int64_t>& layouts) {
  Held held{tensor.get(), nullptr, nullptr, int64_t(layouts.size()), 0, int32_t(tensor.dim())};
  aoti_torch_get_dtype(held.handle, &held.dtype);
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  layouts.insert(layouts.end(), sizes.begin(), sizes.end());
  layouts.insert(layouts.end(), strides.begin(), strides.end());
  return held;
}

const char* storage_of(const Held& held) {
  int64_t offset = 0;
  aoti_torch_get_storage_offset(held.handle, &offset);
  return static_cast<const char*>(held.pointer) -
         offset * int64_t(aoti_torch_dtype_element_size(held.dtype));
}

}  // namespace fastmt
