// Every kernel, as schemas.h declares it to PyTorch. Token tensors are flat (T,) and contiguous; `cu_seqlens` (B+1,) int64
// says where sequences lie in them. Meaning: the public function of the same name in rpp_kernels/ops.
#pragma once

#include <tuple>

#include "checks.h"

namespace rpp::cpu {
#include "declarations.h"
}
namespace rpp::cuda {
#include "declarations.h"
}

// All of their names.
#define RPP_OPS(X)         \
  X(logps_fwd)             \
  X(logps_bwd_out)         \
  X(chunk_logps_fwd)       \
  X(chunk_logps_bwd_out)   \
  X(kl_fwd)                \
  X(kl_bwd)                \
  X(token_rewards_fwd)     \
  X(token_rewards_bwd)     \
  X(returns_fwd)           \
  X(returns_bwd)           \
  X(gae_fwd)               \
  X(gae_bwd)               \
  X(moments)               \
  X(whiten_out)            \
  X(whiten_bwd)            \
  X(reinforce_pp_fwd)      \
  X(group_advantages_fwd)  \
  X(group_advantages_bwd)  \
  X(policy_loss_fwd)       \
  X(value_loss_fwd)        \
  X(rollout_weights_fwd)   \
  X(dpo_loss_fwd)          \
  X(copg_loss_fwd)         \
  X(preference_loss_bwd)
