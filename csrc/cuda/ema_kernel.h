// ema_update_ and scale_ over tables of tensors. Mirrors reference.ema_update_ and
// csrc/cpu/ema_kernel.h.
#pragma once

#include "cuda/rounding.h"

namespace fastmt::cuda {

// to[at ...] = f(to[at ...], from[at ...]) for N packs a thread. All loads come before the first
// store.
template <int N, int V, class T, class S, class F>
FASTMT_INLINE void update_packs(T* to, const S* from, F f) {
  Pack<T, V> a[N];
  Pack<S, V> b[N];
  FASTMT_UNROLL
  for (int n = 0; n < N; ++n) {
    a[n] = *reinterpret_cast<const Pack<T, V>*>(to + n * EMA_THREADS * V);
    b[n] = *reinterpret_cast<const Pack<S, V>*>(from + n * EMA_THREADS * V);
  }
  FASTMT_UNROLL
  for (int n = 0; n < N; ++n) {
    FASTMT_UNROLL
    for (int v = 0; v < V; ++v) a[n].at[v] = f(a[n].at[v], b[n].at[v]);
    *reinterpret_cast<Pack<T, V>*>(to + n * EMA_THREADS * V) = a[n];
  }
}

// The same for up to PIECE elements: whole ones at once, packs where both tensors are equally
// aligned, and element by element what is left over.
template <class T, class S, class F>
FASTMT_INLINE void update_piece(T* to, const S* from, int count, F f) {
  constexpr int V = PACK<T, S>, N = PIECE / (EMA_THREADS * V);
  const int own = threadIdx.x, head = misaligned<V>(to);
  const bool packs = head == misaligned<V>(from) && count >= head + V;
  if (packs && head == 0 && count == PIECE)
    return update_packs<N, V>(to + own * V, from + own * V, f);
  const int begin = packs ? head : count, end = packs ? count - (count - head) % V : count;
#pragma unroll 1
  for (int at = begin + own * V; at < end; at += EMA_THREADS * V)
    update_packs<1, V>(to + at, from + at, f);
#pragma unroll 1
  for (int i = own; i < begin + count - end; i += EMA_THREADS) {
    const int at = i < begin ? i : end + (i - begin);
    to[at] = f(to[at], from[at]);
  }
}

struct Decay {
  bool keeps, copies, near_student;
  float step;

  // As torch.lerp: from the nearer end. 1 keeps, whatever the student holds, as what is negative
  // does; 0 copies, whatever was there.
  FASTMT_INLINE explicit Decay(double decay)
      : keeps(decay == 1 || decay < 0),
        copies(decay == 0),
        near_student(decay < 0.5),
        step(float(near_student ? decay : 1 - decay)) {}

  FASTMT_INLINE float mean(float average, float value) const {
    const float from = near_student ? value : average, to = near_student ? average : value;
    return copies ? value : from + step * (to - from);
  }
};

// Elements [begin, begin + count) of one tensor pair of the table.
struct Span {
  void* teacher;
  const void* student;
  int64_t begin;
  int count;

  template <class T, class S, class F>
  FASTMT_INLINE void update(F f) const {
    update_piece(static_cast<T*>(teacher) + begin, static_cast<const S*>(student) + begin, count,
                 f);
  }
};

FASTMT_INLINE void update_span(const Span& span, Type teacher, Type student, const Decay& decay) {
  if (teacher == Type::uint8)
    return span.update<uint8_t, uint8_t>([](uint8_t, uint8_t value) { return value; });
  with_type(teacher, [&](auto t) {
    using T = typename decltype(t)::type;
    with_type(student, [&](auto s) {
      using S = typename decltype(s)::type;
      span.update<T, S>([=](T a, S b) { return narrow<T>(decay.mean(widen(a), widen(b))); });
    });
  });
}

// The row of the table that a chunk belongs to: the last one that starts no later.
FASTMT_INLINE int64_t row_of(const int64_t* starts, int64_t rows, int64_t chunk) {
  int64_t low = 0, high = rows;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (starts[middle] <= chunk)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// How many chunks there are only the device knows, so the blocks take turns.
template <bool ROUNDS>
FASTMT_INLINE void update_chunks(const EmaCall& call) {
  const int64_t chunks = call.starts[call.rows];
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const int64_t row = row_of(call.starts, call.rows, chunk);
    const EmaRow& entry = call.table[row];
    const double stated = call.decays[entry.owner];
    const Decay decay(entry.mode == EmaMode::copy && stated >= 0 ? 0 : stated);
    if (decay.keeps) continue;
    const int64_t begin = (chunk - call.starts[row]) * EMA_CHUNK, rest = entry.length - begin;
    const int count = int(rest < EMA_CHUNK ? rest : EMA_CHUNK);
    if constexpr (ROUNDS) {
      if (entry.mode == EmaMode::stochastic || entry.mode == EmaMode::kahan) {
        round_chunk(entry, stated, call.draws[entry.owner], begin, count);
        continue;
      }
    }
#pragma unroll 1
    for (int done = 0; done < count; done += PIECE) {
      const Span span{reinterpret_cast<void*>(entry.teacher),
                      reinterpret_cast<const void*>(entry.student), begin + done,
                      count - done < PIECE ? count - done : PIECE};
      update_span(span, Type(entry.teacher_type), Type(entry.student_type), decay);
    }
  }
}

__global__ void __launch_bounds__(EMA_THREADS, 4) ema_kernel(const __grid_constant__ EmaCall call) {
  update_chunks<false>(call);
}

// What the modes that round take of registers is no matter of other averages.
__global__ void __launch_bounds__(EMA_THREADS, 4)
    ema_rounding_kernel(const __grid_constant__ EmaCall call) {
  update_chunks<true>(call);
}

// data *= scale * factor; 0 clears, whatever was there.
__global__ void __launch_bounds__(EMA_THREADS, 4)
    scale_kernel(const __grid_constant__ ScaleCall call) {
  const float factor = *call.scale * *call.factor;
  if (factor == 1) return;
  for (int64_t piece = blockIdx.x; piece * PIECE < call.count; piece += gridDim.x) {
    const int64_t rest = call.count - piece * PIECE;
    const Span span{call.data, call.data, piece * PIECE, int(rest < PIECE ? rest : PIECE)};
    with_type(call.type, [&](auto type) {
      using T = typename decltype(type)::type;
      span.update<T, T>([=](T x, T) { return narrow<T>(factor == 0 ? 0.0f : widen(x) * factor); });
    });
  }
}

}  // namespace fastmt::cuda
