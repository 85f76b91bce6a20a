// Neighbouring elements that a thread moves at once.
#pragma once

#include "cuda/lanes.h"

namespace fastmt::cuda {

constexpr int EMA_THREADS = 256;
constexpr int PIECE = 4096;  // elements that a block takes at once: four packs of 16 bytes a thread

template <class T, int V>
struct alignas(V * sizeof(T)) Pack {
  T at[V];
};

// Values in one pack: 16 bytes of the wider type.
template <class T, class S>
constexpr int PACK = 16 / int(sizeof(T) > sizeof(S) ? sizeof(T) : sizeof(S));

// The first element that lies at a multiple of V of them.
template <int V, class T>
FASTMT_INLINE int misaligned(const T* at) {
  return int((V - reinterpret_cast<uintptr_t>(at) / sizeof(T) % V) % V);
}

}  // namespace fastmt::cuda
