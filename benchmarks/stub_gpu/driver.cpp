// A stub of the CUDA driver: it loads and launches nothing, counts what it was asked to launch and,
// where `expect` has said how many bytes each argument of a kernel has, keeps it.
#include <cuda.h>

#include <atomic>
#include <cstring>
#include <string>
#include <vector>

namespace {

const auto here = reinterpret_cast<CUcontext>(0x1000);
std::atomic<int> launches;
bool keeps = false;
std::vector<int> sizes;
std::string launched;

template <typename T>
void keep(T value) {
  launched.append(reinterpret_cast<const char*>(&value), sizeof value);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void note_launch() { ++launches; }
int launches_so_far() { return launches; }

void expect(int count, const int* bytes) {
  keeps = true;
  sizes.assign(bytes, bytes + count);
}

// What was kept of the launches since the last call.
int take(char* to, int room) {
  const int bytes = int(launched.size());
  if (bytes <= room) std::memcpy(to, launched.data(), bytes);
  launched.clear();
  return bytes;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments,
                          void**) {
  note_launch();
  if (!keeps) return CUDA_SUCCESS;
  for (unsigned number : {config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX,
                          config->blockDimY, config->blockDimZ, config->sharedMemBytes,
                          config->numAttrs})
    keep(number);
  keep(config->hStream);
  keep(function);
  for (size_t i = 0; i < sizes.size(); ++i)
    launched.append(static_cast<const char*>(arguments[i]), sizes[i]);
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char*) {
  static size_t next = 0x2000;
  *function = reinterpret_cast<CUfunction>(next += 16);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  switch (attribute) {  // of an H100
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    default: *value = 227 * 1024;  // bytes of shared memory, and whatever else is asked
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute, CUdeviceptr address) {
  std::memcpy(value, &address, sizeof address);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) { return *context = here, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int index) { return *device = index, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult, const char** text) { return *text = "stub", CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule* module, const void*) {
  return *module = reinterpret_cast<CUmodule>(0x2000), CUDA_SUCCESS;
}

// What Triton and PyTorch look up, and need no answer of.
CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit) { return *value = 1 << 20, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) { return cuCtxGetCurrent(context); }
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  return *flags = 0, *active = 1, CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction, const CUlaunchConfig*) {
  return *count = 1, CUDA_SUCCESS;
}

}  // extern "C"
#pragma GCC visibility pop
