// A stub of the CUDA runtime for PyTorch: memory is the host's, a copy is made at once, a kernel
// does nothing and takes no time. What is left of a call is what its host does.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

extern "C" void note_launch();  // of driver.cpp

namespace {

thread_local int current_device = 0;
thread_local bool capturing = false;

int device_count() {
  static const char* asked = std::getenv("FASTMT_STUB_GPUS");
  return asked ? std::atoi(asked) : 1;
}

using Clock = std::chrono::steady_clock;
struct Event {
  Clock::time_point at;
};
Event* of(cudaEvent_t event) { return reinterpret_cast<Event*>(event); }

template <typename T>
T handle() {  // of what has no contents here
  static size_t next = 0x10000;
  return reinterpret_cast<T>(next += 16);
}

constexpr cudaError_t OK = cudaSuccess;

}  // namespace

#define ANSWER(call, ...) \
  cudaError_t call {      \
    __VA_ARGS__;          \
    return OK;            \
  }

#pragma GCC visibility push(default)
extern "C" {

// Launches, as a program that nvcc has compiled makes them, and its registration of kernels.
ANSWER(__cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t), note_launch())
ANSWER(cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t), note_launch())
ANSWER(cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**), note_launch())
ANSWER(cudaGraphLaunch(cudaGraphExec_t, cudaStream_t), note_launch())
ANSWER(__cudaGetKernel(cudaKernel_t* kernel, const void* function),
       *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function)))
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t) { return 0; }
ANSWER(__cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*))
char __cudaInitModule(void**) { return 1; }
void** __cudaRegisterFatBinary(void*) {
  static void* module;
  return &module;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
ANSWER(cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*),
       *attributes = cudaFuncAttributes{};
       attributes->maxThreadsPerBlock = 1024; attributes->numRegs = 32;
       attributes->binaryVersion = attributes->ptxVersion = 90)
ANSWER(cudaFuncSetAttribute(const void*, cudaFuncAttribute, int))
ANSWER(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int, size_t,
                                                              unsigned),
       *count = 4)
ANSWER(cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void*, int, size_t),
       *count = 4)

// The devices: H100s in their limits.
ANSWER(cudaGetDeviceCount(int* count), *count = device_count())
ANSWER(cudaGetDevice(int* device), *device = current_device)
cudaError_t cudaSetDevice(int device) {
  if (device >= device_count()) return cudaErrorInvalidDevice;
  current_device = device;
  return OK;
}
ANSWER(cudaInitDevice(int, unsigned, unsigned))
ANSWER(cudaDeviceSynchronize())
ANSWER(cudaDeviceCanAccessPeer(int* can, int, int), *can = 0)
ANSWER(cudaDeviceEnablePeerAccess(int, unsigned))
ANSWER(cudaDeviceGetPCIBusId(char* id, int room, int device),
       std::snprintf(id, room, "0000:%02x:00.0", device))
ANSWER(cudaDeviceGetStreamPriorityRange(int* least, int* greatest), *least = 0; *greatest = -5)
ANSWER(cudaDriverGetVersion(int* version), *version = CUDART_VERSION)
ANSWER(cudaRuntimeGetVersion(int* version), *version = CUDART_VERSION)
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
    case cudaDevAttrWarpSize: *value = 32; break;
    default: *value = 1;
  }
  return OK;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = cudaDeviceProp{};
  std::strcpy(properties->name, "stub of a GPU");
  properties->major = 9;
  properties->totalGlobalMem = size_t(16) << 30;
  properties->multiProcessorCount = 132;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->sharedMemPerBlock = 48 << 10;
  properties->sharedMemPerBlockOptin = 227 << 10;
  properties->sharedMemPerMultiprocessor = 228 << 10;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->l2CacheSize = 50 << 20;
  properties->maxGridSize[0] = (1u << 31) - 1;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  return OK;
}

// Memory.
ANSWER(cudaMalloc(void** data, size_t bytes),
       *data = std::aligned_alloc(4096, (bytes + 4095) & ~size_t(4095)))
ANSWER(cudaMallocAsync(void** data, size_t bytes, cudaStream_t), cudaMalloc(data, bytes))
ANSWER(cudaHostAlloc(void** data, size_t bytes, unsigned), cudaMalloc(data, bytes))
ANSWER(cudaFree(void* data), std::free(data))
ANSWER(cudaFreeAsync(void* data, cudaStream_t), std::free(data))
ANSWER(cudaFreeHost(void* data), std::free(data))
ANSWER(cudaHostRegister(void*, size_t, unsigned))
ANSWER(cudaHostUnregister(void*))
ANSWER(cudaMemGetInfo(size_t* free, size_t* total), *free = *total = size_t(16) << 30)
ANSWER(cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind),
       std::memmove(to, from, bytes))
ANSWER(cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t),
       std::memmove(to, from, bytes))
ANSWER(cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t),
       std::memmove(to, from, bytes))
ANSWER(cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind))
ANSWER(cudaMemset(void* data, int value, size_t bytes), std::memset(data, value, bytes))
ANSWER(cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t),
       std::memset(data, value, bytes))
ANSWER(cudaGetSymbolAddress(void** data, const void*), static char room[1 << 20]; *data = room)
ANSWER(cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* data),
       *attributes = cudaPointerAttributes{}; attributes->type = cudaMemoryTypeDevice;
       attributes->devicePointer = const_cast<void*>(data))
ANSWER(cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int), *pool = handle<cudaMemPool_t>())
ANSWER(cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value),
       std::memset(value, 0, sizeof(size_t)))
ANSWER(cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t))
ANSWER(cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*))
ANSWER(cudaMemPoolTrimTo(cudaMemPool_t, size_t))

// Streams and events: all is done when it is asked for.
ANSWER(cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int),
       *stream = handle<cudaStream_t>())
ANSWER(cudaStreamDestroy(cudaStream_t))
ANSWER(cudaStreamQuery(cudaStream_t))
ANSWER(cudaStreamSynchronize(cudaStream_t))
ANSWER(cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned))
ANSWER(cudaStreamGetPriority(cudaStream_t, int* priority), *priority = 0)
ANSWER(cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void* data, unsigned),
       call(stream, OK, data))
ANSWER(cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t call, void* data), call(data))
ANSWER(cudaEventCreate(cudaEvent_t* event), *event = reinterpret_cast<cudaEvent_t>(new Event{}))
ANSWER(cudaEventCreateWithFlags(cudaEvent_t* event, unsigned), cudaEventCreate(event))
ANSWER(cudaEventDestroy(cudaEvent_t event), delete of(event))
ANSWER(cudaEventRecord(cudaEvent_t event, cudaStream_t), of(event)->at = Clock::now())
ANSWER(cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t, unsigned),
       of(event)->at = Clock::now())
ANSWER(cudaEventQuery(cudaEvent_t))
ANSWER(cudaEventSynchronize(cudaEvent_t))
ANSWER(cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end),
       *milliseconds =
           std::chrono::duration<float, std::milli>(of(end)->at - of(begin)->at).count())

// Graphs: they are captured and launched as if they held something.
ANSWER(cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode), capturing = true)
ANSWER(cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph), capturing = false;
       *graph = handle<cudaGraph_t>())
ANSWER(cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*))
ANSWER(cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status),
       *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone)
ANSWER(cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                unsigned long long* id, cudaGraph_t*, const cudaGraphNode_t**,
                                const cudaGraphEdgeData**, size_t* count),
       cudaStreamIsCapturing(stream, status);
       if (id) *id = 1; if (count) *count = 0)
ANSWER(cudaGraphInstantiate(cudaGraphExec_t* graph, cudaGraph_t, unsigned long long),
       *graph = handle<cudaGraphExec_t>())
ANSWER(cudaGraphInstantiateWithFlags(cudaGraphExec_t* graph, cudaGraph_t, unsigned long long),
       *graph = handle<cudaGraphExec_t>())
ANSWER(cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* count), *count = 1)
ANSWER(cudaGraphDestroy(cudaGraph_t))
ANSWER(cudaGraphExecDestroy(cudaGraphExec_t))

const char* cudaGetErrorName(cudaError_t) { return "error of the stub"; }
const char* cudaGetErrorString(cudaError_t) { return "error of the stub"; }
ANSWER(cudaGetLastError())
ANSWER(cudaPeekAtLastError())
ANSWER(cudaProfilerStart())
ANSWER(cudaProfilerStop())
ANSWER(cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                        unsigned long long,
                                        cudaDriverEntryPointQueryResult* result),
       *function = dlsym(RTLD_DEFAULT, name);
       if (result) *result = *function ? cudaDriverEntryPointSuccess
                                       : cudaDriverEntryPointSymbolNotFound)

}  // extern "C"
#pragma GCC visibility pop
