// No include guard: see for_each_isa.h. Arguments: cpu/losses.h.

#include "cpu/kernels/tokens.h"

RPP_HD int64_t count_valid(const bool* mask, int64_t begin, int64_t end) {
  if (!mask) return end - begin;
  int64_t count = 0;
  for (int64_t t = begin; t < end; ++t) count += mask[t];
  return count;
}

template <class T>
RPP_HD T mean_log_ratio(const PolicyArgs<T>& a, int64_t begin, int64_t end, int64_t valid) {
  LaneSums<T, 1> sum;
  sum.walk(begin, end, [&](int64_t i, int64_t n) {
    const Vector<T> d = load_tokens(a.logps, i, n) - load_tokens(a.old_logps, i, n);
    sum.lane[0] += token_mask<T>(a.mask, i, n) ? d : Vector<T>{};
  });
  return static_cast<T>(sum.total[0] / std::max<int64_t>(valid, 1));
}

template <class T>
RPP_HD void policy_sequence(const PolicyArgs<T>& a, int64_t sequence) {
  using V = Vector<T>;
  const int64_t begin = a.cu_seqlens[sequence], end = a.cu_seqlens[sequence + 1];
  const int64_t valid = count_valid(a.mask, begin, end);
  const T weight = a.sequence_mean ? T(1) / std::max<int64_t>(valid, 1) : T(1);
  const V sequence_log_ratio = V{} + (a.sequence_ratio ? mean_log_ratio(a, begin, end, valid) : T(0));
  const V sequence_advantage = V{} + (a.sequence_advantages ? a.advantages[sequence] : T(0));
  const Clip<V> clip = {V{} + a.low, V{} + a.high, V{} + a.dual, V{} + a.log_ratio_clamp};
  const V one = num<V>(1), zero{};
  LaneSums<T, 7> sum;
  sum.walk(begin, end, [&](int64_t i, int64_t n) {
    const auto mask = token_mask<T>(a.mask, i, n);
    const V d = mask ? load_tokens(a.logps, i, n) - load_tokens(a.old_logps, i, n) : zero;
    const V advantage = mask ? (a.sequence_advantages ? sequence_advantage : load_tokens(a.advantages, i, n)) : zero;
    const auto s = clipped_surrogate(a.sequence_ratio ? sequence_log_ratio : d, advantage, clip);
    const V slope = s.slope * weight;  // 0 where masked: the advantage is
    store_tokens(a.slope, i, n, slope);
    if (a.loss) store_tokens(a.loss, i, n, s.loss);
    sum.lane[0] += s.loss;
    sum.lane[1] += s.clipped_low ? one : zero;
    sum.lane[2] += s.clipped_high ? one : zero;
    sum.lane[3] += s.dual_clipped ? one : zero;
    sum.lane[4] += mask ? s.ratio : zero;
    sum.lane[5] -= d;
    sum.lane[6] += slope;
  });
  if (a.sequence_ratio && !a.loss) {  // the ratio is one for all tokens, and each moves it by 1 / n
    const V share = V{} + static_cast<T>(sum.total[6] / std::max<int64_t>(valid, 1));
    for_each_vector<T>(begin, end, [&](int64_t i, int64_t n) {
      store_tokens(a.slope, i, n, token_mask<T>(a.mask, i, n) ? share : zero);
    });
  }
  const double sums[kLossSums] = {sum.total[0] * weight, double(valid), double(valid > 0), sum.total[1],
                                  sum.total[2],          sum.total[3],  sum.total[4],      sum.total[5]};
  std::copy_n(sums, kLossSums, a.sums + sequence * kLossSums);
}

template <class T>
void policy_sequences(const PolicyArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) policy_sequence(a, i);
}

template <class T>
void value_sequences(const ValueArgs<T>& a, int64_t first, int64_t last) {
  using V = Vector<T>;
  const V one = num<V>(1), zero{}, epsilon = V{} + a.epsilon;
  for (int64_t sequence = first; sequence < last; ++sequence) {
    const int64_t begin = a.cu_seqlens[sequence], end = a.cu_seqlens[sequence + 1];
    const int64_t valid = count_valid(a.mask, begin, end);
    const T weight = a.sequence_mean ? T(1) / std::max<int64_t>(valid, 1) : T(1);
    LaneSums<T, 3> sum;
    sum.walk(begin, end, [&](int64_t i, int64_t n) {
      const auto mask = token_mask<T>(a.mask, i, n);
      const auto at = [&](const T* p) { return mask ? load_tokens(p, i, n) : zero; };
      const auto c = clipped_critic_loss(at(a.values), at(a.old_values), at(a.returns), epsilon);
      store_tokens(a.slope, i, n, c.slope * weight);
      if (a.loss) store_tokens(a.loss, i, n, c.loss);
      sum.lane[0] += c.loss;
      sum.lane[1] += c.clipped ? one : zero;
      sum.lane[2] += c.squared_error;
    });
    const double sums[kLossSums] = {sum.total[0] * weight, double(valid), double(valid > 0), sum.total[1],
                                    sum.total[2]};
    std::copy_n(sums, kLossSums, a.sums + sequence * kLossSums);
  }
}
