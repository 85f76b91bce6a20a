#define USE_CUDA  // declares what only a CUDA build of torch defines
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "cuda/host.h"

namespace fastmt::cuda {

OnDevice::OnDevice(const Tensor& tensor) : stream(nullptr), guard_(nullptr) {
  const int32_t device = tensor.get_device_index();
  DeviceGuardHandle guard = nullptr;
  STD_TORCH_CHECK(aoti_torch_create_device_guard(device, &guard) == AOTI_TORCH_SUCCESS &&
                      aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
                  "no current stream on device ", device);
  guard_ = guard;
}

OnDevice::~OnDevice() { aoti_torch_delete_device_guard(static_cast<DeviceGuardHandle>(guard_)); }

}  // namespace fastmt::cuda
