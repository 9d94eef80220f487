// The formulas of rpp_kernels/reference/, once for C++ and CUDA.
//
// No include guard: this file is included inside a namespace, once for each instruction set (cpu/for_each_isa.h), so
// that every copy is compiled for the instructions of its caller. `F` is float, double, or a GCC vector of them;
// `Mask<F>` is what comparing two F gives (bool, or a vector of 0 and -1). No branches: values are selected.

template <class F>
RPP_HD F num(double x) {  // x in every lane
  return F{} + static_cast<typename Traits<F>::Element>(x);
}

template <class F>
RPP_HD F at_least(F x, F low) {  // one instruction, and a NaN stays NaN
  return low > x ? low : x;
}

template <class F>
RPP_HD F at_most(F x, F high) {
  return high < x ? high : x;
}

template <class F>
RPP_HD F clamp(F x, F low, F high) {
  return at_most(at_least(x, low), high);
}

// ---- exponential: exp(x) = 2^n * (1 + f + q(f)), n = round(x / ln 2), |f| <= ln(2) / 2, q(f) = exp(f) - 1 - f
//
// Stated error: 2 ulp where the result is normal (tests/ops/test_exponential.py). Below that the result is the smallest
// normal number, about 1e-38 (2e-308 in double), so that 0 * -inf never arises; above 127.5 ln 2 = 88.37 (1023.5 ln 2 =
// 709.4) it is infinite.

template <class F>
struct Exponential {
  F f, q, scale;
  Mask<F> small;  // n == 0
};

// q[i] + q[i + 1] f + ...
template <int i, class F>
RPP_HD F exponential_series(F f) {
  using C = ExpConstants<typename Traits<F>::Element>;
  if constexpr (i == C::degree) return num<F>(C::q[i]);
  else return exponential_series<i + 1>(f) * f + num<F>(C::q[i]);
}

template <class F>
RPP_HD Exponential<F> reduce_exponent(F x) {
  using C = ExpConstants<typename Traits<F>::Element>;
  const F shifted = x * num<F>(1.4426950408889634) + num<F>(C::round_magic);
  const F n = shifted - num<F>(C::round_magic);
  F f = x - n * num<F>(C::ln2_high);  // exact even without FMA: ln2_high has few bits
  f = f - n * num<F>(C::ln2_low);
  return {f, exponential_series<0>(f) * f * f, power_of_two(shifted), n == F{}};
}

template <class F>
RPP_HD F exponential_in_range(F x) {  // for lowest <= x <= highest
  const auto e = reduce_exponent(x);
  return (num<F>(1) + (e.f + e.q)) * e.scale;
}

template <class F>
RPP_HD F exponential(F x) {
  using C = ExpConstants<typename Traits<F>::Element>;
  return exponential_in_range(clamp(x, num<F>(C::lowest), num<F>(C::highest)));
}

template <class F>
RPP_HD F exp_minus_1_minus_x(F x) {  // without the cancellation near 0
  using C = ExpConstants<typename Traits<F>::Element>;
  const auto e = reduce_exponent(clamp(x, num<F>(C::lowest), num<F>(C::highest)));
  const F far = (num<F>(1) + (e.f + e.q)) * e.scale - num<F>(1) - x;
  return e.small ? e.q : far;
}

// ---- softcap: z = c tanh(x / c) = -c s E / (2 + E), E = exp(-2 |x| / c) - 1, s the sign of x
//
// Stated error: 5 ulp (tests/ops/test_chunks.py), near 0 as well, where E is f + q and nothing cancels. +-inf gives
// +-c.

template <class F>
struct Softcap {
  F cap, rate, rate_rest;  // rate + rate_rest = 2 / cap: its rounding would cost |x| / cap ulp
  F lowest;                // the exponential's own, as -|x|
};

template <class F>
RPP_HD Softcap<F> softcap_of(double cap) {
  using T = typename Traits<F>::Element;
  const double rate = static_cast<T>(2 / cap);
  return {num<F>(cap), num<F>(rate), num<F>(2 / cap - rate), num<F>(0.499 * cap * ExpConstants<T>::lowest)};
}

template <class F>
struct Capped {
  F value, slope;  // slope = d(value) / dx = 1 - tanh(x / c)^2 = 4 exp(-2 |x| / c) / (2 + E)^2
};

template <class F>
RPP_HD Capped<F> softcapped(F x, Softcap<F> c) {
  const F below = at_least(at_most(x, -x), c.lowest);
  const auto e = reduce_exponent(below * c.rate + below * c.rate_rest);
  const F minus_1 = e.scale * (e.f + e.q) + (e.scale - num<F>(1));
  const F power = (num<F>(1) + (e.f + e.q)) * e.scale, sum = num<F>(2) + minus_1;
  const F value = c.cap * minus_1 / sum;
  return {x < F{} ? value : -value, num<F>(4) * power / (sum * sum)};
}

// ---- log-probs: with p = softmax(z), z = logits / temperature, logp = log p,
//      d(logps)/dz_j = [j = y] - p_j,  d(entropy)/dz_j = -p_j (logp_j + entropy),  d(lse)/dz_j = p_j

template <class T>
struct RowResults {
  T logps, entropy, lse, lse_rest;  // lse + lse_rest has twice the precision
};

// From sum = sum_j exp(t_j) and weighted = sum_j t_j exp(t_j), where t_j = (logit_j - max) / temperature.
template <class T>
RPP_HD RowResults<T> row_results(double max, double sum, double weighted, double target, double temperature) {
  const double inverse_temperature = 1 / temperature, log_sum = std::log(sum), top = max * inverse_temperature;
  // Not the difference of two products, of which one may be fused and the other rounded.
  const T logps = static_cast<T>((target - max) * inverse_temperature - log_sum);
  // A row of nothing but -inf is no distribution, though the terms of its sum are there.
  const T entropy = std::isinf(max) ? std::numeric_limits<T>::quiet_NaN() : static_cast<T>(log_sum - weighted / sum);
  const T lse = static_cast<T>(top + log_sum);
  return {logps, entropy, lse, static_cast<T>((top - lse) + log_sum)};
}

// sum_j p_j^2 from sum as above and squares = sum_j exp(t_j)^2.
template <class T>
RPP_HD T row_sum_squares(double max, double sum, double squares) {
  return std::isinf(max) ? std::numeric_limits<T>::quiet_NaN() : static_cast<T>(squares / (sum * sum));
}

template <class F>
struct RowGradient {
  // logp = (logit - shift) * inverse_temperature - rest, with shift near the largest logits, where the difference is
  // exact: logit * inverse_temperature - lse would carry the rounding of two large numbers into every probability.
  F shift, rest, inverse_temperature;
  F weight, entropy_weight;  // dlogits_j = p_j * (weight + entropy_weight * logp_j), the target's own term aside
};

template <class F>
RPP_HD RowGradient<F> row_gradient(double lse, F entropy, double temperature, F dlogps, F dentropy, F dlse) {
  const F shift = static_cast<F>(lse * temperature), inverse_temperature = static_cast<F>(1 / temperature);
  const F rest = static_cast<F>(lse - shift / temperature);
  const F weight = (dlse - dlogps - dentropy * entropy) * inverse_temperature;
  return {shift, rest, inverse_temperature, weight, -dentropy * inverse_temperature};
}

template <bool with_entropy, class F>
RPP_HD F dlogit(F logit, RowGradient<F> g) {
  const F lowest = num<F>(ExpConstants<typename Traits<F>::Element>::lowest);
  const F logp = (logit - g.shift) * g.inverse_temperature - g.rest;
  // Below 1e-30 (1e-300 in double) p is 0: products with it would be subnormal, of 100 times the cost of others.
  const F p = logp < lowest + num<F>(18.4) ? F{} : exponential(logp);
  if constexpr (!with_entropy) return p * g.weight;
  return p * (g.weight + g.entropy_weight * at_least(logp, lowest));  // p log p -> 0 for a logit of -inf
}

// ---- KL estimators of d = logps - ref_logps

enum class Kl : int { none = 0, k1 = 1, k2 = 2, k3 = 3, abs = 4 };

template <class F>
struct KlClamps {
  F log_ratio, value;
};

template <Kl estimator, class F>
RPP_HD F unclamped_kl(F d, KlClamps<F> clamps) {
  if constexpr (estimator == Kl::k1) return d;
  if constexpr (estimator == Kl::k2) return num<F>(0.5) * d * d;
  if constexpr (estimator == Kl::k3) return exp_minus_1_minus_x(-clamp(d, -clamps.log_ratio, clamps.log_ratio));
  if constexpr (estimator == Kl::abs) return d < F{} ? -d : d;
  return F{};
}

template <Kl estimator, class F>
RPP_HD F kl_value(F d, KlClamps<F> clamps) {
  return clamp(unclamped_kl<estimator>(d, clamps), -clamps.value, clamps.value);
}

template <Kl estimator, class F>
RPP_HD F kl_slope(F d, KlClamps<F> clamps) {  // d(kl_value) / d(d)
  F slope = F{};
  if constexpr (estimator == Kl::k1) slope = num<F>(1);
  if constexpr (estimator == Kl::k2) slope = d;
  if constexpr (estimator == Kl::k3) slope = num<F>(1) - exponential(-d);
  if constexpr (estimator == Kl::k3) slope = (d > clamps.log_ratio) | (d < -clamps.log_ratio) ? F{} : slope;
  if constexpr (estimator == Kl::abs) slope = d > F{} ? num<F>(1) : (d < F{} ? num<F>(-1) : F{});
  const F kl = unclamped_kl<estimator>(d, clamps);
  return (kl > clamps.value) | (kl < -clamps.value) ? F{} : slope;
}

// ---- weights against the mismatch of a rollout engine

template <class F>
struct RolloutBounds {
  F log_ratio, low, high;
  F below, above;  // the weights of ratios outside [low, high]
};

template <class F>
struct RolloutWeight {
  F weight;
  Mask<F> low, high;
};

template <class F>
RPP_HD RolloutWeight<F> rollout_weight(F log_ratio, RolloutBounds<F> bounds) {  // a NaN stays NaN
  const F ratio = exponential(clamp(log_ratio, -bounds.log_ratio, bounds.log_ratio));
  const Mask<F> low = ratio<bounds.low, high = ratio> bounds.high;
  return {low ? bounds.below : (high ? bounds.above : ratio), low, high};
}

// ---- clipped surrogate and clipped critic loss
// ---- surrogates of the policy

enum class Surrogate : int { clip = 0, reinforce = 1, cispo = 2, sapo = 3, gmpo = 4 };

template <class F>
struct Ratio {
  F log_ratio, value;  // of the level: that of the token, or of its sequence
  Mask<F> clamped;     // beyond log_ratio_clamp, where it is constant
};

template <class F>
RPP_HD Ratio<F> ratio_of(F log_ratio, F most) {
  const F within = clamp(log_ratio, -most, most);
  const Mask<F> clamped = (log_ratio > most) | (log_ratio < -most);  // of two bool, | is an int
  return {within, exponential(within), clamped};
}

template <class F>
struct PolicyToken {
  F logp, advantage;
  F log_ratio;  // of this token alone; `ratio` is that of the level
  Ratio<F> ratio;
  F length;  // of the sequence: its valid tokens
};

template <class F>
struct SurrogateOptions {
  F at[4];  // in the order of SURROGATES in ops/policy_loss.py
};

template <class F>
struct SurrogateLoss {
  F loss;
  F ratio_slope = F{}, logp_slope = F{};  // d(loss) / d(log of the ratio), and d(loss) / d(logp) beside that
  Mask<F> clipped_low = Mask<F>{}, clipped_high = Mask<F>{}, dual_clipped = Mask<F>{};  // not where the advantage is 0
};

template <class F>
RPP_HD SurrogateLoss<F> clip_surrogate(PolicyToken<F> t,
                                       SurrogateOptions<F> o) {  // epsilon_low, epsilon_high, dual_clip
  const F bottom = num<F>(1) - o.at[0], top = num<F>(1) + o.at[1], ratio = t.ratio.value;
  const Mask<F> low = (t.advantage < F{}) & (ratio < bottom);
  const Mask<F> high = (t.advantage > F{}) & (ratio > top);
  const Mask<F> dual = (t.advantage < F{}) & (ratio > o.at[2]);
  const F bound = low ? bottom : (high ? top : (dual ? o.at[2] : ratio));
  return {.loss = -bound * t.advantage,
          .ratio_slope = (low | high | dual) ? F{} : -ratio * t.advantage,
          .clipped_low = low,
          .clipped_high = high,
          .dual_clipped = dual};
}

template <class F>
RPP_HD SurrogateLoss<F> reinforce_surrogate(PolicyToken<F> t) {
  return {.loss = -t.advantage * t.logp, .logp_slope = -t.advantage};
}

template <class F>
RPP_HD SurrogateLoss<F> cispo_surrogate(PolicyToken<F> t, SurrogateOptions<F> o) {  // epsilon_low, epsilon_high
  const F bottom = num<F>(1) - o.at[0], top = num<F>(1) + o.at[1], ratio = t.ratio.value;
  const Mask<F> counts = t.advantage != F{}, low = ratio<bottom, high = ratio> top;
  const Mask<F> clipped_low = counts & low, clipped_high = counts & high;
  const F slope = -(low ? bottom : (high ? top : ratio)) * t.advantage;
  return {.loss = slope * t.logp, .logp_slope = slope, .clipped_low = clipped_low, .clipped_high = clipped_high};
}

template <class F>
RPP_HD SurrogateLoss<F> sapo_surrogate(PolicyToken<F> t, SurrogateOptions<F> o) {  // tau_positive, tau_negative
  const F lowest = num<F>(ExpConstants<typename Traits<F>::Element>::lowest), one = num<F>(1);
  const F tau = t.advantage > F{} ? o.at[0] : o.at[1];
  const F x = tau * (t.ratio.value - one), below = at_most(x, -x), e = exponential(below);
  const F larger = one / (one + e), sigmoid = x < F{} ? e * larger : larger;
  const F slope = num<F>(-4) * t.advantage * t.ratio.value * (e * larger * larger);
  return {.loss = num<F>(-4) * t.advantage / tau * sigmoid, .ratio_slope = below < lowest ? F{} : slope};
}

template <class F>
RPP_HD SurrogateLoss<F> gmpo_surrogate(PolicyToken<F> t, SurrogateOptions<F> o) {  // epsilon_low, epsilon_high
  const F loss = -t.ratio.value * t.advantage;
  const Mask<F> low = (t.advantage < F{}) & (t.log_ratio < -o.at[0]);
  const Mask<F> high = (t.advantage > F{}) & (t.log_ratio > o.at[1]);
  return {.loss = loss, .ratio_slope = loss, .clipped_low = low, .clipped_high = high};
}

// What the ratio of a sequence is the mean of, and its derivative by the log-ratio of the token.
template <class F>
struct LogRatioTerm {
  F value, slope;
};

template <class F>
RPP_HD LogRatioTerm<F> gmpo_term(F log_ratio, F advantage, SurrogateOptions<F> o) {
  const Mask<F> low = (advantage < F{}) & (log_ratio < -o.at[0]);
  const Mask<F> high = (advantage > F{}) & (log_ratio > o.at[1]);
  const Mask<F> nothing = advantage == F{};
  const F value = low ? -o.at[0] : (high ? o.at[1] : (nothing ? F{} : log_ratio));
  return {value, (low | high | nothing) ? F{} : num<F>(1)};
}

template <Surrogate surrogate, class F>
RPP_HD LogRatioTerm<F> log_ratio_term(F log_ratio, F advantage, SurrogateOptions<F> options) {
  if constexpr (surrogate == Surrogate::gmpo) return gmpo_term(log_ratio, advantage, options);
  return {log_ratio, num<F>(1)};
}

template <Surrogate surrogate, class F>
RPP_HD SurrogateLoss<F> surrogate_loss(PolicyToken<F> t, SurrogateOptions<F> options) {
  if constexpr (surrogate == Surrogate::clip) return clip_surrogate(t, options);
  if constexpr (surrogate == Surrogate::reinforce) return reinforce_surrogate(t);
  if constexpr (surrogate == Surrogate::cispo) return cispo_surrogate(t, options);
  if constexpr (surrogate == Surrogate::sapo) return sapo_surrogate(t, options);
  if constexpr (surrogate == Surrogate::gmpo) return gmpo_surrogate(t, options);
}

// ---- clipped critic loss

template <class F>
struct CriticLoss {
  F loss, slope, squared_error;  // slope: d(loss) / d(value)
  Mask<F> clipped;
};

template <class F>
RPP_HD CriticLoss<F> clipped_critic_loss(F value, F old_value, F target, F epsilon) {  // epsilon: infinite for no clip
  const F change = value - old_value;
  const Mask<F> inside = (change <= epsilon) & (change >= -epsilon);
  const F error = value - target;
  const F clipped_error = (inside ? value : old_value + clamp(change, -epsilon, epsilon)) - target;
  // Asked this way round, a NaN anywhere is chosen; and the slope of the clipped branch is 0, or NaN.
  const Mask<F> unclipped = error * error >= clipped_error * clipped_error;
  const F chosen = unclipped ? error : clipped_error;
  const F slope = unclipped ? error : clipped_error - clipped_error;
  return {num<F>(0.5) * chosen * chosen, slope, error * error, clipped_error * clipped_error > error * error};
}

// ---- losses of a pair of completions: two numbers, so double, and the standard library's exponential

enum class Pair : int {
  sigmoid = 0,
  ipo = 1,
  hinge = 2,
  robust = 3,
  exo = 4,
  nca = 5,
  sppo = 6,
  apo_zero = 7,
  apo_down = 8,
  discopop = 9,
};

struct PairLoss {
  double value, dchosen, drejected;
};

RPP_HD double logistic(double x) { return 1 / (1 + std::exp(-x)); }

RPP_HD double log_logistic(double x) { return (x < 0 ? x : 0) - std::log1p(std::exp(-std::fabs(x))); }

// With z = beta (chosen - rejected) - margin, whose slope dz all losses of the difference go through.
RPP_HD PairLoss pair_loss(Pair type, double chosen, double rejected, double beta, double smoothing, double margin) {
  const double difference = chosen - rejected, z = beta * difference - margin, half = 0.5 / beta;
  const double won = logistic(z), lost = logistic(-z);
  const double r_w = beta * chosen, r_l = beta * rejected;
  double value = 0, dz = 0;
  switch (type) {
    case Pair::sigmoid:
      value = -(1 - smoothing) * log_logistic(z) - smoothing * log_logistic(-z);
      dz = smoothing * won - (1 - smoothing) * lost;
      break;
    case Pair::ipo:
      value = (difference - half) * (difference - half);
      return {value, 2 * (difference - half), -2 * (difference - half)};
    case Pair::hinge:
      value = z > 1 ? 0 : 1 - z;  // so that a NaN stays one
      dz = z >= 1 ? 0 : -1;
      break;
    case Pair::robust:
      value = (smoothing * log_logistic(-z) - (1 - smoothing) * log_logistic(z)) / (1 - 2 * smoothing);
      dz = -(smoothing * won + (1 - smoothing) * lost) / (1 - 2 * smoothing);
      break;
    case Pair::exo:
      value = won * (log_logistic(z) - std::log1p(-smoothing)) + lost * (log_logistic(-z) - std::log(smoothing));
      dz = won * lost * (z - std::log1p(-smoothing) + std::log(smoothing));
      break;
    case Pair::nca:
      value = -log_logistic(r_w) - 0.5 * (log_logistic(-r_w) + log_logistic(-r_l));
      return {value, beta * (0.5 * logistic(r_w) - logistic(-r_w)), beta * 0.5 * logistic(r_l)};
    case Pair::sppo:
      value = (chosen - half) * (chosen - half) + (rejected + half) * (rejected + half);
      return {value, 2 * (chosen - half), 2 * (rejected + half)};
    case Pair::apo_zero:
      value = logistic(-r_w) + logistic(r_l);
      return {value, -beta * logistic(r_w) * logistic(-r_w), beta * logistic(r_l) * logistic(-r_l)};
    case Pair::apo_down:
      value = logistic(r_w) + lost;
      return {value, beta * (logistic(r_w) * logistic(-r_w) - won * lost), beta * won * lost};
    case Pair::discopop: {
      constexpr double rate = 1 / 0.05;
      const double late = logistic(z * rate), early = logistic(-z * rate);
      const double power = std::exp(log_logistic(z * rate) - z);  // late * exp(-z), which may overflow
      value = power - early * log_logistic(z);
      dz = power * (early * rate - 1) - early * (lost - late * rate * log_logistic(z));
      break;
    }
  }
  return {value, beta * dz, -beta * dz};
}
