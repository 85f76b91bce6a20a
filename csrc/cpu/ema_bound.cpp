// Tensors that are held from one update to the next: handing a list of them over anew costs about a
// microsecond each, looking at one that is held a few nanoseconds.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_set>

#include "cpu/ema_held.h"
#include "cpu/ema_host.h"
#include "cpu/registry.h"
#include "exported.h"

namespace fastmt {

namespace {

// What one teacher does with one value.
struct Use {
  EmaMode mode;
  int64_t average, compensation;  // places in `tensors`; the latter -1 where there is none
  size_t element_size;
  Type type;
};

struct Bound {
  int64_t teachers;               // of each value
  bool watches;                   // the tensors of the first row, which are not held
  std::vector<Tensor> owned;
  std::vector<Held> tensors;      // the averages of each row, the values, the compensations
  std::vector<int64_t> layouts;   // sizes and strides of each
  std::vector<Use> uses;          // [row][teacher]
  std::vector<Type> value_types;  // [row]
  std::vector<int64_t> length, start, number;
  std::atomic<bool> moved{true};  // since are_apart last said yes
  std::mutex lock;

  const Held& value(int64_t row) const { return tensors[uses.size() + row]; }

  Held& watched(int64_t i) { return tensors[i < teachers ? i : int64_t(uses.size())]; }
};

Registry<Bound> registry;

// Tensors of other dtypes are only copied, byte by byte.
Type type_or_bytes(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  const bool floating = type == ScalarType::Float || type == ScalarType::BFloat16 ||
                        type == ScalarType::Half;
  return floating ? type_of(tensor) : Type::uint8;
}

void update_span(const Bound& bound, int64_t row, const Use& use, double decay, uint32_t draw,
                 int64_t first, int64_t last) {
  const bool copies = use.mode == EmaMode::copy;
  if (use.mode == EmaMode::keep || decay < 0 || (decay == 1 && !copies)) return;
  const Held &average = bound.tensors[use.average], &value = bound.value(row);
  if (copies && average.dtype == value.dtype) {
    const size_t offset = first * use.element_size;
    std::memcpy(static_cast<char*>(average.pointer) + offset,
                static_cast<const char*>(value.pointer) + offset,
                (last - first) * use.element_size);
    return;
  }
  EmaSpan span{average.pointer, value.pointer, use.type, bound.value_types[row], first, last};
  if (use.mode == EmaMode::stochastic) {
    span.rounding = Rounding::stochastic;
    span.key = mixed(draw ^ mixed(uint32_t(bound.number[row])));
  } else if (use.mode == EmaMode::kahan) {
    span.rounding = Rounding::kahan;
    span.compensation = bound.tensors[use.compensation].pointer;
  }
  kernels().ema(span, copies ? 0 : decay);
}

// Whether no value shares memory with an average that is written, and none of these is there twice.
bool are_apart(const Bound& bound) {
  std::unordered_set<const void*> written, storages;
  for (const Use& use : bound.uses) {
    if (use.mode == EmaMode::keep) continue;
    const Held& average = bound.tensors[use.average];
    if (!written.insert(average.pointer).second) return false;
    storages.insert(storage_of(average));
  }
  const auto rows = int64_t(bound.length.size());
  for (int64_t row = 0; row < rows; ++row)
    if (storages.count(storage_of(bound.value(row)))) return false;
  return true;
}

// The first half of an update: of all tensors but the watched ones.
bool others_hold(Bound& bound) {
  return all_hold(bound.tensors, bound.layouts, bound.moved, true);
}

// After the pointers were read.
bool still_apart(Bound& bound) {
  if (bound.moved) bound.moved = !are_apart(bound);
  return !bound.moved;
}

void run(const Bound& bound, const double* decays, const int64_t* draws) {
  for_each_chunk(bound.start.data(), int64_t(bound.length.size()), bound.length.data(), 1,
                 [&](int64_t row, int64_t first, int64_t last) {
    for (int64_t t = 0; t < bound.teachers; ++t)
      update_span(bound, row, bound.uses[row * bound.teachers + t], decays[t], uint32_t(draws[t]),
                  first, last);
  });
}

// Gives the watched tensors their handles for the time of one call.
class Watched {
 public:
  Watched(Bound& bound, const std::vector<Tensor>& tensors) : bound_(bound), count_(tensors.size()) {
    STD_TORCH_CHECK(bound.watches && count_ == bound.teachers + 1,
                    "watched: expected the averages of the first value, and it");
    for (int64_t i = 0; i < count_; ++i) bound.watched(i).handle = tensors[i].get();
  }
  ~Watched() {
    for (int64_t i = 0; i < count_; ++i) bound_.watched(i).handle = nullptr;
  }

  bool hold() const {
    for (int64_t i = 0; i < count_; ++i)
      if (!holds(bound_.watched(i), bound_.layouts, bound_.moved)) return false;
    return true;
  }

 private:
  Bound& bound_;
  const int64_t count_;
};

std::shared_ptr<Bound> bind(const std::vector<Tensor>& averages, const std::vector<Tensor>& values,
                            const std::vector<int64_t>& modes,
                            const std::vector<Tensor>& compensations,
                            const std::vector<int64_t>& numbers, bool watch_first) {
  STD_TORCH_CHECK(!values.empty() && averages.size() % values.size() == 0 &&
                      modes.size() == averages.size() && numbers.size() == values.size(),
                  "averages, modes, numbers: expected as many for each value");
  auto bound = std::make_shared<Bound>();
  const auto teachers = int64_t(averages.size() / values.size());
  const auto add = [&](const Tensor& tensor, bool owned) {
    bound->tensors.push_back(described(tensor, bound->layouts));
    if (owned) bound->owned.push_back(tensor);
    return int64_t(bound->tensors.size()) - 1;
  };
  bound->teachers = teachers;
  bound->start.push_back(0);
  bound->number = numbers;
  for (size_t row = 0; row < values.size(); ++row) {
    const bool owned = row > 0 || !watch_first;
    for (int64_t t = 0; t < teachers; ++t) {
      const size_t at = row * teachers + t;
      const Tensor& average = averages[at];
      bound->uses.push_back({EmaMode(modes[at]), add(average, owned), -1, average.element_size(),
                             type_or_bytes(average)});
    }
    bound->value_types.push_back(type_or_bytes(values[row]));
    bound->length.push_back(values[row].numel());
    bound->start.push_back(bound->start.back() + chunks_of(values[row].numel()));
  }
  for (size_t row = 0; row < values.size(); ++row) add(values[row], row > 0 || !watch_first);
  size_t used = 0;
  for (Use& use : bound->uses)
    if (use.mode == EmaMode::kahan) use.compensation = add(compensations.at(used++), true);
  STD_TORCH_CHECK(others_hold(*bound) && still_apart(*bound),
                  "a bound tensor has no memory of its own on the CPU");
  bound->watches = watch_first;
  for (int64_t i = 0; watch_first && i <= teachers; ++i) bound->watched(i).handle = nullptr;
  return bound;
}

}  // namespace

// Holds `values` and, for each of them, the same number of `averages` with their EmaMode, and one
// of `compensations` for each of EmaMode::kahan, until ema_release; returns the key. The tensors of
// the first value are not held if `watch_first`: they come along with each update. All tensors are
// dense and in the memory order of their value; `numbers` distinguish the random numbers of values.
int64_t ema_bind(const std::vector<Tensor>& averages, const std::vector<Tensor>& values,
                 const std::vector<int64_t>& modes, const std::vector<Tensor>& compensations,
                 const std::vector<int64_t>& numbers, bool watch_first) {
  return registry.add(bind(averages, values, modes, compensations, numbers, watch_first));
}

void ema_release(int64_t key) { registry.release(key); }

// The second half of an update, right after fastmt_ema_holds, where tensors are watched: false, with
// nothing written, where one of these has another dtype, shape or stride than it was bound with, or no
// memory, or where any tensor has that of another. One decay and one seed of random numbers a teacher;
// a negative decay leaves it out.
bool ema_bound_run_(int64_t key, const std::vector<Tensor>& watched,
                    const std::vector<double>& decays, const std::vector<int64_t>& draws) {
  const std::shared_ptr<Bound> bound = registry.find(key);
  STD_TORCH_CHECK(int64_t(decays.size()) == bound->teachers && decays.size() == draws.size(),
                  "decays, draws: expected one a teacher");
  const std::lock_guard<std::mutex> guard(bound->lock);
  const Watched handles(*bound, watched);
  if (!handles.hold() || !still_apart(*bound)) return false;
  run(*bound, decays.data(), draws.data());
  return true;
}

}  // namespace fastmt

// The halves of an update, which goes by what the first one has read. Both are false where something was
// thrown, which must not pass through C.

// Whether all tensors but the watched ones have the dtypes, shapes and strides that they were bound
// with, and, unless some are watched, memory of their own.
FASTMT_EXPORTED bool fastmt_ema_holds(int64_t key) {
  try {
    const auto bound = fastmt::registry.find(key);
    const std::lock_guard<std::mutex> guard(bound->lock);
    return fastmt::others_hold(*bound) && (bound->watches || fastmt::still_apart(*bound));
  } catch (...) {
    return false;
  }
}

// ema_bound_run_ where none are watched; false otherwise.
FASTMT_EXPORTED bool fastmt_ema_run(int64_t key, const double* decays, const int64_t* draws) {
  try {
    const auto bound = fastmt::registry.find(key);
    if (bound->watches) return false;
    const std::lock_guard<std::mutex> guard(bound->lock);
    fastmt::run(*bound, decays, draws);
    return true;
  } catch (...) {
    return false;
  }
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastmt, m) {
  m.def(
      "ema_bind(Tensor[] averages, Tensor[] values, int[] modes, Tensor[] compensations,"
      " int[] numbers, bool watch_first) -> int");
  m.def("ema_release(int key) -> ()");
  m.def("ema_bound_run_(int key, Tensor[] watched, float[] decays, int[] draws) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(fastmt, CompositeExplicitAutograd, m) {
  m.impl("ema_bind", TORCH_BOX(&fastmt::ema_bind));
  m.impl("ema_release", TORCH_BOX(&fastmt::ema_release));
  m.impl("ema_bound_run_", TORCH_BOX(&fastmt::ema_bound_run_));
}
