// What the host asks of CUDA, for the C++ compiler as well, which knows no kernels.
#pragma once

#include <cuda_runtime_api.h>

namespace rpp::cuda {

cudaStream_t current_stream(int device);  // torch's
void check(cudaError_t result, const char* what);
int attribute(cudaDeviceAttr name, int device);

}  // namespace rpp::cuda
