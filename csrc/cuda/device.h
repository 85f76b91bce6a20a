// The CUDA that the kernels are written in: qualifiers, launches, half precision, packs of 16
// bytes. A compiler that is not nvcc takes the same names from tests/cuda_on_host, which runs them
// in loops.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <mutex>
#include <stdexcept>
#include <string>
#else
#include "cuda_on_host.h"
#endif

#include <cstdint>

#include "cuda/calls.h"

#define FASTMT_INLINE __device__ __forceinline__

namespace fastmt::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

FASTMT_INLINE float widen(float x) { return x; }
FASTMT_INLINE float widen(bfloat16 x) { return __bfloat162float(x); }
FASTMT_INLINE float widen(float16 x) { return __half2float(x); }

FASTMT_INLINE uint32_t bits_of(float x) { return __float_as_uint(x); }
FASTMT_INLINE uint32_t bits_of(float16 x) { return __half_as_ushort(x); }

template <class T>
FASTMT_INLINE T of_bits(uint32_t bits);
template <>
FASTMT_INLINE float of_bits<float>(uint32_t bits) {
  return __uint_as_float(bits);
}
template <>
FASTMT_INLINE bfloat16 of_bits<bfloat16>(uint32_t bits) {
  return __ushort_as_bfloat16(uint16_t(bits));
}
template <>
FASTMT_INLINE float16 of_bits<float16>(uint32_t bits) {
  return __ushort_as_half(uint16_t(bits));
}

template <class T>
FASTMT_INLINE T narrow(float x);
template <>
FASTMT_INLINE float narrow<float>(float x) {
  return x;
}
template <>
FASTMT_INLINE bfloat16 narrow<bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
FASTMT_INLINE float16 narrow<float16>(float x) {
  return __float2half_rn(x);
}

template <class T>
struct constant_type {
  using type = T;
};

// f(constant_type<T>) for the floating type of a call; every thread of a launch takes the same
// branch.
template <class F>
FASTMT_INLINE void with_type(Type type, F f) {
  if (type == Type::float32)
    f(constant_type<float>());
  else if (type == Type::bfloat16)
    f(constant_type<bfloat16>());
  else
    f(constant_type<float16>());
}

struct alignas(16) Four {
  float at[4];
};
FASTMT_INLINE const Four& four_at(const float* at) { return *reinterpret_cast<const Four*>(at); }

#if defined(__CUDACC__)
FASTMT_INLINE float exp2_unit(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FASTMT_INLINE float inverse_unit(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FASTMT_INLINE float opaque(float x) {
  asm("" : "+f"(x));
  return x;
}

// threadIdx.x, asked anew: what is made of it takes no registers in between.
FASTMT_INLINE int this_thread() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

inline void check(cudaError_t status) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("fastmt: CUDA says ") + cudaGetErrorString(status));
}

// The limit belongs to the kernel, not to a launch: between the two no other thread sets it.
inline std::mutex& limits() {
  static std::mutex mutex;
  return mutex;
}

template <class Argument>
void launch(void (*kernel)(Argument), int64_t blocks, int threads, int64_t bytes, Stream stream,
            const Argument& argument) {
  std::unique_lock<std::mutex> lock(limits(), std::defer_lock);
  if (bytes > 48 * 1024) {
    lock.lock();
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
  }
  kernel<<<dim3(unsigned(blocks)), threads, bytes, static_cast<cudaStream_t>(stream)>>>(argument);
  check(cudaGetLastError());
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}
inline int64_t shared_memory_of_block() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}
inline int processors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
// So many that every multiprocessor has its share of them, several at once and several times over.
inline int64_t busy_blocks() { return 20 * processors(); }
#endif

}  // namespace fastmt::cuda
