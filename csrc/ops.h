// Every kernel, as schemas.h declares it to PyTorch. Token tensors are flat (T,) and contiguous; `cu_seqlens` (B+1,)
// int64 says where sequences lie in them. Meaning: the public function of the same name in rpp_kernels/ops.
#pragma once

#include <tuple>

#include "checks.h"

namespace rpp::cpu {
#include "declarations.h"
}
namespace rpp::cuda {
#include "declarations.h"

// For chunks of logits, (n, V) of contiguous rows, and losses whose ratio is that of the token: log-probs and entropy,
// and dlogits, of the policy loss by the logits times `scale` (n,) or (1,) float64; dlogits may be the logits. Results:
// logps, entropy, lse, lse_rest.
std::tuple<Tensor, Tensor, Tensor, Tensor> chunk_policy_out(
    Tensor dlogits, Tensor logits, Tensor target_ids, MaybeTensor mask, double temperature,
    MaybeTensor token_temperature, double softcap, MaybeTensor old_logps, Tensor advantages, MaybeTensor weights,
    MaybeTensor ref_logps, Tensor scale, double option_0, double option_1, double option_2, double option_3,
    double log_ratio_clamp, double beta, double kl_clamp, double entropy_coef, int64_t surrogate, int64_t kl_estimator,
    int64_t kl_gradient, bool kl_bias_correction);
}  // namespace rpp::cuda

// The names of those that every device has, and of those that a GPU has beside them.
#define RPP_CUDA_OPS(X) X(chunk_policy_out)
#define RPP_OPS(X)        \
  X(logps_fwd)            \
  X(logps_bwd_out)        \
  X(chunk_logps_fwd)      \
  X(chunk_logps_bwd_out)  \
  X(kl_fwd)               \
  X(kl_bwd)               \
  X(token_rewards_fwd)    \
  X(token_rewards_bwd)    \
  X(returns_fwd)          \
  X(returns_bwd)          \
  X(gae_fwd)              \
  X(gae_bwd)              \
  X(moments)              \
  X(whiten_out)           \
  X(whiten_bwd)           \
  X(reinforce_pp_fwd)     \
  X(group_advantages_fwd) \
  X(group_advantages_bwd) \
  X(policy_loss_fwd)      \
  X(value_loss_fwd)       \
  X(rollout_weights_fwd)  \
  X(dpo_loss_fwd)         \
  X(copg_loss_fwd)        \
  X(preference_loss_bwd)
