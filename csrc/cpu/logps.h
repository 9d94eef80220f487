#pragma once

#include "cpu/isa.h"

namespace rpp {

// Rows of logits whose last dimension is contiguous: (T, V) or (B, S, V) with any outer strides, so that a slice such
// as logits[:, :-1] is read where it lies.
template <class S>
struct Logits {
  const S* data;
  int64_t rows, vocab, inner, outer_stride, inner_stride;
  const S* row(int64_t i) const { return data + (i / inner) * outer_stride + (i % inner) * inner_stride; }
};

template <class S>
struct LogpsArgs {
  Logits<S> logits;
  const int64_t* target_ids;
  const bool* mask;  // may be null
  double temperature;
  const Compute<S>* token_temperature;          // may be null
  Compute<S>*logps, *entropy, *lse, *lse_rest;  // lse + lse_rest: the log-sum-exp in twice the precision
  Compute<S>* sum_squares;                      // may be null
  double temperature_of(int64_t row) const { return token_temperature ? double(token_temperature[row]) : temperature; }
};

template <class S>
struct LogpsGradArgs : LogpsArgs<S> {
  const Compute<S>*dlogps, *dentropy, *dlse;  // each may be null
  S* dlogits;                                 // (rows, vocab) contiguous; may be the logits themselves
};

}  // namespace rpp
