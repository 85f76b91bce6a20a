// Slices of volumes, interpolated along their depth. Mirrors fastmt/slices.py.
#include <algorithm>
#include <cstdlib>

#include "cpu/host.h"

namespace fastmt {

namespace {

constexpr int64_t STRETCH = 4096;  // floats of a slice, one piece of work

// Places of output slices z among input slices: (step * z + first) / unit, in whole numbers.
struct Places {
  int64_t step, first, unit, last;

  Places(int64_t depth, int64_t out, bool align_corners) {
    unit = align_corners ? std::max<int64_t>(out - 1, 1) : 2 * out;
    step = align_corners ? (out > 1 ? depth - 1 : 0) : 2 * depth;
    first = align_corners ? 0 : depth - out;
    last = (depth - 1) * unit;
  }

  int64_t place(int64_t z) const { return std::clamp<int64_t>(step * z + first, 0, last); }

  // What output slice z takes of input slice k.
  float share(int64_t z, int64_t k) const {
    const int64_t reach = std::abs(place(z) - k * unit);
    return reach < unit ? float(1 - double(reach) / double(unit)) : 0;
  }

  // The output slices that may take something of input slice k: [begin, end).
  int64_t begin(int64_t k) const {
    const int64_t past = (k - 1) * unit - first;
    return step == 0 || past < 0 ? 0 : past / step + 1;
  }
  int64_t end(int64_t k, int64_t out) const {
    return place(out - 1) < (k + 1) * unit ? out : begin(k + 2);
  }
};

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
  const Places places(from.depth, out, align_corners);
  for_each_slice(to.images, out, to.length, [&](int64_t image, int64_t z, int64_t i, int64_t end) {
    const int64_t lower = places.place(z) / places.unit;
    const float share = places.share(z, lower), other = 1 - share;
    const float* near = from.at(image, lower);
    float* into = to.at(image, z);
    if (other == 0) {  // nothing of the next slice, whatever it holds
      std::copy(near + i, near + end, into + i);
      return;
    }
    const float* far = near + from.length;
    for (; i < end; ++i) into[i] = share * near[i] + other * far[i];
  });
  return resampled;
}

// The gradient (N, out, ...) of what resample_slices returned -> that of its slices, `depth` of them.
Tensor resample_slices_backward(const Tensor& gradient, int64_t depth, bool align_corners) {
  const Tensor result = empty_slices(gradient, depth);
  const Slices from(gradient), to(result);
  const Places places(depth, from.depth, align_corners);
  for_each_slice(to.images, depth, to.length, [&](int64_t image, int64_t k, int64_t i, int64_t end) {
    float* into = to.at(image, k);
    std::fill(into + i, into + end, 0.0f);
    for (int64_t z = places.begin(k); z < places.end(k, from.depth); ++z) {
      const float share = places.share(z, k);
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
