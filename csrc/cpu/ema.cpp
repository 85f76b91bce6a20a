#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "cpu/host.h"

namespace fastmt {

namespace {

constexpr int64_t CHUNK = 16 * 1024;  // elements in one piece of work

// A row of the table: teacher pointer, student pointer, length, teacher dtype, student dtype.
constexpr int64_t COLUMNS = 5;

int64_t chunks_of(int64_t elements) { return (elements + CHUNK - 1) / CHUNK; }

// f(row, first, last) for each chunk of elements; start[row] counts the chunks before a row.
template <class F>
void for_each_chunk(const int64_t* start, int64_t rows, const int64_t* length, int64_t stride,
                    const F& f) {
  for_each_stretch(start[rows], 8, [&](int64_t begin, int64_t end) {
    int64_t row = std::upper_bound(start, start + rows + 1, begin) - start - 1;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (start[row + 1] <= chunk) ++row;
      const int64_t first = (chunk - start[row]) * CHUNK;
      f(row, first, std::min(first + CHUNK, length[row * stride]));
    }
  });
}

// A tensor that stays alive here, and the layout that it had when it was bound.
struct Held {
  Tensor tensor;
  ScalarType dtype;
  size_t element_size;
  void* pointer;
  std::vector<int64_t> layout;  // sizes, then strides

  explicit Held(const Tensor& bound)
      : tensor(bound), dtype(bound.scalar_type()), element_size(bound.element_size()) {
    const auto sizes = bound.sizes(), strides = bound.strides();
    layout.assign(sizes.begin(), sizes.end());
    layout.insert(layout.end(), strides.begin(), strides.end());
    pointer = nullptr;
    STD_TORCH_CHECK(holds(), "a bound tensor has no memory of its size on the CPU");
  }

  // Reads the pointer anew. False where the layout is another, or the memory is gone.
  bool holds() {
    void* now = tensor.data_ptr();
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    if (tensor.scalar_type() != dtype || 2 * sizes.size() != layout.size() ||
        !std::equal(sizes.begin(), sizes.end(), layout.begin()) ||
        !std::equal(strides.begin(), strides.end(), layout.begin() + sizes.size()))
      return false;
    if (now != pointer && !has_memory(now)) return false;
    pointer = now;
    return true;
  }

  bool has_memory(const void* at) const {
    const size_t rank = layout.size() / 2;
    int64_t last = tensor.storage_offset(), bytes = 0;
    for (size_t d = 0; d < rank; ++d) {
      if (layout[d] == 0) return true;
      last += (layout[d] - 1) * layout[rank + d];
    }
    aoti_torch_get_storage_size(tensor.get(), &bytes);
    return at && tensor.is_cpu() && (last + 1) * int64_t(element_size) <= bytes;
  }
};

enum class Mode : int64_t { average, copy, keep };

struct Bound {
  int64_t teachers;            // of each student tensor
  std::vector<Held> averages;  // [row][teacher]
  std::vector<Mode> modes;     // the same
  std::vector<Held> values;    // [row]
  std::vector<int64_t> length, start;
};

std::mutex registry_lock;
std::unordered_map<int64_t, std::shared_ptr<Bound>> registry;

std::shared_ptr<Bound> find(int64_t key) {
  const std::lock_guard<std::mutex> guard(registry_lock);
  const auto found = registry.find(key);
  STD_TORCH_CHECK(found != registry.end(), "no bound tensors of the key ", key);
  return found->second;
}

void update_span(const Held& average, const Held& value, Mode mode, double decay, int64_t first,
                 int64_t last) {
  if (mode == Mode::keep || decay < 0) return;
  if (mode == Mode::copy && average.dtype == value.dtype) {
    const size_t offset = first * average.element_size;
    std::memcpy(static_cast<char*>(average.pointer) + offset,
                static_cast<const char*>(value.pointer) + offset,
                (last - first) * average.element_size);
    return;
  }
  kernels().ema({average.pointer, value.pointer, type_of(average.tensor), type_of(value.tensor),
                 first, last},
                mode == Mode::copy ? 0 : decay);
}

}  // namespace

// Rows of `table` as above, dtypes as in Type; `starts` (rows + 1) counts the chunks before each row.
void ema_update_(const Tensor& table, const Tensor& starts, const Tensor& decay) {
  const auto* rows = static_cast<const int64_t*>(table.data_ptr());
  const auto* start = static_cast<const int64_t*>(starts.data_ptr());
  const double keep = *static_cast<const double*>(decay.data_ptr());
  for_each_chunk(start, table.size(0), rows + 2, COLUMNS,
                 [&](int64_t row, int64_t first, int64_t last) {
    const int64_t* entry = rows + row * COLUMNS;
    kernels().ema({reinterpret_cast<void*>(entry[0]), reinterpret_cast<const void*>(entry[1]),
                   Type(entry[3]), Type(entry[4]), first, last},
                  keep);
  });
}

// Holds `values` and, for each of them, the same number of `averages` with their Mode, until
// ema_release; returns the key. All tensors are dense and in the memory order of their value.
int64_t ema_bind(const std::vector<Tensor>& averages, const std::vector<Tensor>& values,
                 const std::vector<int64_t>& modes) {
  STD_TORCH_CHECK(!values.empty() && averages.size() % values.size() == 0 &&
                      modes.size() == averages.size(),
                  "averages and modes: expected as many for each value");
  auto bound = std::make_shared<Bound>();
  bound->teachers = int64_t(averages.size() / values.size());
  for (const Tensor& average : averages) bound->averages.emplace_back(average);
  for (const int64_t mode : modes) bound->modes.push_back(Mode(mode));
  bound->start.push_back(0);
  for (const Tensor& value : values) {
    bound->values.emplace_back(value);
    bound->length.push_back(value.numel());
    bound->start.push_back(bound->start.back() + chunks_of(value.numel()));
  }
  const std::lock_guard<std::mutex> guard(registry_lock);
  static int64_t next = 0;
  registry.emplace(++next, std::move(bound));
  return next;
}

void ema_release(int64_t key) {
  const std::lock_guard<std::mutex> guard(registry_lock);
  registry.erase(key);
}

// One decay a teacher, negative to leave it out. False, with nothing written, where a tensor has
// another dtype, shape or stride than it was bound with.
bool ema_bound_update_(int64_t key, const std::vector<double>& decays) {
  const std::shared_ptr<Bound> bound = find(key);
  STD_TORCH_CHECK(int64_t(decays.size()) == bound->teachers, "decays: expected one a teacher");
  const auto holds = [](Held& held) { return held.holds(); };
  if (!std::all_of(bound->averages.begin(), bound->averages.end(), holds) ||
      !std::all_of(bound->values.begin(), bound->values.end(), holds))
    return false;
  const int64_t teachers = bound->teachers;
  for_each_chunk(bound->start.data(), int64_t(bound->values.size()), bound->length.data(), 1,
                 [&](int64_t row, int64_t first, int64_t last) {
    for (int64_t t = 0; t < teachers; ++t) {
      const int64_t at = row * teachers + t;
      update_span(bound->averages[at], bound->values[row], bound->modes[at], decays[t], first,
                  last);
    }
  });
  return true;
}

// data *= scale * factor in place, for a dense tensor; both factors are 0-dim float32.
void scale_(Tensor data, const Tensor& scale, const Tensor& factor) {
  const float product = *static_cast<const float*>(scale.data_ptr()) *
                        *static_cast<const float*>(factor.data_ptr());
  if (product == 1) return;
  const Type type = type_of(data);
  const int64_t elements = data.numel();
  for_each_stretch(chunks_of(elements), 8, [&](int64_t begin, int64_t end) {
    kernels().scale(data.data_ptr(), type, begin * CHUNK, std::min(end * CHUNK, elements), product);
  });
}

}  // namespace fastmt

STABLE_TORCH_LIBRARY_FRAGMENT(fastmt, m) {
  m.def("ema_bind(Tensor[] averages, Tensor[] values, int[] modes) -> int");
  m.def("ema_release(int key) -> ()");
  m.def("ema_bound_update_(int key, float[] decays) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(fastmt, CompositeExplicitAutograd, m) {
  m.impl("ema_bind", TORCH_BOX(&fastmt::ema_bind));
  m.impl("ema_release", TORCH_BOX(&fastmt::ema_release));
  m.impl("ema_bound_update_", TORCH_BOX(&fastmt::ema_bound_update_));
}
