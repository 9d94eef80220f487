// Which block and which thread has which part of what there is. Plain functions of numbers, tested over all edges
// without a GPU (tests/cuda/test_formulas.py).
#pragma once

#include <cstdint>

#include "numbers.h"

namespace rpp::cuda {

struct Range {
  int64_t begin, end;
};

RPP_HD int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
RPP_HD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
RPP_HD int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- rows of a vocabulary. The vocabulary alone cuts them, never the number of rows: a token has the same bits in
//      whatever batch it comes.

constexpr int64_t kPart = 65536;  // columns that one block takes

RPP_HD int64_t parts_of(int64_t vocab) { return most(1, ceil_div(vocab, kPart)); }
RPP_HD Range part_of(int64_t vocab, int64_t part) { return {part * kPart, least(vocab, (part + 1) * kPart)}; }

// The columns of a block of a cluster: as even as whole units allow. The last ones may be empty.
RPP_HD int64_t slice_size(int64_t vocab, int64_t ranks, int64_t unit) {
  return ceil_div(ceil_div(vocab, ranks), unit) * unit;
}
RPP_HD Range slice_of(int64_t vocab, int64_t rank, int64_t ranks, int64_t unit) {
  const int64_t size = slice_size(vocab, ranks, unit);
  return {least(vocab, rank * size), least(vocab, (rank + 1) * size)};
}

// How many blocks a cluster needs to keep a row in their shared memory: as few as leave room for three clusters, or
// else all that there are. 0 where the row does not fit.
constexpr int64_t kComfortableBytes = 72 << 10;
RPP_HD int cluster_of(int64_t vocab, int64_t unit, int64_t item_bytes, int largest, int64_t most_bytes) {
  int ranks = 1;
  while (ranks < largest && slice_size(vocab, ranks, unit) * item_bytes > kComfortableBytes) ranks *= 2;
  return slice_size(vocab, ranks, unit) * item_bytes <= most_bytes ? ranks : 0;
}

// How a block walks its columns: in steps of `threads * unroll * vector`, of which a thread has `unroll` vectors that
// lie `threads` vectors apart.
RPP_HD int64_t column_of(int64_t step_begin, int thread, int threads, int k, int vector) {
  return step_begin + (static_cast<int64_t>(k) * threads + thread) * vector;
}

// Rows of logits: `inner` of them in each of those that are outer_stride apart, all in elements.
struct Rows {
  int64_t vocab, inner, outer_stride, row_stride;

  RPP_HD int64_t offset(int64_t row) const { return row / inner * outer_stride + row % inner * row_stride; }
};

}  // namespace rpp::cuda
