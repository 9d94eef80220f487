// The policy loss of a token whose ratio is its own, by its log-prob.
#pragma once

#include "cuda/tokens.h"

namespace rpp::cuda {

// f.operator()<surrogate>() of a surrogate that has a ratio for each token.
template <class F>
RPP_HD auto with_surrogate(int64_t surrogate, const F& f) {
  switch (static_cast<Surrogate>(surrogate)) {
    case Surrogate::reinforce: return f.template operator()<Surrogate::reinforce>();
    case Surrogate::cispo: return f.template operator()<Surrogate::cispo>();
    case Surrogate::sapo: return f.template operator()<Surrogate::sapo>();
    default: return f.template operator()<Surrogate::clip>();
  }
}

template <class T>
struct PolicyInputs {
  const T *old_logps, *advantages, *weights, *ref_logps;  // old_logps: null for those of the policy itself
  SurrogateOptions<T> options;
  T log_ratio_clamp, beta, kl_clamp, entropy_coef;
  int64_t surrogate, kl_estimator, kl_gradient;
  bool kl_bias_correction;
};

template <class T>
struct TokenSlopes {
  T logps, entropy;  // d(loss) / d(logp), d(loss) / d(entropy)
};

template <class T>
__device__ __forceinline__ TokenSlopes<T> token_slopes(const PolicyInputs<T>& a, int64_t t, T logp) {
  const T log_ratio = logp - (a.old_logps ? a.old_logps[t] : logp);
  const Ratio<T> ratio = ratio_of(log_ratio, a.log_ratio_clamp);
  const auto s = with_surrogate(a.surrogate, [&]<Surrogate surrogate>() {
    return surrogate_loss<surrogate>(PolicyToken<T>{logp, a.advantages[t], log_ratio, ratio, T(1)}, a.options);
  });
  T slope = s.logp_slope + (ratio.clamped ? T(0) : s.ratio_slope);
  if (a.weights) slope *= a.weights[t];
  if (a.ref_logps) {
    const T d = logp - a.ref_logps[t], unclamped = std::numeric_limits<T>::infinity();
    const KlClamps<T> clamps = {a.log_ratio_clamp, a.kl_clamp};
    const KlClamps<T> own = {a.log_ratio_clamp, a.kl_gradient == a.kl_estimator ? a.kl_clamp : unclamped};
    const T dkl = with_estimator(a.kl_gradient, [&]<Kl k>() { return kl_slope<k>(d, own); });
    slope += dkl * (a.kl_bias_correction ? a.beta * ratio.value : a.beta);
    if (a.kl_bias_correction && !ratio.clamped)
      slope += with_estimator(a.kl_estimator, [&]<Kl k>() { return kl_value<k>(d, clamps); }) * a.beta * ratio.value;
  }
  return {slope, -a.entropy_coef};
}

}  // namespace rpp::cuda
