// No include guard: see for_each_isa.h. Arguments: cpu/rollout.h.

#include "cpu/kernels/tokens.h"

template <class F, class T>
RPP_HD RolloutBounds<F> rollout_bounds(const RolloutArgs<T>& a) {
  const F low = F{} + a.low, high = F{} + a.high, zero{};
  return {F{} + a.log_ratio_clamp, low, high, a.truncate ? low : zero, a.truncate ? high : zero};
}

template <class T>
RPP_HD void rollout_tokens(const RolloutArgs<T>& a, int64_t begin, int64_t end, double* sums) {
  using V = Vector<T>;
  const auto bounds = rollout_bounds<V>(a);
  const V one = num<V>(1), zero{};
  LaneSums<T, 4> sum;
  vf64 log_ratios{};  // they are of both signs
  sum.walk(begin, end, [&](int64_t i, int64_t n) {
    const auto mask = token_mask<T>(a.mask, i, n);
    const V d = mask ? load_tokens(a.old_logps, i, n) - load_tokens(a.sampling_logps, i, n) : zero;
    const auto w = rollout_weight(d, bounds);
    const V weight = mask ? w.weight : zero;
    store_tokens(a.weights, i, n, weight);
    sum.lane[0] += mask ? one : zero;
    sum.lane[1] += mask & w.low ? one : zero;
    sum.lane[2] += mask & w.high ? one : zero;
    sum.lane[3] += weight;
    log_ratios += wide(d);
  });
  std::copy_n(sum.total, 4, sums);
  sums[4] = -horizontal_sum(log_ratios);
}

// One weight for all tokens of a sequence.
template <class T>
RPP_HD void rollout_sequence(const RolloutArgs<T>& a, int64_t begin, int64_t end, double* sums) {
  using V = Vector<T>;
  const V zero{};
  LaneSums<T, 1> sum;
  vf64 log_ratios{};
  sum.walk(begin, end, [&](int64_t i, int64_t n) {
    const auto mask = token_mask<T>(a.mask, i, n);
    const V d = mask ? load_tokens(a.old_logps, i, n) - load_tokens(a.sampling_logps, i, n) : zero;
    sum.lane[0] += mask ? num<V>(1) : zero;
    log_ratios += wide(d);
  });
  const double count = sum.total[0], log_ratio = horizontal_sum(log_ratios);
  const double divisor = a.level == RolloutLevel::geometric ? std::max(count, 1.0) : 1.0;
  const auto w = rollout_weight(static_cast<T>(log_ratio / divisor), rollout_bounds<T>(a));
  const V weight = V{} + w.weight;
  for_each_vector<T>(begin, end, [&](int64_t i, int64_t n) {
    store_tokens(a.weights, i, n, token_mask<T>(a.mask, i, n) ? weight : zero);
  });
  // Of a sequence without a valid token the weight counts 0 times; it is 1, and never NaN.
  const double of_sequence[kRolloutSums] = {count, w.low * count, w.high * count, w.weight * count, -log_ratio};
  std::copy_n(of_sequence, kRolloutSums, sums);
}

template <class T>
void rollout_sequences(const RolloutArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = a.cu_seqlens[i], last = a.cu_seqlens[i + 1];
    double* sums = a.sums + i * kRolloutSums;
    if (a.level == RolloutLevel::token) rollout_tokens(a, first, last, sums);
    else rollout_sequence(a, first, last, sums);
  }
}
