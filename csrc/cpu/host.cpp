#include "cpu/host.h"

#include <algorithm>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastmt {

Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    case ScalarType::Bool:
    case ScalarType::Byte: return Type::uint8;
    case ScalarType::Long: return Type::int64;
    default: STD_TORCH_CHECK(false, "dtype not supported by the C++ kernels");
  }
  return Type::float32;
}

void check_floating(const char* name, const Tensor& tensor) {
  const Type type = type_of(tensor);
  STD_TORCH_CHECK(type != Type::uint8 && type != Type::int64, name,
                  ": got integers, expected float32, bfloat16 or float16");
}

namespace {

// Sizes and strides of the pixel dimensions of an operand, size-1 dimensions left out.
void fill(const Operand& operand, Pixels* pixels) {
  const Tensor& tensor = *operand.tensor;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  View& view = *operand.view;
  view.data = tensor.data_ptr();
  view.type = type_of(tensor);
  view.class_stride = operand.has_classes ? strides[1] : 0;
  pixels->rank = 0;
  pixels->count = 1;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (operand.has_classes && d == 1) continue;
    pixels->count *= sizes[d];
    if (sizes[d] == 1) continue;
    STD_TORCH_CHECK(pixels->rank < MAX_RANK, "more than ", MAX_RANK, " dimensions");
    pixels->size[pixels->rank] = sizes[d];
    view.stride[pixels->rank++] = strides[d];
  }
}

bool adjacent(const std::vector<Operand>& operands, const Pixels& pixels, int outer, int inner) {
  return std::all_of(operands.begin(), operands.end(), [&](const Operand& operand) {
    const View& view = *operand.view;
    return view.stride[outer] == view.stride[inner] * pixels.size[inner];
  });
}

}  // namespace

Pixels describe(const std::vector<Operand>& operands) {
  Pixels pixels;
  for (const Operand& operand : operands) fill(operand, &pixels);
  if (pixels.rank == 0) {
    pixels.rank = 1;
    pixels.size[0] = 1;
    for (const Operand& operand : operands) operand.view->stride[0] = 1;
  }
  int kept = 0;
  for (int d = 1; d < pixels.rank; ++d) {
    const bool merged = adjacent(operands, pixels, kept, d);
    const int64_t size = merged ? pixels.size[kept] * pixels.size[d] : pixels.size[d];
    if (!merged) ++kept;
    pixels.size[kept] = size;
    for (const Operand& operand : operands) operand.view->stride[kept] = operand.view->stride[d];
  }
  pixels.rank = kept + 1;
  return pixels;
}

int tile_size(int64_t classes) {
  constexpr int64_t floats_in_cache = 16 * 1024;
  // Lanes of the widest instruction set, twice: of shorter stretches of each class the memory's
  // prefetching gets nothing, and 150 classes take 1.5 times as long.
  constexpr int64_t step = 64;
  return int(std::clamp<int64_t>(floats_in_cache / (2 * classes) / step * step, step, 256));
}

namespace {

constexpr uintptr_t HUGE_PAGE = 2 << 20;

// fastmt/kept_memory.py
Tensor kept_output_like(const Tensor& tensor) {
  StableIValue stack[] = {torch::stable::detail::from(tensor)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("fastmt::output_like", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace

Tensor empty_output_like(const Tensor& tensor) {
  const uintptr_t bytes = uintptr_t(tensor.numel()) * tensor.element_size();
  if (bytes < 2 * HUGE_PAGE) return torch::stable::empty_like(tensor);
  Tensor output = kept_output_like(tensor);
#if defined(__linux__)
  const uintptr_t begin = reinterpret_cast<uintptr_t>(output.data_ptr());
  const uintptr_t first = (begin + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  if (begin + bytes >= first + HUGE_PAGE)
    madvise(reinterpret_cast<void*>(first), (begin + bytes - first) / HUGE_PAGE * HUGE_PAGE,
            MADV_HUGEPAGE);
#endif
  return output;
}

bool outgrows_caches(const Tensor& tensor) {
  constexpr int64_t most = 32 << 20;  // a last-level cache of today's
  return tensor.numel() * int64_t(tensor.element_size()) >= most;
}

GradientScale gradient_scale(const Tensor& logits, int64_t pixels, bool by_pixels,
                             double class_share) {
  const bool half = type_of(logits) == Type::float16;
  if (pixels == 0) return {1, false};
  if (!half && by_pixels) return {float(1 / double(pixels)), true};
  if (!half) return {1, false};
  const double cells = double(logits.numel()) / double(logits.size(1));
  const double in_cell = std::max(double(pixels) / cells, 1.0);
  return {float(1 / (in_cell * class_share)), false};
}

Tensor scalar_tensor(double value) {
  AtenTensorHandle handle;  // past the dispatcher, whose search by name takes longer than all else
  STD_TORCH_CHECK(
      aoti_torch_empty_strided(0, nullptr, nullptr, aoti_torch_dtype_float32(),
                               aoti_torch_device_type_cpu(), 0, &handle) == AOTI_TORCH_SUCCESS,
      "no memory for a scalar");
  const Tensor scalar(handle);
  *static_cast<float*>(scalar.data_ptr()) = float(value);
  return scalar;
}

}  // namespace fastmt
