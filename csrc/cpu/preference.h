#pragma once

#include "cpu/isa.h"

namespace rpp {

// What a loss of compared completions walks: groups of `group_size` consecutive sequences.
template <class T>
struct PreferenceArgs {
  const T *logps, *ref_logps;  // ref_logps may be null
  const bool* mask;            // may be null
  const int64_t* cu_seqlens;
  T* loss;       // of each group; null where only the sum is wanted
  T* slope;      // of each sequence: d(loss of its group) / d(logps), the same for all its valid tokens
  double* sums;  // kPreferenceSums for each group: the loss, then the stats in their order
};

constexpr int kPreferenceSums = 6;

template <class T>
struct DpoArgs : PreferenceArgs<T> {
  int64_t loss_type;
  double beta, label_smoothing, margin;
  bool length_normalized;
};

template <class T>
struct CopgArgs : PreferenceArgs<T> {
  const T* scores;
  int64_t group_size;
  double beta;
  double* log_ratios;  // room for one of each sequence
  int64_t* valid;      // likewise
};

template <class T>
struct SpreadArgs {
  const T* each;     // of each sequence
  const bool* mask;  // may be null
  const int64_t* cu_seqlens;
  T* out;  // the same for each of its valid tokens
};

}  // namespace rpp
