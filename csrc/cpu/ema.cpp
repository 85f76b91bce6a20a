#include <algorithm>
#include <cstring>

#include "cpu/ema_host.h"

namespace fastmt {

// Rows of `table` are EmaRow; Type::uint8 is for what is copied byte by byte. `starts` (rows + 1)
// counts the chunks before each row. A negative decay changes nothing, 1 keeps an average, whatever
// the student holds. `draws`, one for each decay, are there where a row is stochastic.
void ema_update_(const Tensor& table, const Tensor& starts, const Tensor& decays,
                 const std::optional<Tensor>& draws) {
  constexpr int64_t columns = sizeof(EmaRow) / sizeof(int64_t);
  const auto* rows = static_cast<const EmaRow*>(table.data_ptr());
  const auto* start = static_cast<const int64_t*>(starts.data_ptr());
  const auto* decay_of = static_cast<const double*>(decays.data_ptr());
  const auto* draw_of = draws ? static_cast<const int64_t*>(draws->data_ptr()) : nullptr;
  for_each_chunk(start, table.size(0), &rows->length, columns,
                 [&](int64_t row, int64_t first, int64_t last) {
    const EmaRow& entry = rows[row];
    auto* teacher = reinterpret_cast<char*>(entry.teacher);
    const auto* student = reinterpret_cast<const char*>(entry.student);
    const double decay = decay_of[entry.owner];
    if (decay < 0 || (decay == 1 && entry.mode != EmaMode::copy)) return;
    const Type type = Type(entry.teacher_type);
    if (type == Type::uint8) {
      std::memcpy(teacher + first, student + first, last - first);
      return;
    }
    EmaSpan span{teacher, student, type, Type(entry.student_type), first, last};
    if (entry.mode == EmaMode::stochastic) {
      span.rounding = Rounding::stochastic;
      span.key = mixed(uint32_t(draw_of[entry.owner]) ^ uint32_t(entry.number));
    } else if (entry.mode == EmaMode::kahan) {
      span.rounding = Rounding::kahan;
      span.compensation = reinterpret_cast<void*>(entry.lost);
    }
    kernels().ema(span, entry.mode == EmaMode::copy ? 0 : decay);
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
