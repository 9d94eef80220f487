// Tokens as vectors: each thread of a block has kTokensEach in a row of some tensors.
#pragma once

#include <cstring>

#include "cuda/tokens.h"

namespace rpp::cuda {

constexpr int kTileTokens = kTokenThreads * kTokensEach;  // of a block

// Those from `at` on, a multiple of kTokensEach, of N tensors: whole vectors of 16 bytes where a tensor begins at 16.
template <class T, int N>
struct Tile {
  static_assert(kTokensEach == sizeof(uint32_t));  // a byte of the mask for each
  static constexpr uint32_t kAll = (1 << kTokensEach) - 1;

  int64_t at = 0;
  uint32_t places = 0;  // a bit for each that is there
  uint32_t counts = 0;  // a byte for each that is valid
  T raw[N][kTokensEach] = {};

  __device__ __forceinline__ bool inside(int k) const { return places >> k & 1; }
  __device__ __forceinline__ bool valid(int k) const { return counts >> 8 * k & 1; }
  __device__ __forceinline__ T value(int n, int k) const { return valid(k) ? raw[n][k] : T(0); }

  // Of the places in `range`; a tensor may be null, and is 0 then. Where all are there, nothing
  // waits for what it loads.
  __device__ __forceinline__ void load(const T* const (&from)[N], const bool* mask, int64_t first, Range range) {
    at = first, places = counts = 0;
#pragma unroll
    for (int k = 0; k < kTokensEach; ++k) {
      const uint32_t there = at + k >= range.begin && at + k < range.end;
      places |= there << k, counts |= there << 8 * k;
    }
    if (mask && places == kAll && reinterpret_cast<uintptr_t>(mask + at) % sizeof counts == 0) {
      std::memcpy(&counts, __builtin_assume_aligned(mask + at, sizeof counts), sizeof counts);
    } else if (mask) {
      counts = 0;
#pragma unroll
      for (int k = 0; k < kTokensEach; ++k)
        if (inside(k)) counts |= static_cast<uint32_t>(mask[at + k]) << 8 * k;
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (!from[n]) continue;
      if (places == kAll && begins_16_bytes(from[n] + at)) {
        Loaded<T, kTokensEach> loaded;
        loaded.load(from[n] + at);
        loaded.widen(raw[n]);
      } else {
#pragma unroll
        for (int k = 0; k < kTokensEach; ++k) raw[n][k] = inside(k) ? from[n][at + k] : T(0);
      }
    }
  }

  // 0 where masked.
  __device__ __forceinline__ void store(T* to, T (&x)[kTokensEach]) const {
#pragma unroll
    for (int k = 0; k < kTokensEach; ++k) x[k] = valid(k) ? x[k] : T(0);
    if (places == kAll && begins_16_bytes(to + at)) return store_whole<T>(to + at, x);
#pragma unroll
    for (int k = 0; k < kTokensEach; ++k)
      if (inside(k)) to[at + k] = x[k];
  }
};

// The first place of a thread in the block's `step`-th tile of all tokens.
__device__ __forceinline__ int64_t tile_begin(int64_t step) {
  return step * kTileTokens + static_cast<int64_t>(threadIdx.x) * kTokensEach;
}

// f(tile) for all tiles of a sequence from one end to the other, in which the threads follow each other; every thread
// comes to each. The next tile is on its way meanwhile.
template <bool forward, class T, int N, class F>
__device__ __forceinline__ void for_tiles(const T* const (&from)[N], const bool* mask, Range sequence, const F& f) {
  if (sequence.begin >= sequence.end) return;
  const int64_t first = sequence.begin / kTokensEach * kTokensEach;
  const int64_t last = (sequence.end - 1) / kTokensEach * kTokensEach;
  const int64_t steps = ceil_div(last + kTokensEach - first, kTileTokens);
  const auto at = [&](int64_t step) { return forward ? first + tile_begin(step) : last - tile_begin(step); };
  Tile<T, N> next;
  next.load(from, mask, at(0), sequence);
  for (int64_t step = 0; step < steps; ++step) {
    const Tile<T, N> now = next;
    if (step + 1 < steps) next.load(from, mask, at(step + 1), sequence);
    f(now);
  }
}

// f(k) for the tokens of a tile, in the order of the walk.
template <bool forward, class F>
__device__ __forceinline__ void for_each_in_order(const F& f) {
#pragma unroll
  for (int k = 0; k < kTokensEach; ++k) f(forward ? k : kTokensEach - 1 - k);
}

__device__ __forceinline__ Range sequence_of(const int64_t* cu_seqlens, int64_t i) {
  return {cu_seqlens[i], cu_seqlens[i + 1]};
}

// The last valid token of a sequence, or -1, in all threads. Every thread of the block has to come.
__device__ __forceinline__ int64_t last_valid(const bool* mask, Range sequence, SumsInBlock<1>& shared) {
  if (!mask) return sequence.end > sequence.begin ? sequence.end - 1 : -1;
  int64_t last = -1;
  for (int64_t end = sequence.end; last < 0 && end > sequence.begin; end -= kTileTokens) {
#pragma unroll
    for (int k = 0; k < kTokensEach; ++k) {
      const int64_t t = end - 1 - threadIdx.x - k * kTokenThreads;
      if (t >= sequence.begin && mask[t]) last = most(last, t);
    }
    last = block_max(last, shared);  // as a double, which a place is exactly
  }
  return last;
}

}  // namespace rpp::cuda
