// kl_penalty: one read of two log-probs, one write.
#include "cuda/tokens.h"
#include "ops.h"

namespace rpp::cuda {
namespace {

template <class T>
struct KlArgs {
  T* out;
  const T *dkl, *logps, *ref_logps;  // dkl: of the backward
  const bool* mask;
  int64_t tokens;
  KlClamps<T> clamps;
};

template <Kl estimator, class T>
__global__ void __launch_bounds__(kTokenThreads) kl_kernel(KlArgs<T> a) {
  for_tokens(a.tokens, [&](int64_t t) {
    if (a.mask && !a.mask[t]) {
      a.out[t] = 0;
      return;
    }
    const T d = a.logps[t] - a.ref_logps[t];
    a.out[t] = a.dkl ? a.dkl[t] * kl_slope<estimator>(d, a.clamps) : kl_value<estimator>(d, a.clamps);
  });
}

Tensor kl(const MaybeTensor& dkl, const Tensor& logps, const Tensor& ref_logps, const MaybeTensor& mask,
          int64_t estimator, double log_ratio_clamp, double kl_clamp) {
  return for_float_type(logps, [&]<class T>(T*) {
    const int64_t tokens = logps.numel();
    Tensor out;
    const KlArgs<T> a{new_like<T>(logps, {tokens}, out),
                      data_of<T>(dkl, tokens, "dkl"),
                      data_of<T>(logps, tokens, "logps"),
                      data_of<T>(ref_logps, tokens, "ref_logps"),
                      data_of<bool>(mask, tokens, "completion_mask"),
                      tokens,
                      {static_cast<T>(log_ratio_clamp), static_cast<T>(kl_clamp)}};
    with_estimator(estimator, [&]<Kl k>() { launch(logps, grid_of(tokens), kl_kernel<k, T>, a); });
    return out;
  });
}

}  // namespace

Tensor kl_fwd(Tensor logps, Tensor ref_logps, MaybeTensor mask, int64_t estimator, double log_ratio_clamp,
              double kl_clamp) {
  return kl(std::nullopt, logps, ref_logps, mask, estimator, log_ratio_clamp, kl_clamp);
}

Tensor kl_bwd(Tensor dkl, Tensor logps, Tensor ref_logps, MaybeTensor mask, int64_t estimator, double log_ratio_clamp,
              double kl_clamp) {
  return kl(dkl, logps, ref_logps, mask, estimator, log_ratio_clamp, kl_clamp);
}

}  // namespace rpp::cuda
