#include <algorithm>

#include "cpu/host.h"

namespace fastmt {

namespace {

constexpr int64_t CHUNK = 16 * 1024;  // elements in one piece of work

// A row of the table: teacher pointer, student pointer, length, teacher dtype, student dtype.
constexpr int64_t COLUMNS = 5;

}  // namespace

// Rows of `table` as above, dtypes as in Type; `starts` (rows + 1) counts the chunks before each row.
void ema_update_(const Tensor& table, const Tensor& starts, const Tensor& decay) {
  const auto* rows = static_cast<const int64_t*>(table.data_ptr());
  const auto* start = static_cast<const int64_t*>(starts.data_ptr());
  const double keep = *static_cast<const double*>(decay.data_ptr());
  const int64_t count = table.size(0), chunks = start[count];
  for_each_stretch(chunks, 8, [&](int64_t begin, int64_t end) {
    int64_t row = std::upper_bound(start, start + count + 1, begin) - start - 1;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (start[row + 1] <= chunk) ++row;
      const int64_t* entry = rows + row * COLUMNS;
      const int64_t first = (chunk - start[row]) * CHUNK;
      kernels().ema({reinterpret_cast<void*>(entry[0]), reinterpret_cast<const void*>(entry[1]),
                     Type(entry[3]), Type(entry[4]), first, std::min(first + CHUNK, entry[2])},
                    keep);
    }
  });
}

// data *= scale * factor in place, for a dense tensor; both factors are 0-dim float32.
void scale_(Tensor data, const Tensor& scale, const Tensor& factor) {
  const float product = *static_cast<const float*>(scale.data_ptr()) *
                        *static_cast<const float*>(factor.data_ptr());
  if (product == 1) return;
  const Type type = type_of(data);
  const int64_t elements = data.numel(), chunks = (elements + CHUNK - 1) / CHUNK;
  for_each_stretch(chunks, 8, [&](int64_t begin, int64_t end) {
    kernels().scale(data.data_ptr(), type, begin * CHUNK, std::min(end * CHUNK, elements), product);
  });
}

}  // namespace fastmt
