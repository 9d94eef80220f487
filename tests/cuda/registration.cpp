// The kernels of csrc/cuda on CPU tensors: torch.ops.rpp_kernels_emulated.
#include "schemas.h"

STABLE_TORCH_LIBRARY(rpp_kernels_emulated, m) { rpp::define_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(rpp_kernels_emulated, CPU, m) {
#define RPP_IMPLEMENT(op) RPP_IMPLEMENT_ONE(cuda, op)
  RPP_OPS(RPP_IMPLEMENT)
  RPP_CUDA_OPS(RPP_IMPLEMENT)
#undef RPP_IMPLEMENT
}
