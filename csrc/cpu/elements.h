// Elements of tensors in half precision, to float32 and back.
#pragma once

#include "cpu/lanes.h"

namespace FASTMT_ISA {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float widen(float x) { return x; }
inline float widen(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline float widen(float16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const float finite = bit_cast<float>(magnitude) * bit_cast<float>(0x77800000u);  // 2^112
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return bit_cast<float>(bit_cast<uint32_t>(finite) | special | uint32_t(x.bits & 0x8000) << 16);
}

// Chosen as floats: of integers GCC makes branches, and loops around them stay scalar.
inline uint32_t pick(bool first, uint32_t a, uint32_t b) {
  return bit_cast<uint32_t>(first ? bit_cast<float>(a) : bit_cast<float>(b));
}

template <class T>
inline T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline bfloat16 narrow<bfloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {uint16_t(x != x ? 0x7fc0u : rounded)};
}
template <>
inline float16 narrow<float16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t special = pick(magnitude > 0x7f800000u, 0x7e00u, 0x7c00u);
  const uint32_t small = pick(magnitude < 0x38800000u, subnormal, normal);
  const uint32_t half = pick(magnitude >= 0x47800000u, special, small);
  return {uint16_t(half | (bits >> 16 & 0x8000))};
}

}  // namespace FASTMT_ISA
