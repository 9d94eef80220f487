#pragma once

#include "cpu/isa.h"

namespace rpp {

// What a fused loss walks: sequences of tokens, each token's loss weighted by 1, or by 1 / n for a mean over its
// sequence.
template <class T>
struct LossArgs {
  const bool* mask;  // may be null
  const int64_t* cu_seqlens;
  bool sequence_mean;
  T* loss;       // each token's loss; null where only the sum is wanted
  T* slope;      // d(loss) / d(logps or values), with the token's weight
  double* sums;  // kLossSums for each sequence: the weighted loss, then the stats in their order
};

constexpr int kLossSums = 8;

template <class T>
struct PolicyArgs : LossArgs<T> {
  const T *logps, *old_logps, *advantages;
  bool sequence_advantages;  // one advantage for each sequence
  bool sequence_ratio;
  T low, high, dual, log_ratio_clamp;
};

template <class T>
struct ValueArgs : LossArgs<T> {
  const T *values, *old_values, *returns;
  T epsilon;
};

}  // namespace rpp
