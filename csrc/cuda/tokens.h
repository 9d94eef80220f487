// How threads walk tokens: all of a batch, or those of a sequence that a block takes.
#pragma once

#include "cuda/sums.h"

namespace rpp::cuda {

constexpr int kTokenThreads = 256;
constexpr int kTokensEach = 4;  // of a thread, all on their way at a time

inline Grid grid_of(int64_t tokens) { return {ceil_div(tokens, kTokenThreads * kTokensEach), kTokenThreads}; }

// f(t) for the tokens of this block, of a grid_of all tokens.
template <class F>
__device__ __forceinline__ void for_tokens(int64_t tokens, const F& f) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTokenThreads * kTokensEach + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kTokensEach; ++k) {
    const int64_t t = begin + k * kTokenThreads;
    if (t < tokens) f(t);
  }
}

// f.operator()<estimator>(), chosen once for all tokens.
template <class F>
RPP_HD auto with_estimator(int64_t estimator, const F& f) {
  switch (static_cast<Kl>(estimator)) {
    case Kl::k1: return f.template operator()<Kl::k1>();
    case Kl::k2: return f.template operator()<Kl::k2>();
    case Kl::k3: return f.template operator()<Kl::k3>();
    case Kl::abs: return f.template operator()<Kl::abs>();
    default: return f.template operator()<Kl::none>();
  }
}

}  // namespace rpp::cuda
