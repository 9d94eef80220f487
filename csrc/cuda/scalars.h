// The formulas for one number a thread, and numbers as they lie in memory.
#pragma once

#include <cmath>
#include <limits>

#include "cuda/device.h"

namespace rpp::cuda {

// ---- what formulas.h asks of its number types

template <class F>
struct Traits {
  using Element = F;
};

template <class F>
using Mask = bool;

// 2^n from `shifted = n + round_magic`, whose low mantissa bits hold n.
RPP_HD float power_of_two(float shifted) {
  return std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + (127u << 23));
}
RPP_HD double power_of_two(double shifted) {
  return std::bit_cast<double>((std::bit_cast<uint64_t>(shifted) << 52) + (1023ull << 52));
}

#include "formulas.h"

// ---- memory: any storage type in and out, computed in float or double

RPP_HD float widened(float x) { return x; }
RPP_HD double widened(double x) { return x; }
RPP_HD float widened(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
RPP_HD float widened(f16 x) { return static_cast<float>(x); }

template <class S>
RPP_HD S narrowed(Compute<S> x) {
  if constexpr (std::is_same_v<S, bf16>) {  // round to nearest even; a NaN keeps its top bits and stays one
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(x == x ? rounded : (bits >> 16) | 0x40u)};
  } else {
    return static_cast<S>(x);
  }
}

// As many as lie in 16 bytes.
template <class S>
constexpr int kVector = 16 / sizeof(S);

template <class S>
struct alignas(16) Vector16 {
  S each[kVector<S>];
};

// N numbers from p on, of which the first begins 16 bytes.
template <class S, int N>
struct Loaded {  // not yet widened: the loads of several are to be on their way before the first is waited for
  static_assert(N % kVector<S> == 0);
  Bytes16 bytes[N / kVector<S>];

  __device__ __forceinline__ void load(const S* p) {
#pragma unroll
    for (int i = 0; i < N / kVector<S>; ++i) bytes[i] = load_16_bytes(p + i * kVector<S>);
  }
  __device__ __forceinline__ void widen(Compute<S> (&x)[N]) const {
#pragma unroll
    for (int i = 0; i < N / kVector<S>; ++i) {
      const auto vector = std::bit_cast<Vector16<S>>(bytes[i]);
#pragma unroll
      for (int k = 0; k < kVector<S>; ++k) x[i * kVector<S> + k] = widened(vector.each[k]);
    }
  }
};

// N numbers of the shared memory, of which the first begins 16 bytes.
template <class S, int N>
__device__ __forceinline__ void load_shared(const S* p, Compute<S> (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N / kVector<S>; ++i) {
    const auto vector = *reinterpret_cast<const Vector16<S>*>(p + i * kVector<S>);
#pragma unroll
    for (int k = 0; k < kVector<S>; ++k) x[i * kVector<S> + k] = widened(vector.each[k]);
  }
}

template <class S, int N>
__device__ __forceinline__ void store_whole(S* p, const Compute<S> (&x)[N]) {
  static_assert(N % kVector<S> == 0);
#pragma unroll
  for (int i = 0; i < N / kVector<S>; ++i) {
    Vector16<S> vector;
#pragma unroll
    for (int k = 0; k < kVector<S>; ++k) vector.each[k] = narrowed<S>(x[i * kVector<S> + k]);
    store_16_bytes(p + i * kVector<S>, std::bit_cast<Bytes16>(vector));
  }
}

}  // namespace rpp::cuda
