// The number types of kernels, and what their exponential is made of: for C++ and CUDA alike.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define RPP_HD __host__ __device__ __forceinline__
#else
#define RPP_HD inline __attribute__((always_inline))
#endif

namespace rpp {

struct bf16 {
  uint16_t bits;
};
#if defined(__CUDACC__)
using f16 = __half;
#elif defined(__aarch64__)
using f16 = __fp16;
#else
using f16 = _Float16;
#endif

// What a storage type is computed in.
template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class Element>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr int degree = 4;
  static constexpr double q[] = {0.5, 0.1666657702559799, 0.041666554662050534, 0.008363173074513711,
                                 0.001392617611993558};
  static constexpr double round_magic = 12582912.0;  // 1.5 * 2^23
  static constexpr double ln2_high = 0.693359375, ln2_low = -2.12194440054690583e-4;
  static constexpr double lowest = -87.33654, highest = 89.0;
};

template <>
struct ExpConstants<double> {
  static constexpr int degree = 9;
  static constexpr double q[] = {0.5000000000000001,     0.16666666666666669,    0.041666666666624164,
                                 0.008333333333330065,   0.0013888888917196719,  0.00019841269863040545,
                                 2.4801521322368692e-05, 2.7557268480310024e-06, 2.7620075879983367e-07,
                                 2.5100375832561234e-08};
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 0.693145751953125, ln2_low = 1.42860682030941723212e-6;
  static constexpr double lowest = -708.39, highest = 710.0;
};

}  // namespace rpp
