#pragma once

#include "choices.h"
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

constexpr int kLossSums = 9;

template <class T>
struct PolicyArgs : LossArgs<T> {
  const T *logps, *old_logps, *advantages;
  bool sequence_advantages;                        // one advantage for each sequence
  const T *weights, *ref_logps, *entropy, *dloss;  // each may be null; dloss multiplies each token's whole loss
  T* entropy_slope;                                // d(loss) / d(entropy), where there is entropy
  int64_t surrogate;
  Level level;
  T options[4], log_ratio_clamp;
  int64_t kl_estimator, kl_gradient;
  bool kl_bias_correction;
  T beta, kl_clamp, entropy_coef;
};

template <class T>
struct ValueArgs : LossArgs<T> {
  const T *values, *old_values, *returns;
  T epsilon;
};

}  // namespace rpp
