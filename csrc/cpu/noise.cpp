#include <algorithm>

#include "cpu/host.h"

namespace fastmt {

namespace {

constexpr int64_t GROUP = 128;  // elements, as in noise_kernel.h

bool same_strides(const Tensor& a, const Tensor& b) {
  const auto left = a.strides(), right = b.strides();
  return std::equal(left.begin(), left.end(), right.begin(), right.end());
}

}  // namespace

// images + clip(sigma * eps, -clip, clip), in one pass over their memory.
Tensor gaussian_noise(const Tensor& images, const Tensor& seed, double sigma, double clip,
                      bool clamp) {
  check_floating("images", images);
  Tensor noisy = empty_output_like(images);
  NoiseCall call{};
  // Images with gaps or overlaps are laid out densely first.
  if (!same_strides(images, noisy)) torch::stable::copy_(noisy, images);
  call.images = same_strides(images, noisy) ? images.data_ptr() : noisy.data_ptr();
  call.noisy = noisy.data_ptr();
  call.type = type_of(images);
  call.count = images.numel();
  call.seed = uint64_t(*static_cast<const int64_t*>(seed.data_ptr()));
  call.sigma = float(sigma);
  call.clip = float(clip);
  call.clamp = clamp;
  for_each_stretch((call.count + GROUP - 1) / GROUP, 64, [&](int64_t begin, int64_t end) {
    kernels().gaussian_noise(call, begin, end);
  });
  return noisy;
}

}  // namespace fastmt

STABLE_TORCH_LIBRARY_FRAGMENT(fastmt, m) {
  m.def(
      "gaussian_noise(Tensor images, Tensor seed, float sigma, float clip, bool clamp) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastmt, CPU, m) {
  m.impl("gaussian_noise", TORCH_BOX(&fastmt::gaussian_noise));
}
