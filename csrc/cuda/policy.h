// The policy loss of a token: what losses.cu sums and chunk_policy.cu differentiates by logits.
#pragma once

#include "cuda/scalars.h"

namespace rpp::cuda {

template <class T>
struct PolicyNumbers {
  SurrogateOptions<T> options;
  KlClamps<T> clamps;
  Kl kl_estimator, kl_gradient;
  bool kl_bias_correction;
  T beta, entropy_coef;
};

template <class T>
PolicyNumbers<T> policy_numbers(double option_0, double option_1, double option_2, double option_3,
                                double log_ratio_clamp, double beta, double kl_clamp, double entropy_coef,
                                int64_t kl_estimator, int64_t kl_gradient, bool kl_bias_correction) {
  const auto number = [](double x) { return static_cast<T>(x); };
  return {{number(option_0), number(option_1), number(option_2), number(option_3)},
          {number(log_ratio_clamp), number(kl_clamp)},
          static_cast<Kl>(kl_estimator),
          static_cast<Kl>(kl_gradient),
          kl_bias_correction,
          number(beta),
          number(entropy_coef)};
}

template <class T>
struct KlTerm {
  T value, slope;
};

template <class T>
__device__ __forceinline__ KlTerm<T> kl_term(Kl estimator, T d, KlClamps<T> clamps) {
  switch (estimator) {
    case Kl::none: break;
    case Kl::k1: return {kl_value<Kl::k1>(d, clamps), kl_slope<Kl::k1>(d, clamps)};
    case Kl::k2: return {kl_value<Kl::k2>(d, clamps), kl_slope<Kl::k2>(d, clamps)};
    case Kl::k3: return {kl_value<Kl::k3>(d, clamps), kl_slope<Kl::k3>(d, clamps)};
    case Kl::abs: return {kl_value<Kl::abs>(d, clamps), kl_slope<Kl::abs>(d, clamps)};
  }
  return {};
}

// With the slope of kl_gradient: unclamped, where that is another estimator.
template <class T>
__device__ __forceinline__ KlTerm<T> kl_of(const PolicyNumbers<T>& a, T d) {
  auto kl = kl_term(a.kl_estimator, d, a.clamps);
  if (a.kl_gradient != a.kl_estimator)
    kl.slope = kl_term(a.kl_gradient, d, {a.clamps.log_ratio, std::numeric_limits<T>::infinity()}).slope;
  return kl;
}

template <class T>
struct PolicyTerms {
  T loss, slope;                  // the entropy's part aside; slope: d(loss) / d(logp) where no ratio moves
  T through = 0, through_kl = 0;  // d(loss) / d(log of the ratio), of the surrogate and of the KL
  T kl = 0;
  bool low, high, dual;
};

// `plain` is the ratio, and that of `token` what the surrogate makes of it.
template <Surrogate surrogate, class T>
__device__ __forceinline__ PolicyTerms<T> policy_terms(const PolicyNumbers<T>& a, const PolicyToken<T>& token,
                                                       const Ratio<T>& plain, T weight, bool with_kl, T ref_logp) {
  const auto s = surrogate_loss<surrogate>(token, a.options);
  PolicyTerms<T> out{s.loss * weight, s.logp_slope * weight};
  out.low = s.clipped_low, out.high = s.clipped_high, out.dual = s.dual_clipped;
  if (!token.ratio.clamped) out.through = s.ratio_slope * weight;
  if (with_kl) {
    const auto kl = kl_of(a, token.logp - ref_logp);
    const T factor = a.kl_bias_correction ? a.beta * plain.value : a.beta;
    out.loss += kl.value * factor, out.slope += kl.slope * factor;
    if (a.kl_bias_correction && !plain.clamped) out.through_kl = kl.value * factor;
    out.kl = kl.value;
  }
  return out;
}

}  // namespace rpp::cuda
