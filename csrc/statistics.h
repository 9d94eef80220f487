// Count, mean and squared deviations of values, and what whitens values by them: for C++ and CUDA alike.
#pragma once

#include <cmath>
#include <cstdint>

#include "numbers.h"

namespace rpp {

// They merge exactly as one pass over both parts would have found (Chan et al. 1979), and always in the same order, so
// that a result does not depend on the number of threads.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  RPP_HD void merge(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, shift = other.mean - mean;
    squares += other.squares + shift * shift * count * (other.count / total);
    mean += shift * (other.count / total);
    count = total;
  }
};

// What the squares are divided by for a variance.
RPP_HD double degrees_of(double count, bool unbiased) {
  const double degrees = count - unbiased;
  return degrees < 1 ? 1 : degrees;
}

enum class EpsMode : int64_t { floor = 0, add_var = 1, add_std = 2 };

struct Whitening {
  double inverse_std, slope;  // slope: d(inverse_std) / d(variance)
  double degrees;

  RPP_HD Whitening(const Moments& m, bool unbiased, double eps, EpsMode mode) : degrees(degrees_of(m.count, unbiased)) {
    const double variance = m.squares / degrees, std = std::sqrt(variance);
    if (mode == EpsMode::add_std) {
      inverse_std = 1 / (std + eps);
      slope = std > 0 ? -inverse_std * inverse_std / (2 * std) : 0;
    } else {
      const double floored = variance < eps ? eps : variance;
      inverse_std = 1 / std::sqrt(mode == EpsMode::floor ? floored : variance + eps);
      slope = mode == EpsMode::floor && variance < eps ? 0 : -0.5 * inverse_std * inverse_std * inverse_std;
    }
  }
};

// out = (value - shift) * scale + dout * dout_scale + offset. The mean is rounded to T; the offset has what that left.
template <class T>
struct Affine {
  T shift, scale, dout_scale, offset;
};

template <class T>
RPP_HD Affine<T> whitened(const Moments& m, const Whitening& w, bool shift_mean) {
  const T shift = static_cast<T>(m.mean);
  const double offset = (shift - m.mean) * w.inverse_std + (shift_mean ? 0 : m.mean);
  return {shift, static_cast<T>(w.inverse_std), T(0), static_cast<T>(offset)};
}

// dvalues = inverse_std * (dout - mean dout) + slope * sum(dout * (x - mean)) * 2 (x - mean) / degrees; without
// shift_mean the mean is added back, and with it mean dout. `sum` is that of dout, `products` that of dout * (x -
// shift) with the shift of what is returned.
template <class T>
RPP_HD Affine<T> whitened_gradient(const Moments& m, const Whitening& w, bool shift_mean, double sum, double products) {
  const T shift = static_cast<T>(m.mean);
  const double mean_dout = m.count > 0 ? sum / m.count : 0;
  const double scale = 2 * w.slope * (products + sum * (shift - m.mean)) / w.degrees;
  const double offset = scale * (shift - m.mean) - w.inverse_std * mean_dout + (shift_mean ? 0 : mean_dout);
  return {shift, static_cast<T>(scale), static_cast<T>(w.inverse_std), static_cast<T>(offset)};
}

}  // namespace rpp
