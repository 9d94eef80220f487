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

// ---- K sums of all blocks: each block writes its own down, the last one adds them up

// What block_totals and gathered need of the shared memory, of blocks of `threads`.
template <int K, int threads>
struct TotalsInBlock {
  double of_thread[K][threads];
  double total[K];
  bool last;
};

// shared.total becomes the sums over all threads, of which every one has to come. Where each thread needs but one of
// many sums, or none, this takes an eighth of the shuffles of block_sum.
template <int K, int threads>
__device__ __forceinline__ void block_totals(const double (&x)[K], TotalsInBlock<K, threads>& shared) {
  __syncthreads();  // an earlier total may still be read
#pragma unroll
  for (int k = 0; k < K; ++k) shared.of_thread[k][threadIdx.x] = x[k];
  __syncthreads();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int k = warp; k < K; k += threads / kWarp) {
    double sum = 0;
#pragma unroll
    for (int i = lane; i < threads; i += kWarp) sum += shared.of_thread[k][i];
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
    if (lane == 0) shared.total[k] = sum;
  }
  __syncthreads();
}

struct Partials {
  double* sums;  // (K, blocks)
  unsigned* arrived;
};

inline Partials new_partials(const Tensor& like, int64_t sums, int64_t blocks, unsigned* arrived, Tensor& keep) {
  return {new_like<double>(like, {sums, blocks}, keep), arrived};
}

// Writes this block's shared.total down, and returns whether it is the last to do so: there x becomes what this thread
// adds up of all blocks, always in the same order, and block_totals of x the sums of all.
template <int K, int threads>
__device__ __forceinline__ bool gathered(double (&x)[K], Partials partials, TotalsInBlock<K, threads>& shared) {
  const int64_t blocks = gridDim.x;
  if (threadIdx.x < K) partials.sums[threadIdx.x * blocks + blockIdx.x] = shared.total[threadIdx.x];
  if (!block_arrives_last(partials.arrived, gridDim.x, shared.last)) return false;
#pragma unroll
  for (int k = 0; k < K; ++k) x[k] = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += threads)
#pragma unroll
    for (int k = 0; k < K; ++k) x[k] += __ldcg(partials.sums + k * blocks + i);
  return true;
}

// Where the sums of all blocks go: the first is the loss, the others are the statistics.
template <class T>
struct Results {
  T* loss;  // null where none is asked for
  double* stats;
};

template <int K, int threads, class T>
__device__ __forceinline__ void store_results(Results<T> results, const TotalsInBlock<K, threads>& shared) {
  if (threadIdx.x == 0 && results.loss) *results.loss = static_cast<T>(shared.total[0]);
  if (threadIdx.x > 0 && threadIdx.x < K) results.stats[threadIdx.x - 1] = shared.total[threadIdx.x];
}

}  // namespace rpp::cuda
