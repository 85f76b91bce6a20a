// CUDA as a loop, so that a host compiler can run the kernels of csrc/cuda: block after block, and
// in a block thread after thread, each on a stack of its own up to the next __syncthreads or vote of
// its warp. It goes up the threads and down them by turns, or in an order that is drawn anew after
// each barrier, which changes from call to call of an operation of two launches: what a missing
// barrier lets race comes out otherwise there.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 blockIdx, threadIdx, blockDim, gridDim;

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

namespace cuda_on_host {

template <class To, class From>
To bit_cast(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}

constexpr int WARP = 32;

enum class State { runs, votes, meets, done };  // a vote of the warp; all threads of the block

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(128 * 1024);
  State state;
  bool vote;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline int running, launches;
inline int64_t most_shared_bytes, busy_blocks = 0;
inline void (*body)(const void*);
inline const void* body_argument;

inline void wait_as(State state) {
  Fiber& own = fibers[running];
  own.state = state;
  swapcontext(&own.context, &scheduler);
}

inline void enter() {
  body(body_argument);
  wait_as(State::done);
}

inline int count(const std::vector<int>& threads, State state) {
  return int(std::count_if(threads.begin(), threads.end(),
                           [&](int i) { return fibers[i].state == state; }));
}

// The threads of a warp, from vote to vote up to a barrier.
inline void run_warp(const std::vector<int>& threads) {
  for (bool voted = false;;) {
    for (const int i : threads) {
      fibers[i].vote = voted;
      fibers[i].state = State::runs;
      threadIdx.x = unsigned(running = i);
      swapcontext(&scheduler, &fibers[i].context);
    }
    const int votes = count(threads, State::votes);
    if (votes == 0) return;
    if (votes != int(threads.size())) throw std::runtime_error("threads that miss a vote");
    voted = std::any_of(threads.begin(), threads.end(), [](int i) { return fibers[i].vote; });
  }
}

enum class Order { up, down, drawn };

template <class T>
void put_in(Order order, std::vector<T>& values) {
  static std::minstd_rand source;
  if (order == Order::down) std::reverse(values.begin(), values.end());
  if (order == Order::drawn) std::shuffle(values.begin(), values.end(), source);
}

inline std::vector<std::vector<int>> warps_in(Order order, int threads) {
  std::vector<std::vector<int>> warps((threads + WARP - 1) / WARP);
  for (int i = 0; i < threads; ++i) warps[i / WARP].push_back(i);
  for (auto& warp : warps) put_in(order, warp);
  put_in(order, warps);
  return warps;
}

// The threads of one block, from barrier to barrier; all of them must meet each.
inline void run_block(int threads, Order order) {
  if (int(fibers.size()) < threads) fibers.resize(threads);
  for (int i = 0; i < threads; ++i) {
    ucontext_t& context = fibers[i].context;
    getcontext(&context);
    context.uc_stack.ss_sp = fibers[i].stack.data();
    context.uc_stack.ss_size = fibers[i].stack.size();
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
  }
  for (int done = 0; done == 0;) {
    for (const auto& warp : warps_in(order, threads)) {
      run_warp(warp);
      done += count(warp, State::done);
    }
    if (done != 0 && done != threads) throw std::runtime_error("threads that miss a barrier");
    if (order != Order::drawn) order = order == Order::up ? Order::down : Order::up;
  }
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::wait_as(cuda_on_host::State::meets); }

// Of a whole warp, as all of ours are.
inline bool __any_sync(unsigned, bool here) {
  cuda_on_host::fibers[cuda_on_host::running].vote = here;
  cuda_on_host::wait_as(cuda_on_host::State::votes);
  return cuda_on_host::fibers[cuda_on_host::running].vote;
}

inline uint32_t __float_as_uint(float x) { return cuda_on_host::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t bits) { return cuda_on_host::bit_cast<float>(bits); }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) { return {bits}; }
inline float __bfloat162float(__nv_bfloat16 x) {
  return cuda_on_host::bit_cast<float>(uint32_t(x.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = cuda_on_host::bit_cast<uint32_t>(x);
  return {uint16_t(x != x ? 0x7fc0u : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(float(fraction), -24)
                                          : std::ldexp(float(fraction + 1024), exponent - 25);
  return x.bits >> 15 ? -magnitude : magnitude;
}
inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (x != x) return {0x7e00};
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const bool subnormal = magnitude < 0x1p-14f;
  const int unit = subnormal ? -24 : exponent - 11;  // the value of the last bit is 2^unit
  const uint32_t steps = uint32_t(std::nearbyint(std::ldexp(magnitude, -unit)));
  return {uint16_t(sign | (subnormal ? steps : uint32_t(exponent + 13) * 1024 + steps))};
}

namespace fastmt::cuda {

alignas(64) inline float shared[58 * 1024];  // as much as the largest GPU gives a block

using Stream = void*;

inline float exp2_unit(float x) { return std::exp2(x); }
inline float inverse_unit(float x) { return 1 / x; }
inline float opaque(float x) { return x; }
inline int this_thread() { return int(threadIdx.x); }
inline int64_t shared_memory_of_block() { return sizeof shared; }
inline int processors() { return 2; }
inline int64_t busy_blocks() { return cuda_on_host::busy_blocks; }

template <class Argument>
void launch(void (*kernel)(Argument), int64_t blocks, int threads, int64_t bytes, Stream,
            const Argument& argument) {
  static void (*current)(Argument);
  current = kernel;
  if (bytes > int64_t(sizeof shared)) throw std::runtime_error("more shared memory than there is");
  cuda_on_host::most_shared_bytes = std::max(cuda_on_host::most_shared_bytes, bytes);
  cuda_on_host::body = [](const void* given) { current(*static_cast<const Argument*>(given)); };
  cuda_on_host::body_argument = &argument;
  blockDim.x = unsigned(threads);
  gridDim.x = unsigned(blocks);
  const auto order = cuda_on_host::Order(cuda_on_host::launches++ / 2 % 3);
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = unsigned(block);
    std::memset(static_cast<void*>(shared), 0xff, sizeof shared);  // NaN
    cuda_on_host::run_block(threads, order);
  }
}

}  // namespace fastmt::cuda
