// The options of group_advantages, for C++ and CUDA alike.
#pragma once

#include "statistics.h"

namespace rpp {

struct GroupOptions {
  enum class Baseline : int64_t { mean = 0, leave_one_out = 1, length_weighted = 2 };
  enum class Std : int64_t { none = 0, group = 1, batch = 2, leave_one_out = 3 };

  Baseline baseline;
  Std std;
  bool unbiased, keep_singletons;
  double eps;

  GroupOptions(int64_t baseline, int64_t std, bool unbiased, double eps, bool keep_singletons)
      : baseline(static_cast<Baseline>(baseline)),
        std(static_cast<Std>(std)),
        unbiased(unbiased),
        keep_singletons(keep_singletons),
        eps(eps) {}

  // What a centred score of a group of n is multiplied by.
  RPP_HD double factor(double n) const { return baseline == Baseline::leave_one_out ? n / (n < 2 ? 1 : n - 1) : 1; }
  RPP_HD double degrees(double n) const { return degrees_of(n, unbiased); }
};

}  // namespace rpp
