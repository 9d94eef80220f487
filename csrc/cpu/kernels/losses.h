// No include guard: see for_each_isa.h. Arguments: cpu/losses.h.

#include "cpu/kernels/tokens.h"

RPP_HD int64_t count_valid(const bool* mask, int64_t begin, int64_t end) {
  if (!mask) return end - begin;
  int64_t count = 0;
  for (int64_t t = begin; t < end; ++t) count += mask[t];
  return count;
}

template <class T>
struct PolicyTokens {
  Mask<Vector<T>> mask;
  Vector<T> logp, log_ratio, advantage;  // 0 where masked
};

template <class T>
RPP_HD PolicyTokens<T> load_policy(const PolicyArgs<T>& a, int64_t sequence, int64_t i, int64_t n) {
  using V = Vector<T>;
  const auto mask = token_mask<T>(a.mask, i, n);
  const V logp = load_tokens(a.logps, i, n), log_ratio = logp - load_tokens(a.old_logps, i, n);
  const V advantage = a.sequence_advantages ? V{} + a.advantages[sequence] : load_tokens(a.advantages, i, n);
  return {mask, mask ? logp : V{}, mask ? log_ratio : V{}, mask ? advantage : V{}};
}

// Over a sequence, for Level::sequence_sum times its tokens: of the log-ratios, and of what the surrogate makes of
// them.
template <class T>
struct MeanLogRatio {
  T plain, surrogate;
};

template <Surrogate surrogate, class T>
RPP_HD MeanLogRatio<T> mean_log_ratio(const PolicyArgs<T>& a, int64_t sequence, int64_t count,
                                      SurrogateOptions<Vector<T>> options) {
  vf64 plain{}, terms{};  // log-ratios of both signs cancel
  for_each_vector<T>(a.cu_seqlens[sequence], a.cu_seqlens[sequence + 1], [&](int64_t i, int64_t n) {
    const auto x = load_policy(a, sequence, i, n);
    plain += wide(x.log_ratio);
    terms += wide(log_ratio_term<surrogate>(x.log_ratio, x.advantage, options).value);
  });
  return {static_cast<T>(horizontal_sum(plain) / count), static_cast<T>(horizontal_sum(terms) / count)};
}

// The KL estimates of a block of tokens and their slopes: estimators are chosen outside of the loop, and not within the
// kernel of each surrogate.
template <class T>
struct KlBlock {
  T value[LaneSums<T, 1>::kBlock], slope[LaneSums<T, 1>::kBlock];
};

template <class T>
__attribute__((noinline)) void kl_block(const PolicyArgs<T>& a, int64_t begin, int64_t end, KlBlock<T>& kl) {
  using V = Vector<T>;
  const T unclamped = std::numeric_limits<T>::infinity();
  const KlClamps<V> clamps = {V{} + a.log_ratio_clamp, V{} + a.kl_clamp};
  const KlClamps<V> own = {clamps.log_ratio, V{} + (a.kl_gradient == a.kl_estimator ? a.kl_clamp : unclamped)};
  const auto each = [&](T* out, const auto& f) {
    for_each_vector<T>(begin, end, [&](int64_t i, int64_t n) {
      const V d = load_tokens(a.logps, i, n) - load_tokens(a.ref_logps, i, n);
      store(out + (i - begin), token_mask<T>(a.mask, i, n) ? f(d) : V{});
    });
  };
  with_estimator(a.kl_estimator, [&]<Kl k>() { each(kl.value, [&](V d) { return kl_value<k>(d, clamps); }); });
  with_estimator(a.kl_gradient, [&]<Kl k>() { each(kl.slope, [&](V d) { return kl_slope<k>(d, own); }); });
}

// The slope of a token has a part of its own, and at Level::sequence a share of what moves the ratio of all tokens.
// `extras`: there are weights, a KL, an entropy or a dloss.
template <Surrogate surrogate, bool extras, class T>
RPP_HD void policy_sequence(const PolicyArgs<T>& a, int64_t sequence) {
  using V = Vector<T>;
  const int64_t begin = a.cu_seqlens[sequence], end = a.cu_seqlens[sequence + 1];
  const int64_t valid = count_valid(a.mask, begin, end);
  const T sequence_weight = a.sequence_mean ? T(1) / std::max<int64_t>(valid, 1) : T(1);
  const SurrogateOptions<V> options = {V{} + a.options[0], V{} + a.options[1], V{} + a.options[2], V{} + a.options[3]};
  const V one = num<V>(1), zero{}, most = V{} + a.log_ratio_clamp, beta = V{} + a.beta, length = num<V>(valid);
  const bool of_token = a.level == Level::token, shared = !of_token && a.level != Level::sequence_token;
  const int64_t count = a.level == Level::sequence_sum ? 1 : std::max<int64_t>(valid, 1);
  const auto mean = of_token ? MeanLogRatio<T>{} : mean_log_ratio<surrogate>(a, sequence, count, options);
  LaneSums<T, 7> sum;
  vf64 losses{}, log_ratios{};  // of both signs: they cancel
  KlBlock<T> kl_of;
  for (int64_t start = begin; start < end; start += sum.kBlock) {
    const int64_t stop = std::min(start + sum.kBlock, end);
    if (extras && a.ref_logps) kl_block(a, start, stop, kl_of);
    for_each_vector<T>(start, stop, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      const auto x = load_policy(a, sequence, i, n);
      const auto at = [&](const T* p) { return x.mask ? load_tokens(p, i, n) : zero; };
      const Ratio<V> ratio = ratio_of(of_token ? x.log_ratio : V{} + mean.plain, most);
      Ratio<V> of_surrogate = ratio;
      if constexpr (surrogate == Surrogate::gmpo) of_surrogate = ratio_of(V{} + mean.surrogate, most);
      const auto s =
          surrogate_loss<surrogate>(PolicyToken<V>{x.logp, x.advantage, x.log_ratio, of_surrogate, length}, options);
      V loss = s.loss, slope = s.logp_slope, through = of_surrogate.clamped ? zero : s.ratio_slope, through_kl = zero;
      V weight = V{} + sequence_weight;
      if constexpr (extras) {
        if (a.weights) {
          const V w = at(a.weights);
          loss *= w, slope *= w, through *= w;
        }
        if (a.ref_logps) {
          const V kl = load(kl_of.value + (i - start)), kl_slope = load(kl_of.slope + (i - start));
          const V factor = a.kl_bias_correction ? beta * ratio.value : beta;
          loss += kl * factor, slope += kl_slope * factor;
          if (a.kl_bias_correction) through_kl = ratio.clamped ? zero : kl * factor;
          sum.lane[4] += kl;
        }
        if (a.entropy) {
          loss -= at(a.entropy) * a.entropy_coef;
          store_tokens(a.entropy_slope, i, n, x.mask ? zero - a.entropy_coef * sequence_weight : zero);
        }
        if (a.dloss) weight *= at(a.dloss);
      }
      if (shared) {
        sum.lane[5] += x.mask ? through * weight : zero;
        if constexpr (extras) sum.lane[6] += x.mask ? through_kl * weight : zero;
      } else {
        slope += through;
        if constexpr (extras) slope += through_kl;
      }
      loss = x.mask ? loss : zero;
      store_tokens(a.slope, i, n, x.mask ? slope * weight : zero);
      if (a.loss) store_tokens(a.loss, i, n, loss);
      losses += wide(loss);
      sum.lane[0] += s.clipped_low ? one : zero;
      sum.lane[1] += s.clipped_high ? one : zero;
      sum.lane[2] += s.dual_clipped ? one : zero;
      sum.lane[3] += x.mask ? ratio.value : zero;
      log_ratios += wide(x.log_ratio);
    });
    sum.flush();
  }
  if (shared) {  // the ratio is one for all tokens, and each moves it by 1 / count
    const V share = V{} + static_cast<T>(sum.total[5] / count), kl_share = V{} + static_cast<T>(sum.total[6] / count);
    for_each_vector<T>(begin, end, [&](int64_t i, int64_t n) {
      const auto x = load_policy(a, sequence, i, n);
      const V moves = log_ratio_term<surrogate>(x.log_ratio, x.advantage, options).slope;
      const V slope = load_tokens<T>(a.slope, i, n) + share * moves + kl_share;
      store_tokens(a.slope, i, n, x.mask ? slope : zero);
    });
  }
  const double sums[kLossSums] = {horizontal_sum(losses) * sequence_weight,
                                  double(valid),
                                  double(valid > 0),
                                  sum.total[0],
                                  sum.total[1],
                                  sum.total[2],
                                  sum.total[3],
                                  -horizontal_sum(log_ratios),
                                  sum.total[4]};
  std::copy_n(sums, kLossSums, a.sums + sequence * kLossSums);
}

template <Surrogate surrogate, class T>
void policy_sequences(const PolicyArgs<T>& a, int64_t begin, int64_t end) {
  const bool extras = a.weights || a.ref_logps || a.entropy || a.dloss;
  for (int64_t i = begin; i < end; ++i)
    if (extras) policy_sequence<surrogate, true>(a, i);
    else policy_sequence<surrogate, false>(a, i);
}

template <class T>
void policy_sequences(const PolicyArgs<T>& a, int64_t begin, int64_t end) {
  switch (static_cast<Surrogate>(a.surrogate)) {
    case Surrogate::clip: return policy_sequences<Surrogate::clip>(a, begin, end);
    case Surrogate::reinforce: return policy_sequences<Surrogate::reinforce>(a, begin, end);
    case Surrogate::cispo: return policy_sequences<Surrogate::cispo>(a, begin, end);
    case Surrogate::sapo: return policy_sequences<Surrogate::sapo>(a, begin, end);
    case Surrogate::gmpo: return policy_sequences<Surrogate::gmpo>(a, begin, end);
  }
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
