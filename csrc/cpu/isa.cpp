#include "cpu/isa.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

namespace rpp {
namespace {

bool supported(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return isa == Isa::plain || (isa == Isa::avx2 && avx2) || (isa == Isa::avx512 && avx512);
#else
  return isa == Isa::plain;
#endif
}

constexpr const char* kNames[] = {"plain", "avx2", "avx512"};

Isa choose() {
  const char* wanted = std::getenv("RPP_KERNELS_CPU_ISA");
  if (wanted && !*wanted) wanted = nullptr;
  for (Isa isa : {Isa::avx512, Isa::avx2, Isa::plain}) {
    if (wanted && wanted != std::string(kNames[static_cast<int>(isa)])) continue;
    if (supported(isa)) return isa;
    STD_TORCH_CHECK(!wanted, "RPP_KERNELS_CPU_ISA=", wanted, ": this processor does not have it");
  }
  STD_TORCH_CHECK(false, "RPP_KERNELS_CPU_ISA=", wanted, " is not one of avx512, avx2, plain");
  return Isa::plain;
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name() { return kNames[static_cast<int>(isa())]; }

}  // namespace rpp
