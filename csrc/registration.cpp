// The kernels of torch.ops.rpp_kernels_C, and the module whose import registers them. Autograd and fake kernels belong
// to the ops above these (rpp_kernels/ops).
#include <Python.h>

#include <string>

#include "cpu/isa.h"
#include "schemas.h"

namespace rpp {
namespace {

std::string cpu_capability() { return isa_name(); }

// For which GPUs there is code: RPP_CUDA_ARCHITECTURES of setup.py, "" without any.
std::string cuda_architectures() { return RPP_CUDA_ARCHITECTURES; }

}  // namespace
}  // namespace rpp

STABLE_TORCH_LIBRARY(rpp_kernels_C, m) {
  m.def("cpu_capability() -> str");
  m.def("cuda_architectures() -> str");
  rpp::define_ops(m);
}

STABLE_TORCH_LIBRARY_IMPL(rpp_kernels_C, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&rpp::cpu_capability));
  m.impl("cuda_architectures", TORCH_BOX(&rpp::cuda_architectures));
}

STABLE_TORCH_LIBRARY_IMPL(rpp_kernels_C, CPU, m){
#define RPP_IMPLEMENT(op) RPP_IMPLEMENT_ONE(cpu, op)
    RPP_OPS(RPP_IMPLEMENT)
#undef RPP_IMPLEMENT
}

#if defined(RPP_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(rpp_kernels_C, CUDA, m){
#define RPP_IMPLEMENT(op) RPP_IMPLEMENT_ONE(cuda, op)
    RPP_OPS(RPP_IMPLEMENT) RPP_CUDA_OPS(RPP_IMPLEMENT)
#undef RPP_IMPLEMENT
}
#endif

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
