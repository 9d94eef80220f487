#pragma once

#include "choices.h"
#include "cpu/isa.h"

namespace rpp {

constexpr int kRolloutSums = 5;  // RolloutStats, in its order

template <class T>
struct RolloutArgs {
  const T *old_logps, *sampling_logps;
  const bool* mask;  // may be null
  const int64_t* cu_seqlens;
  RolloutLevel level;
  bool truncate;  // ratios outside [low, high] are brought to it; else their weight is 0
  T low, high, log_ratio_clamp;
  T* weights;
  double* sums;  // kRolloutSums for each sequence
};

}  // namespace rpp
