// The schemas of all kernels, and how they are registered.
#pragma once

#include "ops.h"

namespace rpp {

inline void define_ops(torch::stable::detail::StableLibrary& m) {
  m.def(
      "logps_fwd(Tensor logits, Tensor target_ids, Tensor? mask, float temperature, Tensor? token_temperature,"
      " bool sum_squares) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "logps_bwd_out(Tensor(a!) dlogits, Tensor logits, Tensor target_ids, Tensor? mask, float temperature,"
      " Tensor? token_temperature, Tensor entropy, Tensor lse, Tensor lse_rest, Tensor? dlogps, Tensor? dentropy,"
      " Tensor? dlse) -> ()");
  m.def(
      "chunk_logps_fwd(Tensor logits, Tensor target_ids, float temperature, Tensor? token_temperature, float softcap)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "chunk_logps_bwd_out(Tensor(a!) dlogits, Tensor logits, Tensor? rows, Tensor target_ids, float temperature,"
      " Tensor? token_temperature, float softcap, Tensor entropy, Tensor lse, Tensor lse_rest, Tensor? dlogps,"
      " Tensor? dentropy, Tensor? dlse) -> ()");
  m.def(
      "chunk_policy_out(Tensor(a!) dlogits, Tensor logits, Tensor target_ids, Tensor? mask, float temperature,"
      " Tensor? token_temperature, float softcap, Tensor? old_logps, Tensor advantages, Tensor? weights,"
      " Tensor? ref_logps, Tensor scale, float option_0, float option_1, float option_2, float option_3,"
      " float log_ratio_clamp, float beta, float kl_clamp, float entropy_coef, int surrogate, int kl_estimator,"
      " int kl_gradient, bool kl_bias_correction) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "kl_fwd(Tensor logps, Tensor ref_logps, Tensor? mask, int estimator, float log_ratio_clamp, float kl_clamp)"
      " -> Tensor");
  m.def(
      "kl_bwd(Tensor dkl, Tensor logps, Tensor ref_logps, Tensor? mask, int estimator, float log_ratio_clamp,"
      " float kl_clamp) -> Tensor");
  m.def("token_rewards_fwd(Tensor scores, Tensor kl, Tensor? mask, Tensor cu_seqlens, float beta) -> Tensor");
  m.def("token_rewards_bwd(Tensor drewards, Tensor? mask, Tensor cu_seqlens, float beta) -> (Tensor, Tensor)");
  m.def("returns_fwd(Tensor rewards, Tensor? mask, Tensor cu_seqlens, float gamma, int gap) -> Tensor");
  m.def("returns_bwd(Tensor dreturns, Tensor? mask, Tensor cu_seqlens, float gamma, int gap) -> Tensor");
  m.def(
      "gae_fwd(Tensor rewards, Tensor values, Tensor? mask, Tensor cu_seqlens, float gamma, float gae_lambda,"
      " int gap)"
      " -> (Tensor, Tensor)");
  m.def(
      "gae_bwd(Tensor dadvantages, Tensor dreturns, Tensor? mask, Tensor cu_seqlens, float gamma, float gae_lambda,"
      " int gap)"
      " -> (Tensor, Tensor)");
  m.def("moments(Tensor values, Tensor? mask) -> Tensor");
  m.def(
      "whiten_out(Tensor(a!) out, Tensor values, Tensor? mask, Tensor moments, bool shift_mean, bool unbiased,"
      " float eps, int eps_mode) -> ()");
  m.def(
      "whiten_bwd(Tensor dout, Tensor values, Tensor? mask, Tensor moments, bool shift_mean, bool unbiased, float eps,"
      " int eps_mode) -> Tensor");
  m.def(
      "reinforce_pp_fwd(Tensor scores, Tensor old_logps, Tensor? ref_logps, Tensor? mask, Tensor cu_seqlens,"
      " float beta, float gamma, int estimator, float log_ratio_clamp, float kl_clamp) -> (Tensor, Tensor)");
  m.def(
      "group_advantages_fwd(Tensor scores, Tensor? group_index, Tensor? lengths, Tensor? moments, int group_size,"
      " int num_groups, int baseline, int std, bool unbiased, float eps, bool keep_singletons) -> Tensor");
  m.def(
      "group_advantages_bwd(Tensor dadvantages, Tensor scores, Tensor? group_index, Tensor? lengths, int group_size,"
      " int num_groups, int baseline, int std, bool unbiased, float eps, bool keep_singletons) -> Tensor");
  m.def(
      "policy_loss_fwd(Tensor logps, Tensor old_logps, Tensor advantages, Tensor? mask, Tensor cu_seqlens,"
      " Tensor? weights, Tensor? ref_logps, Tensor? entropy, Tensor? dloss, float option_0, float option_1,"
      " float option_2, float option_3, float log_ratio_clamp, float beta, float kl_clamp, float entropy_coef, int "
      "surrogate, int "
      "level,"
      " int kl_estimator, int kl_gradient, bool kl_bias_correction, bool sequence_advantages, bool sequence_mean,"
      " bool per_token) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "value_loss_fwd(Tensor values, Tensor old_values, Tensor returns, Tensor? mask, Tensor cu_seqlens,"
      " float epsilon, bool sequence_mean, bool per_token) -> (Tensor, Tensor, Tensor)");
  m.def(
      "rollout_weights_fwd(Tensor old_logps, Tensor sampling_logps, Tensor? mask, Tensor cu_seqlens, int level,"
      " bool truncate, float low, float high, float log_ratio_clamp) -> (Tensor, Tensor)");
  m.def(
      "dpo_loss_fwd(Tensor logps, Tensor? ref_logps, Tensor? mask, Tensor cu_seqlens, int loss_type, float beta,"
      " float label_smoothing, float margin, bool length_normalized, bool per_pair) -> (Tensor, Tensor, Tensor)");
  m.def(
      "copg_loss_fwd(Tensor logps, Tensor ref_logps, Tensor scores, Tensor? mask, Tensor cu_seqlens, int group_size,"
      " float beta, bool per_group) -> (Tensor, Tensor, Tensor)");
  m.def("preference_loss_bwd(Tensor each, Tensor? mask, Tensor cu_seqlens, int num_tokens) -> Tensor");
}

}  // namespace rpp

// m.impl of every kernel in the namespace rpp::device.
#define RPP_IMPLEMENT_ONE(device, op) m.impl(#op, TORCH_BOX(&rpp::device::op));
