// How the elements of many tensors are shared out to threads.
#pragma once

#include <algorithm>

#include "cpu/host.h"

namespace fastmt {

constexpr int64_t CHUNK = 16 * 1024;  // elements in one piece of work, as in fastmt/ema_table.py

inline uint32_t mixed(uint32_t x) {  // as in ema_kernel.h
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

inline int64_t chunks_of(int64_t elements) { return (elements + CHUNK - 1) / CHUNK; }

// f(row, first, last) for each chunk of elements; start[row] counts the chunks before a row.
template <class F>
void for_each_chunk(const int64_t* start, int64_t rows, const int64_t* length, int64_t stride,
                    const F& f) {
  int64_t elements = 1;
  for (int64_t row = 0; row < rows; ++row) elements += length[row * stride];
  // Small tensors fill no chunk; what is less than two is sooner done than handed to a thread.
  const int64_t stretch = std::max<int64_t>(8, 2 * CHUNK * start[rows] / elements);
  for_each_stretch(start[rows], stretch, [&](int64_t begin, int64_t end) {
    int64_t row = std::upper_bound(start, start + rows + 1, begin) - start - 1;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (start[row + 1] <= chunk) ++row;
      const int64_t first = (chunk - start[row]) * CHUNK;
      f(row, first, std::min(first + CHUNK, length[row * stride]));
    }
  });
}

}  // namespace fastmt
