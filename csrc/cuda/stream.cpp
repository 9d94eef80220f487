#include "cuda/stream.h"

#include <dlfcn.h>

#include "checks.h"

namespace rpp::cuda {

void check(cudaError_t result, const char* what) {
  STD_TORCH_CHECK(result == cudaSuccess, "CUDA: ", what, ": ", cudaGetErrorString(result));
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

// By name, in the library that torch has loaded: a torch without CUDA has no such symbol, yet this extension, one for
// all torches, is to load beside it. A weak symbol would stay null, as torch keeps its libraries' names to itself.
cudaStream_t current_stream(int device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get != nullptr, "this torch has no CUDA streams: libtorch_cuda.so is not loaded");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace rpp::cuda
