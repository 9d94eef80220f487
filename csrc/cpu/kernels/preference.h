// No include guard: see for_each_isa.h. Arguments: cpu/preference.h.

#include "cpu/kernels/tokens.h"

struct LogRatio {
  double sum;
  int64_t valid;  // how many tokens it is the sum of
};

template <class T>
LogRatio log_ratio(const PreferenceArgs<T>& a, int64_t sequence) {
  using V = Vector<T>;
  LaneSums<T, 1> valid;
  vf64 sum{};  // terms of both signs cancel
  valid.walk(a.cu_seqlens[sequence], a.cu_seqlens[sequence + 1], [&](int64_t i, int64_t n) {
    const auto mask = token_mask<T>(a.mask, i, n);
    sum += wide(mask ? load_tokens(a.logps, i, n) : V{});
    if (a.ref_logps) sum -= wide(mask ? load_tokens(a.ref_logps, i, n) : V{});
    valid.lane[0] += mask ? num<V>(1) : V{};
  });
  return {horizontal_sum(sum), static_cast<int64_t>(valid.total[0])};
}

template <class T>
void dpo_pairs(const DpoArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const LogRatio w = log_ratio(a, 2 * i), l = log_ratio(a, 2 * i + 1);
    const double w_share = a.length_normalized ? 1.0 / std::max<int64_t>(w.valid, 1) : 1.0;
    const double l_share = a.length_normalized ? 1.0 / std::max<int64_t>(l.valid, 1) : 1.0;
    const double chosen = w.sum * w_share, rejected = l.sum * l_share;
    const bool counted = w.valid + l.valid > 0;
    PairLoss loss = pair_loss(static_cast<Pair>(a.loss_type), chosen, rejected, a.beta, a.label_smoothing, a.margin);
    loss.value = counted ? loss.value : 0;
    if (a.loss) a.loss[i] = static_cast<T>(loss.value);
    a.slope[2 * i] = static_cast<T>(loss.dchosen * w_share);
    a.slope[2 * i + 1] = static_cast<T>(loss.drejected * l_share);
    const double sums[kPreferenceSums] = {loss.value,
                                          double(counted),
                                          a.beta * chosen,
                                          a.beta * rejected,
                                          a.beta * (chosen - rejected),
                                          double(chosen > rejected)};
    std::copy_n(sums, kPreferenceSums, a.sums + i * kPreferenceSums);
  }
}

template <class T>
void copg_groups(const CopgArgs<T>& a, int64_t begin, int64_t end) {
  const int64_t k = a.group_size;
  for (int64_t group = begin; group < end; ++group) {
    double sum_h = 0, sum_r = 0;
    for (int64_t i = group * k; i < (group + 1) * k; ++i) {
      const LogRatio h = log_ratio(a, i);
      a.log_ratios[i] = h.sum, a.valid[i] = h.valid;
      sum_h += h.sum, sum_r += a.scores[i];
    }
    double loss = 0, sequences = 0, scores = 0;
    for (int64_t i = group * k; i < (group + 1) * k; ++i) {
      const double h = a.log_ratios[i], r = a.scores[i];
      const double h_gap = h - (sum_h - h) / (k - 1), r_gap = r - (sum_r - r) / (k - 1);
      a.slope[i] = static_cast<T>(a.beta * h_gap - r_gap);
      if (a.valid[i]) loss += h * (0.5 * a.beta * h_gap - r_gap), sequences += 1, scores += r;
    }
    if (a.loss) a.loss[group] = static_cast<T>(loss);
    const double sums[kPreferenceSums] = {loss, sequences, scores, sum_h};
    std::copy_n(sums, kPreferenceSums, a.sums + group * kPreferenceSums);
  }
}

template <class T>
void spread(const SpreadArgs<T>& a, int64_t first, int64_t last) {
  for (int64_t sequence = first; sequence < last; ++sequence) {
    const Vector<T> each = Vector<T>{} + a.each[sequence];
    for_each_vector<T>(a.cu_seqlens[sequence], a.cu_seqlens[sequence + 1], [&](int64_t i, int64_t n) {
      store_tokens(a.out, i, n, token_mask<T>(a.mask, i, n) ? each : Vector<T>{});
    });
  }
}
