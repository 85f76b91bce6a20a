// gaussian_noise over groups of elements. Mirrors reference.gaussian_noise.
//
// The random words are those of Threefry-4x32 with 13 rounds (Salmon et al., "Parallel Random Numbers:
// As Easy as 1, 2, 3", SC 2011): an element's noise follows from the seed and its place alone, so no
// number of threads or lanes changes it, and additions, rotations and xors vectorise everywhere.
#pragma once

#include "cpu/tile.h"

namespace FASTMT_ISA {

using fastmt::NoiseCall;

typedef uint32_t vector_u __attribute__((vector_size(4 * FASTMT_LANES), may_alias));

struct words {
  vector_u lo, hi;
};

FASTMT_INLINE words operator+(words a, words b) { return {a.lo + b.lo, a.hi + b.hi}; }
FASTMT_INLINE words operator+(words a, uint32_t b) { return {a.lo + b, a.hi + b}; }
FASTMT_INLINE words rotate_xor(words a, int bits, words b) {
  return {((a.lo << bits) | (a.lo >> (32 - bits))) ^ b.lo,
          ((a.hi << bits) | (a.hi >> (32 - bits))) ^ b.hi};
}

constexpr int COUNTERS = 32;            // of a group, so that every width of lanes divides it
constexpr int GROUP = 4 * COUNTERS;     // elements: word w of counter i is element w * COUNTERS + i
constexpr int ROTATIONS[8][2] = {{10, 26}, {11, 21}, {13, 27}, {23, 5},
                                 {6, 20},  {17, 11}, {25, 10}, {18, 20}};

// Four random words for each of W counters, of which `low` and `high` are the halves.
FASTMT_INLINE void random_words(words low, uint32_t high, uint64_t seed, words x[4]) {
  const uint32_t key[5] = {uint32_t(seed), uint32_t(seed >> 32), 0, 0,
                           0x1bd11bda ^ uint32_t(seed) ^ uint32_t(seed >> 32)};
  const words zero{vector_u{}, vector_u{}};
  x[0] = low + key[0];
  x[1] = zero + (high + key[1]);
  x[2] = zero + key[2];
  x[3] = zero + key[3];
#pragma GCC unroll 13
  for (int round = 0; round < 13; ++round) {
    const int odd = round & 1, first = odd ? 3 : 1, second = odd ? 1 : 3;
    x[0] = x[0] + x[first];
    x[first] = rotate_xor(x[first], ROTATIONS[round & 7][0], x[0]);
    x[2] = x[2] + x[second];
    x[second] = rotate_xor(x[second], ROTATIONS[round & 7][1], x[2]);
    if (round % 4 != 3) continue;
    const int block = round / 4 + 1;
    for (int i = 0; i < 4; ++i) x[i] = x[i] + key[(block + i) % 5];
    x[3] = x[3] + uint32_t(block);
  }
}

FASTMT_INLINE floats square_root(floats x) {
  alignas(64) float lanes[W];
  store(lanes, x);
  for (float& lane : lanes) lane = std::sqrt(lane);
  return load(lanes);
}

// The upper 24 bits of random words, as whole numbers.
FASTMT_INLINE floats upper_bits(words x) {
  return to_floats({(vector_i)(x.lo >> 8), (vector_i)(x.hi >> 8)});
}

FASTMT_INLINE floats flip_sign(floats x, ints where_bit_1) {
  const ints sign = (where_bit_1 & 2) << 30;
  return from_bits({bits(x).lo ^ sign.lo, bits(x).hi ^ sign.hi});
}

// Two standard normal values from two random words (Box and Muller).
FASTMT_INLINE void normals(words radius, words angle, floats* cosine, floats* sine) {
  const floats r = square_root(-2.0f * log((upper_bits(radius) + 1.0f) * 0x1p-24f));
  const floats turns = upper_bits(angle) * 0x1p-22f;  // quarters of a turn, [0, 4)
  constexpr float shift = 12582912.0f;                // rounds; the low bits hold the whole number
  const floats whole = turns + shift;
  const ints quarter = bits(whole);
  const floats x = (turns - (whole - shift)) * 1.57079633f, x2 = x * x;
  const floats s = ((x2 * -1.9515295891e-4f + 8.3321608736e-3f) * x2 - 1.6666654611e-1f) * x2 * x + x;
  const floats c = ((x2 * 2.4433157118e-5f - 1.3887316255e-3f) * x2 + 4.1666645683e-2f) * (x2 * x2) -
                   0.5f * x2 + 1.0f;
  const ints odd = (quarter & 1) == 1;
  *cosine = r * flip_sign(select(odd, s, c), quarter + 1);
  *sine = r * flip_sign(select(odd, c, s), quarter);
}

inline void fill_group(uint64_t seed, int64_t group, float* noise) {
  alignas(64) int32_t lane[W];
  for (int i = 0; i < W; ++i) lane[i] = i;
  const ints lanes = load(lane);
  for (int i = 0; i < COUNTERS; i += W) {
    const uint64_t counter = uint64_t(group) * COUNTERS + uint64_t(i);
    const words low{(vector_u)lanes.lo, (vector_u)lanes.hi};
    words x[4];
    random_words(low + uint32_t(counter), uint32_t(counter >> 32), seed, x);
    for (int pair = 0; pair < 4; pair += 2) {
      floats first, second;
      normals(x[pair], x[pair + 1], &first, &second);
      store(noise + pair * COUNTERS + i, first);
      store(noise + (pair + 1) * COUNTERS + i, second);
    }
  }
}

template <class T>
inline void noise_groups(const NoiseCall& call, int64_t begin, int64_t end) {
  alignas(64) float noise[GROUP];
  const float low = call.clamp ? 0.0f : -INFINITY, high = call.clamp ? 1.0f : INFINITY;
  for (int64_t group = begin; group < end; ++group) {
    fill_group(call.seed, group, noise);
    const T* from = static_cast<const T*>(call.images) + group * GROUP;
    T* to = static_cast<T*>(call.noisy) + group * GROUP;
    const int count = int(std::min<int64_t>(GROUP, call.count - group * GROUP));
    for (int i = 0; i < count; ++i) {
      const float clipped = std::min(std::max(noise[i] * call.sigma, -call.clip), call.clip);
      const float value = widen(from[i]) + clipped;
      to[i] = narrow<T>(value < low ? low : value > high ? high : value);
    }
  }
}

inline void gaussian_noise(const NoiseCall& call, int64_t begin_group, int64_t end_group) {
  if (call.type == Type::float32)
    noise_groups<float>(call, begin_group, end_group);
  else if (call.type == Type::bfloat16)
    noise_groups<bfloat16>(call, begin_group, end_group);
  else
    noise_groups<float16>(call, begin_group, end_group);
}

}  // namespace FASTMT_ISA
