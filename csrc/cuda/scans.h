// Scans over the tokens of a sequence, carry -> x + factor * carry, by a block that walks it tile after tile from
// either end (for_tiles). In float64.
#pragma once

#include "choices.h"
#include "cuda/tiles.h"

namespace rpp::cuda {

constexpr double kReset = -1;  // any factor below 0: the carry is x, whatever it was. Not 0 times it: it may be NaN

struct Step {
  double factor = 1, x = 0;  // changes nothing

  __device__ __forceinline__ double after(double carry) const { return factor < 0 ? x : x + factor * carry; }
};

// Both as one, `a` first.
__device__ __forceinline__ Step followed(Step a, Step b) {
  return {b.factor < 0 || a.factor < 0 ? kReset : a.factor * b.factor, b.after(a.x)};
}

// What a token multiplies the carry by.
struct Discount {
  double of_valid, of_masked;

  Discount(double gamma, Gap gap)
      : of_valid(gamma), of_masked(gap == Gap::reset ? kReset : factor_of_masked(gap, gamma)) {}

  template <class Tile>
  __device__ __forceinline__ double of(const Tile& tile, int k) const {
    return tile.valid(k) ? of_valid : tile.inside(k) ? of_masked : 1;
  }
};

struct ScanShared {
  Step of_warp[2][kTokenThreads / kWarp];
};

// Of a block, thread after thread and tile after tile.
struct Scan {
  ScanShared& shared;
  double carry = 0;  // behind all steps so far, in all threads
  int turn = 0;      // two tables, so that one may be read while the next is written

  // The carry before this thread's own step. Every thread of the block has to come.
  __device__ __forceinline__ double before(Step own) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    Step all = own;
#pragma unroll
    for (int by = 1; by < kWarp; by *= 2) {
      const Step earlier = shuffled_up(all, by);
      if (lane >= by) all = followed(earlier, all);
    }
    const Step earlier = shuffled_up(all, 1);
    Step* of_warp = shared.of_warp[turn];
    turn ^= 1;
    if (lane == kWarp - 1) of_warp[warp] = all;
    __syncthreads();
    double before_warp = carry;
#pragma unroll
    for (int w = 0; w < kTokenThreads / kWarp; ++w) {
      before_warp = w == warp ? carry : before_warp;
      carry = of_warp[w].after(carry);
    }
    return lane > 0 ? earlier.after(before_warp) : before_warp;
  }

  static __device__ __forceinline__ Step shuffled_up(Step s, int by) {
    return {__shfl_up_sync(kAllLanes, s.factor, by), __shfl_up_sync(kAllLanes, s.x, by)};
  }
};

}  // namespace rpp::cuda
