#pragma once

#include "cpu/isa.h"

namespace rpp {

// Logits of a chunk of tokens, the tokens contiguous: a row of the memory is one entry of the vocabulary.
template <class T>
struct Chunk {
  const T* data;
  int64_t tokens, vocab, ld;
};

// Arrays with `room` hold whole vectors of any instruction set.
constexpr int64_t kChunkRoom = 16;

template <class T>
struct ChunkArgs {
  Chunk<T> logits;
  const int64_t* target_ids;
  double temperature;
  const T* token_temperature;  // may be null
  double softcap;              // 0 for none
  double temperature_of(int64_t token) const {
    return token_temperature ? double(token_temperature[token]) : temperature;
  }
};

// A part of the vocabulary and a tile of the tokens are one task of the forward kernel. Both are fixed, so that results
// do not depend on the number of threads; the arrays of a tile stay in the L1 cache.
constexpr int64_t kChunkPart = 512, kChunkTile = 512;

template <class T>
struct ChunkSumArgs : ChunkArgs<T> {
  const T* inverse_temperature;  // by token, with room
  int64_t parts, stride;         // of the sums by part: (parts, stride), with room
  T* max;                        // and the sums as in RowSum (kernels/logps.h)
  double *sum, *weighted;
  T *logps, *entropy, *lse, *lse_rest;
};

// A vector of tokens some of which are wanted: the lanes `index` of the tokens from `source` on become the tokens from
// `first` on.
struct ChunkVector {
  int64_t source, first;
};

// Of a RowGradient (formulas.h), and whether any of it is not zero.
enum ChunkField { kShift, kRest, kInverseTemperature, kWeight, kEntropyWeight, kWanted, kChunkFields };

template <class T>
using LaneIndex = std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t>;

template <class T>
struct ChunkGradArgs : ChunkArgs<T> {
  const int64_t* rows;  // the tokens wanted, rising; null for all
  int64_t count;        // of them
  const T *entropy, *lse, *lse_rest;
  const T *dlogps, *dentropy, *dlse;  // each may be null
  T* dlogits;                         // (count, vocab) laid out like the logits; may be the logits themselves
  int64_t dlogits_ld;

  // Made by chunk_prepare: for each token wanted a RowGradient by field, (fields, stride) with room, and its own logit;
  // the vectors in which they lie, unless all are wanted.
  int64_t stride;
  T *gradients, *targets;
  ChunkVector* vectors;  // one more than there are, for the end
  LaneIndex<T>* index;
  int64_t num_vectors;
  int64_t row_of(int64_t i) const { return rows ? rows[i] : i; }
};

}  // namespace rpp
