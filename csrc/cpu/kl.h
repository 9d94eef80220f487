#pragma once

#include "cpu/isa.h"

namespace rpp {

template <class T>
struct KlArgs {
  const T *logps, *ref_logps;
  const bool* mask;  // may be null
  const T* dkl;      // null: out is the penalty; else out is dkl times its slope
  int64_t estimator;
  T log_ratio_clamp, kl_clamp;
  T* out;
};

}  // namespace rpp
