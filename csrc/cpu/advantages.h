#pragma once

#include "cpu/isa.h"
#include "statistics.h"

namespace rpp {

constexpr int64_t kMomentsBlock = 4096;

template <class T>
struct MomentsArgs {
  const T* values;
  const bool* mask;  // may be null
  int64_t size;
  Moments* blocks;  // one for each kMomentsBlock elements
};

// Sums of the gradient of a whitening: `mean` is that of dout, `squares` the sum of dout * (value - shift).
template <class T>
struct ProductsArgs : MomentsArgs<T> {
  const T* dout;
  T shift;
};

// Where valid; else 0.
template <class T>
struct AffineArgs {
  const T *values, *dout;  // dout may be null
  const bool* mask;        // may be null
  Affine<T> by;
  T* out;
};

// The REINFORCE++ pipeline up to its moments.
template <class T>
struct ReinforcePPArgs {
  const T *scores, *old_logps, *ref_logps;  // ref_logps may be null: no KL
  const bool* mask;                         // may be null
  const int64_t* cu_seqlens;
  T beta, gamma;
  int64_t estimator;
  T log_ratio_clamp, kl_clamp;
  T* returns;
  Moments* sequences;  // one for each sequence
};

}  // namespace rpp
