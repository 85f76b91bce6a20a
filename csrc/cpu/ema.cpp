#include <algorithm>
#include <cstring>

#include "cpu/ema_host.h"

namespace fastmt {

// Rows of `table`: teacher pointer, student pointer, length, teacher dtype, student dtype as in
// Type, which of `decays` is its, and whether it copies whatever that is. Type::uint8 is for what is
// copied byte by byte. `starts` (rows + 1) counts the chunks before each row. A negative decay
// changes nothing.
void ema_update_(const Tensor& table, const Tensor& starts, const Tensor& decays) {
  constexpr int64_t columns = 7;
  const auto* rows = static_cast<const int64_t*>(table.data_ptr());
  const auto* start = static_cast<const int64_t*>(starts.data_ptr());
  const auto* decay_of = static_cast<const double*>(decays.data_ptr());
  for_each_chunk(start, table.size(0), rows + 2, columns,
                 [&](int64_t row, int64_t first, int64_t last) {
    const int64_t* entry = rows + row * columns;
    auto* teacher = reinterpret_cast<char*>(entry[0]);
    const auto* student = reinterpret_cast<const char*>(entry[1]);
    const double decay = decay_of[entry[5]];
    if (decay < 0) return;
    if (Type(entry[3]) == Type::uint8)
      std::memcpy(teacher + first, student + first, last - first);
    else
      kernels().ema({teacher, student, Type(entry[3]), Type(entry[4]), first, last},
                    entry[6] ? 0 : decay);
  });
}

// data *= scale * factor in place, for a dense tensor; both factors are 0-dim float32.
void scale_(Tensor data, const Tensor& scale, const Tensor& factor) {
  check_floating("data", data);
  const float product = *static_cast<const float*>(scale.data_ptr()) *
                        *static_cast<const float*>(factor.data_ptr());
  if (product == 1) return;
  const Type type = type_of(data);
  const int64_t elements = data.numel();
  for_each_stretch(chunks_of(elements), 8, [&](int64_t begin, int64_t end) {
    kernels().scale(data.data_ptr(), type, begin * CHUNK, std::min(end * CHUNK, elements), product);
  });
}

}  // namespace fastmt
