// What Python holds by a key from one call to the next.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>

namespace fastmt {

template <class T>
class Registry {
 public:
  int64_t add(std::shared_ptr<T> held) {
    const std::lock_guard<std::mutex> guard(lock_);
    held_.emplace(++last_, std::move(held));
    return last_;
  }

  std::shared_ptr<T> find(int64_t key) {
    const std::lock_guard<std::mutex> guard(lock_);
    const auto found = held_.find(key);
    STD_TORCH_CHECK(found != held_.end(), "no bound tensors of the key ", key);
    return found->second;
  }

  void release(int64_t key) {
    // The end of a tensor waits for Python's lock and may run code of Python, which may come here
    // again: what is released ends after the guard.
    typename decltype(held_)::node_type released;
    const std::lock_guard<std::mutex> guard(lock_);
    released = held_.extract(key);
  }

 private:
  std::mutex lock_;
  int64_t last_ = 0;
  std::unordered_map<int64_t, std::shared_ptr<T>> held_;
};

}  // namespace fastmt
