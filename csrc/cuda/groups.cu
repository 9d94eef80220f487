// group_advantages: a warp for each row, which is compared with the rows of its group.
//
// In pairs, because a row's own place in its group decides its baseline and its standard deviation: B n comparisons for
// groups of n that stand next to each other, B^2 where an index says who is in a group. All in float64, and about the
// row's own score or its first other's: of equal scores nothing is left but 0.
#include "cuda/sums.h"
#include "groups.h"
#include "ops.h"

namespace rpp::cuda {
namespace {

using Baseline = GroupOptions::Baseline;
using Std = GroupOptions::Std;

constexpr int kGroupThreads = 256;

struct Row {     // what the backward keeps of each
  double count;  // of its group
  double share;  // of its score in the baseline
  double dcentered;
  double dstd;    // divided by the standard deviation and its degrees of freedom where it is that of the others
  double center;  // what its standard deviation is about; with Std::group, d(std) / d(score)
};

template <class T>
struct GroupArgs {
  T* out;     // advantages, or dscores
  Row* rows;  // of the backward
  const T *scores, *dadvantages;
  const int64_t* index;   // null: groups of `size` in a row
  const double* lengths;  // null: all weigh the same
  const Moments* of_all;  // with Std::batch
  int64_t batch, size;
  GroupOptions options;

  __device__ double std_of_all() const { return std::sqrt(of_all->squares / options.degrees(of_all->count)); }
};

// The row of this warp, and the range in which all members of its group lie.
struct Members {
  int64_t row, first, stop;
  const int64_t* index;

  template <class T>
  __device__ explicit Members(const GroupArgs<T>& a)
      : row((blockIdx.x * int64_t{kGroupThreads} + threadIdx.x) / kWarp), index(a.index) {
    first = index ? 0 : row / a.size * a.size;
    stop = index ? a.batch : least(first + a.size, a.batch);
  }

  // f(member) for those of this lane.
  template <class F>
  __device__ __forceinline__ void for_each(const F& f) const {
    for (int64_t other = first + threadIdx.x % kWarp; other < stop; other += kWarp)
      if (!index || index[other] == index[row]) f(other);
  }
};

template <int K>
__device__ __forceinline__ void warp_sum(double (&x)[K]) {
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x[k] += __shfl_xor_sync(kAllLanes, x[k], lanes);
}

__device__ __forceinline__ int64_t warp_least(int64_t x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x = least(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}

RPP_HD double at_least_1(double x) { return x < 1 ? 1 : x; }
RPP_HD double inverse_or_0(double x) { return x > 0 ? 1 / x : 0; }

struct Centered {
  double count, less_mean;  // less_mean: the score less the mean of its group
  double centered, share;
};

template <class T>
__device__ __forceinline__ Centered centered_of(const GroupArgs<T>& a, const Members& members, double score) {
  double sums[3] = {0, 0, 0}, weighted[1] = {0};  // members, their scores less this one, weights
  members.for_each([&](int64_t other) {
    const double more = a.scores[other] - score, weight = a.lengths ? a.lengths[other] : 0;
    sums[0] += 1, sums[1] += more, sums[2] += weight;
    if (weight > 0) weighted[0] += weight * more;  // a score that weighs nothing may be anything
  });
  warp_sum(sums), warp_sum(weighted);
  const double count = sums[0], less_mean = -sums[1] / count;
  Centered c{count, less_mean, less_mean, 1 / count};
  if (a.lengths) {
    c.centered = sums[2] > 0 ? -weighted[0] / sums[2] : score;
    c.share = sums[2] > 0 ? a.lengths[members.row] / sums[2] : 0;
  }
  c.centered = count > 1 ? a.options.factor(count) * c.centered : a.options.keep_singletons ? score : 0;
  return c;
}

struct Deviation {
  double center, degrees, std;
};

// Of the row's group about its mean, or of its others about theirs.
template <class T>
__device__ __forceinline__ Deviation deviation_of(const GroupArgs<T>& a, const Members& members, double score,
                                                  Centered c) {
  const bool of_others = a.options.std == Std::leave_one_out;
  Deviation d{score - c.less_mean, a.options.degrees(of_others ? c.count - 1 : c.count), 0};
  if (of_others) {
    int64_t one = a.batch;
    members.for_each([&](int64_t other) { one = other != members.row ? least(one, other) : one; });
    one = warp_least(one);
    const double shift = one < a.batch ? a.scores[one] : T(0);
    double sum[1] = {0};
    members.for_each([&](int64_t other) {
      if (other != members.row) sum[0] += a.scores[other] - shift;
    });
    warp_sum(sum);
    d.center = shift + sum[0] / at_least_1(c.count - 1);
  }
  double squares[1] = {0};
  members.for_each([&](int64_t other) {
    const double away = a.scores[other] - d.center;
    if (!of_others || other != members.row) squares[0] += away * away;
  });
  warp_sum(squares);
  d.std = std::sqrt(squares[0] / d.degrees);
  return d;
}

template <class T>
__global__ void __launch_bounds__(kGroupThreads) group_advantages_kernel(GroupArgs<T> a) {
  const Members members(a);
  const int64_t row = members.row;
  if (row >= a.batch) return;  // a whole warp
  const double score = a.scores[row];
  const Centered c = centered_of(a, members, score);
  Deviation d{score - c.less_mean, 1, 0};
  double inverse_std = 1;
  if (a.options.std == Std::batch) {
    inverse_std = 1 / (a.std_of_all() + a.options.eps);
  } else if (a.options.std != Std::none) {
    d = deviation_of(a, members, score, c);
    const bool undivided = a.options.std == Std::group ? c.count == 1 : d.std == 0;
    if (!undivided) inverse_std = 1 / (d.std + a.options.eps);
  }
  if (threadIdx.x % kWarp != 0) return;
  if (!a.rows) {
    a.out[row] = static_cast<T>(c.centered * inverse_std);
    return;
  }
  // d(std) / d(score) = (score - center) / (degrees std), and 0 where all scores are equal
  const double dcentered = a.dadvantages[row] * inverse_std, rate = inverse_or_0(d.degrees * d.std);
  Row out{c.count, c.share, dcentered, -dcentered * c.centered * inverse_std, d.center};
  if (a.options.std == Std::group) {
    if (c.count == 1) out.dstd = 0;
    out.center = rate > 0 ? rate * c.less_mean : 0;
  } else if (a.options.std == Std::leave_one_out) {
    out.dstd = rate > 0 ? rate * out.dstd : 0;
  }
  a.rows[row] = out;
}

template <class T>
__global__ void __launch_bounds__(kGroupThreads) group_gradient_kernel(GroupArgs<T> a) {
  const Members members(a);
  const int64_t row = members.row;
  if (row >= a.batch) return;  // a whole warp
  const double score = a.scores[row];
  const Row own = a.rows[row];
  double sums[2] = {0, 0};  // of dcentered, and of dstd with what it goes through
  members.for_each([&](int64_t other) {
    const Row& theirs = a.rows[other];
    sums[0] += theirs.dcentered;
    if (a.options.std == Std::group) sums[1] += theirs.dstd;
    if (a.options.std == Std::leave_one_out && other != row) sums[1] += theirs.dstd * (score - theirs.center);
  });
  if (a.options.std == Std::batch)
    for (int64_t other = threadIdx.x % kWarp; other < a.batch; other += kWarp) sums[1] += a.rows[other].dstd;
  warp_sum(sums);
  if (threadIdx.x % kWarp != 0) return;
  double dscore = a.options.keep_singletons ? own.dcentered : 0;
  if (own.count > 1) dscore = a.options.factor(own.count) * (own.dcentered - own.share * sums[0]);
  if (a.options.std == Std::group) dscore += sums[1] * own.center;
  if (a.options.std == Std::leave_one_out) dscore += sums[1];
  if (a.options.std == Std::batch) {
    const double rate = inverse_or_0(a.options.degrees(a.of_all->count) * a.std_of_all());
    if (rate > 0) dscore += sums[1] * (score - a.of_all->mean) * rate;
  }
  a.out[row] = static_cast<T>(dscore);
}

Tensor group_advantages(const MaybeTensor& dadvantages, const Tensor& scores, const MaybeTensor& group_index,
                        const MaybeTensor& lengths, MaybeTensor moments_of_all, int64_t group_size, int64_t num_groups,
                        GroupOptions options) {
  return for_float_type(scores, [&]<class T>(T*) {
    const int64_t batch = scores.numel();
    STD_TORCH_CHECK(
        batch == 0 || group_index.has_value() || (group_size > 0 && ceil_div(batch, group_size) <= num_groups),
        "group_size does not fit the batch");
    STD_TORCH_CHECK((options.baseline == Baseline::length_weighted) == lengths.has_value(),
                    "lengths are for the length-weighted baseline");
    if (options.std == Std::batch && !moments_of_all.has_value()) moments_of_all = moments(scores, std::nullopt);
    Tensor out, rows;
    GroupArgs<T> a{new_like<T>(scores, {batch}, out),
                   nullptr,
                   data_of<T>(scores, batch, "scores"),
                   data_of<T>(dadvantages, batch, "dadvantages"),
                   data_of<int64_t>(group_index, batch, "group_ids"),
                   data_of<double>(lengths, batch, "lengths"),
                   reinterpret_cast<const Moments*>(data_of<double>(moments_of_all, 3, "moments")),
                   batch,
                   group_size,
                   options};
    if (a.dadvantages) a.rows = reinterpret_cast<Row*>(new_like<double>(scores, {batch, sizeof(Row) / 8}, rows));
    const Grid grid{ceil_div(batch, kGroupThreads / kWarp), kGroupThreads};
    launch(scores, grid, group_advantages_kernel<T>, a);
    if (a.dadvantages) launch(scores, grid, group_gradient_kernel<T>, a);
    return out;
  });
}

}  // namespace

Tensor group_advantages_fwd(Tensor scores, MaybeTensor group_index, MaybeTensor lengths, MaybeTensor moments,
                            int64_t group_size, int64_t num_groups, int64_t baseline, int64_t std, bool unbiased,
                            double eps, bool keep_singletons) {
  return group_advantages(std::nullopt, scores, group_index, lengths, moments, group_size, num_groups,
                          {baseline, std, unbiased, eps, keep_singletons});
}

Tensor group_advantages_bwd(Tensor dadvantages, Tensor scores, MaybeTensor group_index, MaybeTensor lengths,
                            int64_t group_size, int64_t num_groups, int64_t baseline, int64_t std, bool unbiased,
                            double eps, bool keep_singletons) {
  return group_advantages(dadvantages, scores, group_index, lengths, std::nullopt, group_size, num_groups,
                          {baseline, std, unbiased, eps, keep_singletons});
}

}  // namespace rpp::cuda
