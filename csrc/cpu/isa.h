// Which instruction set the kernels run with, chosen once at run time.
#pragma once

#include "numbers.h"

#if defined(__clang__) || !defined(__GNUC__) || __GNUC__ < 12
#error "the CPU kernels need GCC 12 or later: set CXX=g++ (they use its vector types and `#pragma GCC target`)"
#endif

namespace rpp {

enum class Isa { plain, avx2, avx512 };

Isa isa();               // the widest of this processor, or what RPP_KERNELS_CPU_ISA names
const char* isa_name();  // "avx512", "avx2" or "plain"

}  // namespace rpp
