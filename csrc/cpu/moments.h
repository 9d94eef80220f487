#pragma once

#include <cstdint>

namespace rpp {

// Count, mean and sum of squared deviations: they merge exactly as one pass over both parts would have found (Chan et
// al. 1979), and always in the same order, so that a result does not depend on the number of threads.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  void merge(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, shift = other.mean - mean;
    squares += other.squares + shift * shift * count * (other.count / total);
    mean += shift * (other.count / total);
    count = total;
  }
};

enum class EpsMode : int64_t { floor = 0, add_var = 1, add_std = 2 };

}  // namespace rpp
