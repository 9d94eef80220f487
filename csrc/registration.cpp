// Schemas and kernels of torch.ops.rpp_kernels_C, and the module whose import registers them. Autograd and fake kernels
// belong to the ops above these (rpp_kernels/ops).
#include <Python.h>

#include <string>

#include "cpu/isa.h"
#include "ops.h"

namespace rpp {
namespace {
std::string cpu_capability() { return isa_name(); }
}  // namespace
}  // namespace rpp

STABLE_TORCH_LIBRARY(rpp_kernels_C, m) {
  m.def("cpu_capability() -> str");
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

STABLE_TORCH_LIBRARY_IMPL(rpp_kernels_C, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&rpp::cpu_capability));
}

STABLE_TORCH_LIBRARY_IMPL(rpp_kernels_C, CPU, m) {
  m.impl("logps_fwd", TORCH_BOX(&rpp::logps_fwd));
  m.impl("logps_bwd_out", TORCH_BOX(&rpp::logps_bwd_out));
  m.impl("chunk_logps_fwd", TORCH_BOX(&rpp::chunk_logps_fwd));
  m.impl("chunk_logps_bwd_out", TORCH_BOX(&rpp::chunk_logps_bwd_out));
  m.impl("kl_fwd", TORCH_BOX(&rpp::kl_fwd));
  m.impl("kl_bwd", TORCH_BOX(&rpp::kl_bwd));
  m.impl("token_rewards_fwd", TORCH_BOX(&rpp::token_rewards_fwd));
  m.impl("token_rewards_bwd", TORCH_BOX(&rpp::token_rewards_bwd));
  m.impl("returns_fwd", TORCH_BOX(&rpp::returns_fwd));
  m.impl("returns_bwd", TORCH_BOX(&rpp::returns_bwd));
  m.impl("gae_fwd", TORCH_BOX(&rpp::gae_fwd));
  m.impl("gae_bwd", TORCH_BOX(&rpp::gae_bwd));
  m.impl("moments", TORCH_BOX(&rpp::moments));
  m.impl("whiten_out", TORCH_BOX(&rpp::whiten_out));
  m.impl("whiten_bwd", TORCH_BOX(&rpp::whiten_bwd));
  m.impl("reinforce_pp_fwd", TORCH_BOX(&rpp::reinforce_pp_fwd));
  m.impl("group_advantages_fwd", TORCH_BOX(&rpp::group_advantages_fwd));
  m.impl("group_advantages_bwd", TORCH_BOX(&rpp::group_advantages_bwd));
  m.impl("policy_loss_fwd", TORCH_BOX(&rpp::policy_loss_fwd));
  m.impl("value_loss_fwd", TORCH_BOX(&rpp::value_loss_fwd));
  m.impl("rollout_weights_fwd", TORCH_BOX(&rpp::rollout_weights_fwd));
  m.impl("dpo_loss_fwd", TORCH_BOX(&rpp::dpo_loss_fwd));
  m.impl("copg_loss_fwd", TORCH_BOX(&rpp::copg_loss_fwd));
  m.impl("preference_loss_bwd", TORCH_BOX(&rpp::preference_loss_bwd));
}

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
