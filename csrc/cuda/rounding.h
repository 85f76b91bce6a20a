// Averages in half precision that move: rounded at random, or with what rounding loses kept.
// Mirrors kernels/rounding.py and csrc/cpu/ema_kernel.h.
#pragma once

#include "cuda/packs.h"

namespace fastmt::cuda {

// Wellons' lowbias32: every bit of the result depends on every bit of x.
FASTMT_INLINE uint32_t mixed(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// x -> T, up with the probability that leaves the mean at x.
template <class T>
FASTMT_INLINE T narrow_randomly(float x, uint32_t random);
template <>
FASTMT_INLINE bfloat16 narrow_randomly<bfloat16>(float x, uint32_t random) {
  return of_bits<bfloat16>(x != x ? 0x7fc0u : (bits_of(x) + (random & 0xffff)) >> 16);
}
template <>
FASTMT_INLINE float16 narrow_randomly<float16>(float x, uint32_t random) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude + (random & 0x1fff) - 0x38000000) >> 13;
  const bool is_small = magnitude < 0x38800000u;
  const float steps = is_small ? fabsf(x) * 16777216.0f : 0.0f;  // of 2^-24
  const int32_t whole = int32_t(steps);
  const uint32_t subnormal = whole + (float(random >> 8) < (steps - float(whole)) * 16777216.0f);
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t half = magnitude >= 0x47800000u ? special : is_small ? subnormal : normal;
  return of_bits<float16>(half | (bits >> 16 & 0x8000));
}

// In the words of the reference: torch.lerp by what 1 - decay is in float32.
struct Lerp {
  bool copies, near_student;
  float step;

  FASTMT_INLINE explicit Lerp(double decay) {
    const float share = float(1 - decay);
    copies = share == 1;
    near_student = share >= 0.5f;
    step = near_student ? share - 1 : share;
  }

  FASTMT_INLINE float operator()(float average, float value) const {
    return copies ? value : fmaf(step, value - average, near_student ? value : average);
  }
};

// f(index, average, value, lost) of V neighbours, the first of this index; `lost` only where KEEPS.
template <int V, bool KEEPS, class T, class S, class F>
FASTMT_INLINE void round_pack(T* to, const S* from, T* lost, int64_t index, F f) {
  auto* place = reinterpret_cast<Pack<T, V>*>(to + index);
  auto* beside = reinterpret_cast<Pack<T, V>*>(lost + index);
  Pack<T, V> a = *place, c;
  const Pack<S, V> b = *reinterpret_cast<const Pack<S, V>*>(from + index);
  if constexpr (KEEPS) c = *beside;
  FASTMT_UNROLL
  for (int v = 0; v < V; ++v) f(index + v, a.at[v], b.at[v], c.at[v]);
  *place = a;
  if constexpr (KEEPS) *beside = c;
}

// The same for a block's elements: packs where all tensors are equally aligned, and element by
// element what is left over.
template <bool KEEPS, class T, class S, class F>
FASTMT_INLINE void round_elements(T* to, const S* from, T* lost, int64_t begin, int count, F f) {
  constexpr int V = PACK<T, S>;
  const int own = threadIdx.x, head = misaligned<V>(to + begin);
  const bool packs = head == misaligned<V>(from + begin) && count >= head + V &&
                     (!KEEPS || head == misaligned<V>(lost + begin));
  const int first = packs ? head : count, end = packs ? count - (count - head) % V : count;
#pragma unroll 1
  for (int at = first + own * V; at < end; at += EMA_THREADS * V)
    round_pack<V, KEEPS>(to, from, lost, begin + at, f);
#pragma unroll 1
  for (int i = own; i < first + count - end; i += EMA_THREADS)
    round_pack<1, KEEPS>(to, from, lost, begin + (i < first ? i : end + (i - first)), f);
}

template <class T, class S>
FASTMT_INLINE void round_stochastically(const EmaRow& row, const Lerp& mean, int64_t draw,
                                        int64_t begin, int count) {
  const uint32_t key = mixed(uint32_t(draw) ^ uint32_t(row.number)) ^ uint32_t(begin >> 32);
  round_elements<false>(
      reinterpret_cast<T*>(row.teacher), reinterpret_cast<const S*>(row.student),
      static_cast<T*>(nullptr), begin, count, [=](int64_t index, T& average, S value, T&) {
        const uint32_t random = mixed(mixed(uint32_t(index)) ^ key);
        average = narrow_randomly<T>(mean(widen(average), widen(value)), random);
      });
}

template <class T, class S>
FASTMT_INLINE void round_with_the_rest(const EmaRow& row, const Lerp& mean, int64_t begin,
                                       int count) {
  round_elements<true>(
      reinterpret_cast<T*>(row.teacher), reinterpret_cast<const S*>(row.student),
      reinterpret_cast<T*>(row.lost), begin, count, [=](int64_t, T& average, S value, T& lost) {
        const float after = mean(widen(average) + widen(lost), widen(value));
        average = narrow<T>(after);
        const float rest = after - widen(average);
        lost = narrow<T>(rest - rest == 0 ? rest : 0.0f);  // 0 beside inf and NaN
      });
}

// Elements [begin, begin + count) of a row.
FASTMT_INLINE void round_chunk(const EmaRow& row, double decay, int64_t draw, int64_t begin,
                               int count) {
  const Lerp mean(decay);
  const auto by_types = [&](auto t) {
    using T = typename decltype(t)::type;
    with_type(Type(row.student_type), [&](auto s) {
      using S = typename decltype(s)::type;
      if (row.mode == EmaMode::kahan)
        round_with_the_rest<T, S>(row, mean, begin, count);
      else
        round_stochastically<T, S>(row, mean, draw, begin, count);
    });
  };
  if (Type(row.teacher_type) == Type::bfloat16)
    by_types(constant_type<bfloat16>());
  else
    by_types(constant_type<float16>());
}

}  // namespace fastmt::cuda
