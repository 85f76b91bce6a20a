#include "cpu/ema_held.h"

#include <algorithm>

namespace fastmt {

namespace {

constexpr int RECORD_WORDS = 26;  // of what c10 calls a TensorImpl, in PyTorch 2.13

void* pointer_of(const Held& held) {
  void* pointer = nullptr;
  return !held.handle || aoti_torch_get_data_ptr(held.handle, &pointer) ? nullptr : pointer;
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

// holds() of a tensor whose data is at `now`.
bool holds_at(void* now, Held& held, const std::vector<int64_t>& layouts,
              std::atomic<bool>& moved) {
  const int64_t* bound = layouts.data() + held.layout;
  int32_t dtype = -1;
  int64_t rank = -1, *strides = nullptr, *sizes = nullptr;
  aoti_torch_get_dtype(held.handle, &dtype);
  aoti_torch_get_dim(held.handle, &rank);
  if (dtype != held.dtype || rank != held.rank) return false;
  aoti_torch_get_sizes(held.handle, &sizes);
  aoti_torch_get_strides(held.handle, &strides);
  for (int64_t d = 0; d < rank; ++d)
    if (sizes[d] != bound[d] || strides[d] != bound[rank + d]) return false;
  if (now && now == held.pointer) return true;
  if (!has_memory(held, bound, now)) return false;
  held.pointer = now;
  moved = true;
  return true;
}

// The records of many tensors are in no near cache when they are looked at once an update.
void fetch_record(const Held& held) {
  __builtin_prefetch(held.handle);
  for (int word = 0; word < RECORD_WORDS; word += 8) __builtin_prefetch(held.record + word);
}

// Of the words that follow the first two of a record, some lead to the storage, the version counter
// and the Python object: a guess, which is only fetched and never followed.
void fetch_parts(const Held& held) {
  if (!held.handle || !held.record) return;
  for (int word = 2; word < 7; ++word) __builtin_prefetch(held.record[word]);
}

// A handle is the address of a pointer to the record. That it is one shows in the sizes, which lie in
// the record unless they are many.
const void* const* record_of(AtenTensorHandle handle, const int64_t* sizes) {
  const auto record = *reinterpret_cast<const void* const* const*>(handle);
  const auto within = reinterpret_cast<const void* const*>(sizes);
  return record < within && within < record + RECORD_WORDS ? record : nullptr;
}

// f(begin, end) over [0, count): the calling thread goes up from 0, the others come down from the end,
// so that what stands first is in the nearest cache afterwards.
template <class F>
void share_from_both_ends(int64_t count, int64_t stretch, const F& f) {
  const int64_t stretches = (count + stretch - 1) / stretch;
  const auto threads = std::min<int64_t>(torch::stable::get_num_threads(), stretches);
  std::atomic<int64_t> taken{0}, low{0}, high{stretches};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    while (taken++ < stretches) {
      const int64_t begin = (thread == 0 ? low++ : --high) * stretch;
      f(begin, std::min(begin + stretch, count));
    }
  });
}

}  // namespace

bool holds(Held& held, const std::vector<int64_t>& layouts, std::atomic<bool>& moved) {
  return holds_at(pointer_of(held), held, layouts, moved);
}

bool all_hold(std::vector<Held>& tensors, const std::vector<int64_t>& layouts,
              std::atomic<bool>& moved, bool share) {
  constexpr int64_t block = 8, stretch = 128;
  const auto count = int64_t(tensors.size());
  std::atomic<bool> fine{true};
  const auto check = [&](int64_t first, int64_t last) {
    void* now[block];
    const auto up_to = [=](int64_t i) { return std::min(i, last); };
    for (int64_t i = first; i < up_to(first + 2 * block); ++i) fetch_record(tensors[i]);
    for (int64_t i = first; i < last && fine.load(std::memory_order_relaxed); i += block) {
      const int64_t end = up_to(i + block), next = up_to(end + block);
      for (int64_t k = end; k < next; ++k) fetch_parts(tensors[k]);
      for (int64_t k = next; k < up_to(next + block); ++k) fetch_record(tensors[k]);
      for (int64_t k = i; k < end; ++k) now[k - i] = pointer_of(tensors[k]);
      for (int64_t k = i; k < end; ++k)
        if (tensors[k].handle && !holds_at(now[k - i], tensors[k], layouts, moved)) fine = false;
    }
  };
  if (share && count > 4 * stretch)
    share_from_both_ends(count, stretch, check);
  else
    check(0, count);
  return fine;
}

Held described(const Tensor& tensor, std::vector<int64_t>& layouts) {
  Held held{tensor.get(), nullptr, nullptr, int64_t(layouts.size()), 0, int32_t(tensor.dim())};
  aoti_torch_get_dtype(held.handle, &held.dtype);
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  layouts.insert(layouts.end(), sizes.begin(), sizes.end());
  layouts.insert(layouts.end(), strides.begin(), strides.end());
  held.record = record_of(held.handle, sizes.data());
  return held;
}

const char* storage_of(const Held& held) {
  int64_t offset = 0;
  aoti_torch_get_storage_offset(held.handle, &offset);
  return static_cast<const char*>(held.pointer) -
         offset * int64_t(aoti_torch_dtype_element_size(held.dtype));
}

}  // namespace fastmt
