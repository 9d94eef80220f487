// Compiles RPP_KERNELS (a header of kernels) once for each instruction set, into rpp::plain, rpp::avx2 and rpp::avx512.
//
// Everything such a header uses that is not a plain type must be compiled with it, so vec.h and formulas.h are included
// anew inside each namespace; the standard headers come first, outside, so that none of their inline functions is
// compiled for instructions that the machine may lack (the linker keeps one copy of those).
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC bug 105593, in the intrinsics themselves
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "cpu/isa.h"

namespace rpp::plain {
#define RPP_VECTOR_BYTES 16
#include "cpu/vec.h"
#include "formulas.h"
#include RPP_KERNELS
#undef RPP_VECTOR_BYTES
}  // namespace rpp::plain

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace rpp::avx2 {
#define RPP_VECTOR_BYTES 32
#include "cpu/vec.h"
#include "formulas.h"
#include RPP_KERNELS
#undef RPP_VECTOR_BYTES
}  // namespace rpp::avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace rpp::avx512 {
#define RPP_VECTOR_BYTES 64
#include "cpu/vec.h"
#include "formulas.h"
#include RPP_KERNELS
#undef RPP_VECTOR_BYTES
}  // namespace rpp::avx512
#pragma GCC pop_options

// Calls KERNEL(...) of the chosen instruction set.
#define RPP_CALL(KERNEL, ...)                                              \
  (::rpp::isa() == ::rpp::Isa::avx512 ? ::rpp::avx512::KERNEL(__VA_ARGS__) \
   : ::rpp::isa() == ::rpp::Isa::avx2 ? ::rpp::avx2::KERNEL(__VA_ARGS__)   \
                                      : ::rpp::plain::KERNEL(__VA_ARGS__))
#else
#define RPP_CALL(KERNEL, ...) (::rpp::plain::KERNEL(__VA_ARGS__))
#endif
