#include "ops.h"

namespace rpp::cuda {
std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss_fwd(
    Tensor logps, Tensor old_logps, Tensor advantages, MaybeTensor mask, Tensor cu_seqlens, MaybeTensor weights,
    MaybeTensor ref_logps, MaybeTensor entropy, MaybeTensor dloss, double option_0, double option_1, double option_2,
    double option_3, double log_ratio_clamp, double beta, double kl_clamp, double entropy_coef, int64_t surrogate,
    int64_t level, int64_t kl_estimator, int64_t kl_gradient, bool kl_bias_correction, bool sequence_advantages,
    bool sequence_mean, bool per_token) {
  STD_TORCH_CHECK(false, "policy_loss_fwd is not written yet");
}
std::tuple<Tensor, Tensor, Tensor> value_loss_fwd(Tensor values, Tensor old_values, Tensor returns, MaybeTensor mask,
                                                  Tensor cu_seqlens, double epsilon, bool sequence_mean,
                                                  bool per_token) {
  STD_TORCH_CHECK(false, "value_loss_fwd is not written yet");
}
}  // namespace rpp::cuda
