// Slices of volumes, interpolated along their depth. As kernels/slices.py.
#include <algorithm>

#include "cpu/cells_host.h"

namespace fastmt {

namespace {

constexpr int64_t STRETCH = 4096;  // floats of a slice, one piece of work

// f(image, slice, begin, end) for stretches of all slices.
template <class F>
void for_each_slice(int64_t images, int64_t slices, int64_t length, const F& f) {
  const int64_t pieces = (length + STRETCH - 1) / STRETCH;
  for_each_stretch(images * slices * pieces, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / pieces, at = i % pieces * STRETCH;
      f(row / slices, row % slices, at, std::min(at + STRETCH, length));
    }
  });
}

struct Slices {
  float* data;
  int64_t images, depth, length;

  explicit Slices(const Tensor& tensor) : images(tensor.size(0)), depth(tensor.size(1)) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous(),
                    "slices: expected contiguous float32");
    data = static_cast<float*>(tensor.data_ptr());
    length = 1;
    for (int64_t d = 2; d < tensor.dim(); ++d) length *= tensor.size(d);
  }

  float* at(int64_t image, int64_t slice) const {
    return data + (image * depth + slice) * length;
  }
};

Tensor empty_slices(const Tensor& like, int64_t depth) {
  const auto sizes = like.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape[1] = depth;
  return torch::stable::new_empty(like, shape);
}

}  // namespace

// (N, D, ...) -> (N, out, ...), float32 and contiguous.
Tensor resample_slices(const Tensor& slices, int64_t out, bool align_corners) {
  const Tensor resampled = empty_slices(slices, out);
  const Slices from(slices), to(resampled);
  const Axis axis(from.depth, out, align_corners);
  for_each_slice(to.images, out, to.length, [&](int64_t image, int64_t z, int64_t i, int64_t end) {
    const float t = axis.t[z], rest = 1 - t;
    const float* near = from.at(image, axis.index[z]);
    const float* far = near + from.length;
    float* into = to.at(image, z);
    if (t == 0 || t == 1) {  // nothing of the other slice, whatever it holds
      const float* alone = t == 0 ? near : far;
      std::copy(alone + i, alone + end, into + i);
      return;
    }
    for (; i < end; ++i) into[i] = rest * near[i] + t * far[i];
  });
  return resampled;
}

// The gradient (N, out, ...) of what resample_slices returned -> that of its slices, `depth` of them.
Tensor resample_slices_backward(const Tensor& gradient, int64_t depth, bool align_corners) {
  const Tensor result = empty_slices(gradient, depth);
  const Slices from(gradient), to(result);
  const Axis axis(depth, from.depth, align_corners);
  const auto first = axis.index.begin(), last = axis.index.end();
  for_each_slice(to.images, depth, to.length, [&](int64_t image, int64_t k, int64_t i, int64_t end) {
    float* into = to.at(image, k);
    std::fill(into + i, into + end, 0.0f);
    const int64_t begin_z = std::lower_bound(first, last, k - 1) - first;
    const int64_t end_z = std::upper_bound(first, last, k) - first;
    for (int64_t z = begin_z; z < end_z; ++z) {
      const float share = axis.index[z] == k ? 1 - axis.t[z] : axis.t[z];
      const float* slice = from.at(image, z);
      if (share > 0)
        for (int64_t x = i; x < end; ++x) into[x] += share * slice[x];
    }
  });
  return result;
}

}  // namespace fastmt

STABLE_TORCH_LIBRARY_FRAGMENT(fastmt, m) {
  m.def("resample_slices(Tensor slices, SymInt out, bool align_corners) -> Tensor");
  m.def("resample_slices_backward(Tensor gradient, SymInt depth, bool align_corners) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastmt, CPU, m) {
  m.impl("resample_slices", TORCH_BOX(&fastmt::resample_slices));
  m.impl("resample_slices_backward", TORCH_BOX(&fastmt::resample_slices_backward));
}
