// Sums over the threads of a block, and over blocks: always in one order, so that results have the same bits each time.
#pragma once

#include "cuda/index.h"
#include "cuda/scalars.h"

namespace rpp::cuda {

constexpr int kMaxWarps = 32;

// What block_sum and block_max need of the shared memory.
template <int K>
struct SumsInBlock {
  double of_warp[K][kMaxWarps];
};

// x becomes the sum over all threads, in all of them. Every thread of the block has to come.
template <int K>
__device__ __forceinline__ void block_sum(double (&x)[K], SumsInBlock<K>& shared) {
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x[k] += __shfl_xor_sync(kAllLanes, x[k], lanes);
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  __syncthreads();  // an earlier sum may still be read
  if (threadIdx.x % kWarp == 0)
#pragma unroll
    for (int k = 0; k < K; ++k) shared.of_warp[k][warp] = x[k];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) {
    double total = 0;
    for (int w = 0; w < warps; ++w) total += shared.of_warp[k][w];
    x[k] = total;
  }
}

// The largest of all threads, in all of them; a NaN is passed over.
template <class T>
__device__ __forceinline__ T block_max(T x, SumsInBlock<1>& shared) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, x, lanes);
    x = other > x ? other : x;
  }
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared.of_warp[0][warp] = x;
  __syncthreads();
  double top = shared.of_warp[0][0];
  for (int w = 1; w < warps; ++w) top = shared.of_warp[0][w] > top ? shared.of_warp[0][w] : top;
  return static_cast<T>(top);
}

// Whether this is the last of `count` to come, for one thread of a block: what it wrote before is then seen by others,
// and what others wrote before they came is to be read by __ldcg, past the cache of this multiprocessor.
__device__ __forceinline__ bool arrives_last(unsigned* arrived, unsigned count) {
  __threadfence();
  const bool last = atomicAdd(arrived, 1u) == count - 1;
  __threadfence();
  return last;
}

// The same for a whole block, of which every thread has to come.
__device__ __forceinline__ bool block_arrives_last(unsigned* arrived, unsigned count, bool& shared) {
  __syncthreads();
  if (threadIdx.x == 0) shared = arrives_last(arrived, count);
  __syncthreads();
  return shared;
}

// One counter of blocks, at 0.
inline unsigned* new_counters(const Tensor& like, int64_t count, Tensor& keep) {
  keep = torch::stable::new_zeros(like, {count}, ScalarType::Int);
  return static_cast<unsigned*>(keep.data_ptr());
}

}  // namespace rpp::cuda
