// How blocks share out the tokens of sequences, and how the threads of a block walk them.
#pragma once

#include "cuda/tokens.h"

namespace rpp::cuda {

constexpr int kAtOnce = 2;  // tokens of a thread that are loaded before the first is used: more cost registers

// Which tokens a block has, and the first and the last of the sequences that they are in.
struct Part {
  Range tokens;
  int64_t first, last;

  __device__ bool of_one_sequence() const { return first == last; }
};

// A block takes a sequence; or, where nothing is asked of a sequence as a whole, a piece of all tokens, with which few
// long sequences fill a GPU as well.
struct Sequences {
  const int64_t* cu_seqlens;
  int64_t batch, tokens;
  int64_t piece;  // 0 where a block takes a sequence

  static constexpr int64_t kStep = kTokenThreads * kAtOnce;
  static constexpr int64_t kPieces = 512;  // at most: about as many blocks as run at a time, each with sums to be added

  int64_t blocks() const { return most(1, piece == 0 ? batch : ceil_div(tokens, piece)); }

  __device__ __forceinline__ Range tokens_of_block() const {
    const int64_t i = blockIdx.x;
    if (piece != 0) return {least(tokens, i * piece), least(tokens, (i + 1) * piece)};
    return i < batch ? Range{cu_seqlens[i], cu_seqlens[i + 1]} : Range{0, 0};
  }

  // For which every thread has to come.
  __device__ __forceinline__ Part part() const {
    const Range range = tokens_of_block();
    const int64_t first = piece == 0 ? blockIdx.x : found_by_warp(range.begin);
    const bool of_one = piece == 0 || batch <= 1 || range.end <= cu_seqlens[first + 1];
    return {range, first, of_one ? first : found_by_warp(range.end - 1)};
  }

  // The sequence of one token of a part.
  __device__ __forceinline__ int64_t sequence_of(int64_t token, const Part& part) const {
    int64_t low = part.first, high = part.last;
    while (low < high) {
      const int64_t middle = high - (high - low) / 2;
      if (cu_seqlens[middle] <= token) low = middle;
      else high = middle - 1;
    }
    return low;
  }

 private:
  // The last sequence that begins at the token or before, which all threads ask for: a warp tries 32 at a time.
  __device__ __forceinline__ int64_t found_by_warp(int64_t token) const {
    int64_t low = 0, high = batch;
    while (high - low > 1) {
      const int64_t apart = ceil_div(high - low, kWarp), mine = low + (threadIdx.x % kWarp + 1) * apart;
      int begun = mine < high && cu_seqlens[mine] <= token;
#pragma unroll
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) begun += __shfl_xor_sync(kAllLanes, begun, lanes);
      low += begun * apart;
      high = least(high, low + apart);
    }
    return low;
  }
};

inline Sequences sequences_of(const Tensor& cu_seqlens, int64_t tokens, bool in_pieces) {
  const int64_t steps = most(1, ceil_div(tokens, Sequences::kStep * Sequences::kPieces));
  return {data_of<int64_t>(cu_seqlens, cu_seqlens.numel(), "cu_seqlens"), cu_seqlens.numel() - 1, tokens,
          in_pieces ? steps * Sequences::kStep : 0};
}

// each(t, load(t)) for these tokens by the threads of the block, of which each meets the same ones in every walk.
template <class Load, class F>
__device__ __forceinline__ void for_tokens_of(Range tokens, const Load& load, const F& each) {
  const int64_t end = tokens.end;
  for (int64_t start = tokens.begin + threadIdx.x; start < end; start += Sequences::kStep) {
    decltype(load(start)) x[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
      if (start + k * kTokenThreads < end) x[k] = load(start + k * kTokenThreads);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
      if (start + k * kTokenThreads < end) each(start + k * kTokenThreads, x[k]);
  }
}

}  // namespace rpp::cuda
