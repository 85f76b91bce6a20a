// Weights, masks and labels of output pixels, at the columns of a step or for a whole row.
#pragma once

#include "cpu/cells.h"

namespace FASTMT_ISA {

// Values of a map (N, height, width) at W output columns of a row; 0 where there is none.
template <class T, class To>
inline void gather(const View& map, int64_t image, int out_row, const int32_t* columns, To* to,
                   To (*convert)(T)) {
  const T* row = static_cast<const T*>(map.data) + image * map.stride[0] + out_row * map.stride[1];
  for (int i = 0; i < W; ++i)
    to[i] = columns[i] < 0 ? To(0) : convert(row[columns[i] * map.stride[2]]);
}

inline void gather_floats(const View& map, int64_t image, int row, const int32_t* columns,
                          float* to) {
  if (map.type == Type::float32)
    gather<float, float>(map, image, row, columns, to, [](float x) { return x; });
  else if (map.type == Type::bfloat16)
    gather<bfloat16, float>(map, image, row, columns, to, [](bfloat16 x) { return widen(x); });
  else
    gather<float16, float>(map, image, row, columns, to, [](float16 x) { return widen(x); });
}

// A row of a map of labels, as 64-bit integers.
inline void load_row(const View& map, int64_t image, int row, int width, int64_t* to) {
  const int64_t offset = image * map.stride[0] + row * map.stride[1], step = map.stride[2];
  const auto copy = [&](const auto* source) {
    if (step == 1)
      std::copy_n(source, width, to);
    else
      for (int x = 0; x < width; ++x) to[x] = source[x * step];
  };
  if (map.type == Type::uint8)
    copy(static_cast<const uint8_t*>(map.data) + offset);
  else
    copy(static_cast<const int64_t*>(map.data) + offset);
}

}  // namespace FASTMT_ISA
