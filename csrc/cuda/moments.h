// Moments over the threads of a block, and over blocks: by deviations from a mean, never by sums of squares, so that
// values far from 0 lose nothing.
#pragma once

#include "cuda/sums.h"
#include "statistics.h"

namespace rpp::cuda {

struct MomentsShared {
  SumsInBlock<1> one;
  SumsInBlock<2> two;
  SumsInBlock<3> three;
  bool last;
};

// From sums of deviations from `shift` and of their squares.
__device__ __forceinline__ Moments moments_about(double shift, double count, double sum, double squares) {
  const double rest = count > 0 ? sum / count : 0, about_mean = squares - sum * rest;
  return {count, count > 0 ? shift + rest : 0, about_mean < 0 ? 0 : about_mean};
}

// Of values that threads meet one after another, about the mean of the first to come. With m of those among n, squares
// about it are at most 1 + n / m times those about the mean of all, and their rounding no more than that.
struct RunningMoments {
  MomentsShared& shared;
  double shift = 0, count = 0, sum = 0, squares = 0;  // but for the shift of this thread
  bool begun = false;

  // each(f) calls f(x, valid) for every new value of the thread. Every thread of the block has to come.
  template <class Each>
  __device__ __forceinline__ void add(const Each& each) {
    if (!begun) {
      double first[2] = {0, 0};
      each([&](double x, bool valid) { first[0] += valid, first[1] += valid ? x : 0; });
      block_sum(first, shared.two);
      begun = first[0] > 0;
      if (begun) shift = first[1] / first[0];
    }
    each([&](double x, bool valid) {
      const double deviation = valid ? x - shift : 0;
      count += valid, sum += deviation, squares += deviation * deviation;
    });
  }

  // In all threads.
  __device__ __forceinline__ Moments of_block() const {
    double sums[3] = {count, sum, squares};
    block_sum(sums, shared.three);
    return moments_about(shift, sums[0], sums[1], sums[2]);
  }
};

// Where blocks leave theirs, and the last of them those of all.
struct MomentsOfBlocks {
  Moments *all, *each;
  unsigned* arrived;

  MomentsOfBlocks(const Tensor& like, int64_t blocks, Tensor& out, Tensor (&keep)[2])
      : all(reinterpret_cast<Moments*>(new_like<double>(like, {3}, out))),
        each(reinterpret_cast<Moments*>(new_like<double>(like, {blocks, 3}, keep[0]))),
        arrived(new_counters(like, 1, keep[1])) {}

  // Every thread of the block has to come.
  __device__ __forceinline__ void store(const Moments& of_block, MomentsShared& shared) const {
    if (threadIdx.x == 0) each[blockIdx.x] = of_block;
    if (!block_arrives_last(arrived, gridDim.x, shared.last)) return;
    const double shift = __ldcg(&each[0].mean);  // equal means stay what they are
    double sums[2] = {0, 0}, squares[1] = {0};
    for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
      const double count = __ldcg(&each[i].count);
      sums[0] += count;
      if (count > 0) sums[1] += count * (__ldcg(&each[i].mean) - shift);
    }
    block_sum(sums, shared.two);
    const double mean = sums[0] > 0 ? shift + sums[1] / sums[0] : 0;
    for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
      const double count = __ldcg(&each[i].count), away = __ldcg(&each[i].mean) - mean;
      if (count > 0) squares[0] += __ldcg(&each[i].squares) + count * away * away;
    }
    block_sum(squares, shared.one);
    if (threadIdx.x == 0) *all = {sums[0], mean, squares[0]};
  }
};

}  // namespace rpp::cuda
