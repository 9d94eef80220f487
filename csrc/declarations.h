// No include guard: ops.h includes it in a namespace for each kind of device.

// The last result, sum_j p_j^2, is empty without sum_squares.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> logps_fwd(Tensor logits, Tensor target_ids, MaybeTensor mask,
                                                             double temperature, MaybeTensor token_temperature,
                                                             bool sum_squares);
void logps_bwd_out(Tensor dlogits, Tensor logits, Tensor target_ids, MaybeTensor mask, double temperature,
                   MaybeTensor token_temperature, Tensor entropy, Tensor lse, Tensor lse_rest, MaybeTensor dlogps,
                   MaybeTensor dentropy, MaybeTensor dlse);

// Logits (n, V) of strides (1, ld), as a matrix product writes them fastest; not public.
std::tuple<Tensor, Tensor, Tensor, Tensor> chunk_logps_fwd(Tensor logits, Tensor target_ids, double temperature,
                                                           MaybeTensor token_temperature, double softcap);
void chunk_logps_bwd_out(Tensor dlogits, Tensor logits, MaybeTensor rows, Tensor target_ids, double temperature,
                         MaybeTensor token_temperature, double softcap, Tensor entropy, Tensor lse, Tensor lse_rest,
                         MaybeTensor dlogps, MaybeTensor dentropy, MaybeTensor dlse);

Tensor kl_fwd(Tensor logps, Tensor ref_logps, MaybeTensor mask, int64_t estimator, double log_ratio_clamp,
              double kl_clamp);
Tensor kl_bwd(Tensor dkl, Tensor logps, Tensor ref_logps, MaybeTensor mask, int64_t estimator, double log_ratio_clamp,
              double kl_clamp);

Tensor token_rewards_fwd(Tensor scores, Tensor kl, MaybeTensor mask, Tensor cu_seqlens, double beta);
std::tuple<Tensor, Tensor> token_rewards_bwd(Tensor drewards, MaybeTensor mask, Tensor cu_seqlens, double beta);
Tensor returns_fwd(Tensor rewards, MaybeTensor mask, Tensor cu_seqlens, double gamma, int64_t gap);
Tensor returns_bwd(Tensor dreturns, MaybeTensor mask, Tensor cu_seqlens, double gamma, int64_t gap);
std::tuple<Tensor, Tensor> gae_fwd(Tensor rewards, Tensor values, MaybeTensor mask, Tensor cu_seqlens, double gamma,
                                   double gae_lambda, int64_t gap);
std::tuple<Tensor, Tensor> gae_bwd(Tensor dadvantages, Tensor dreturns, MaybeTensor mask, Tensor cu_seqlens,
                                   double gamma, double gae_lambda, int64_t gap);

Tensor moments(Tensor values, MaybeTensor mask);
void whiten_out(Tensor out, Tensor values, MaybeTensor mask, Tensor moments, bool shift_mean, bool unbiased, double eps,
                int64_t eps_mode);
Tensor whiten_bwd(Tensor dout, Tensor values, MaybeTensor mask, Tensor moments, bool shift_mean, bool unbiased,
                  double eps, int64_t eps_mode);
std::tuple<Tensor, Tensor> reinforce_pp_fwd(Tensor scores, Tensor old_logps, MaybeTensor ref_logps, MaybeTensor mask,
                                            Tensor cu_seqlens, double beta, double gamma, int64_t estimator,
                                            double log_ratio_clamp, double kl_clamp);

// `moments` are those of all scores, where these are but a part of them; there is no gradient through others.
Tensor group_advantages_fwd(Tensor scores, MaybeTensor group_index, MaybeTensor lengths, MaybeTensor moments,
                            int64_t group_size, int64_t num_groups, int64_t baseline, int64_t std, bool unbiased,
                            double eps, bool keep_singletons);
Tensor group_advantages_bwd(Tensor dadvantages, Tensor scores, MaybeTensor group_index, MaybeTensor lengths,
                            int64_t group_size, int64_t num_groups, int64_t baseline, int64_t std, bool unbiased,
                            double eps, bool keep_singletons);

// dloss: of each token; the slope is then that of the sum of dloss * loss. Results: loss, its slopes in logps and in
// entropy (empty without), stats.
std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss_fwd(
    Tensor logps, Tensor old_logps, Tensor advantages, MaybeTensor mask, Tensor cu_seqlens, MaybeTensor weights,
    MaybeTensor ref_logps, MaybeTensor entropy, MaybeTensor dloss, double option_0, double option_1, double option_2,
    double option_3, double log_ratio_clamp, double beta, double kl_clamp, double entropy_coef, int64_t surrogate,
    int64_t level, int64_t kl_estimator, int64_t kl_gradient, bool kl_bias_correction, bool sequence_advantages,
    bool sequence_mean, bool per_token);
std::tuple<Tensor, Tensor, Tensor> value_loss_fwd(Tensor values, Tensor old_values, Tensor returns, MaybeTensor mask,
                                                  Tensor cu_seqlens, double epsilon, bool sequence_mean,
                                                  bool per_token);

std::tuple<Tensor, Tensor> rollout_weights_fwd(Tensor old_logps, Tensor sampling_logps, MaybeTensor mask,
                                               Tensor cu_seqlens, int64_t level, bool truncate, double low, double high,
                                               double log_ratio_clamp);
std::tuple<Tensor, Tensor, Tensor> dpo_loss_fwd(Tensor logps, MaybeTensor ref_logps, MaybeTensor mask,
                                                Tensor cu_seqlens, int64_t loss_type, double beta,
                                                double label_smoothing, double margin, bool length_normalized,
                                                bool per_pair);
std::tuple<Tensor, Tensor, Tensor> copg_loss_fwd(Tensor logps, Tensor ref_logps, Tensor scores, MaybeTensor mask,
                                                 Tensor cu_seqlens, int64_t group_size, double beta, bool per_group);
Tensor preference_loss_bwd(Tensor each, MaybeTensor mask, Tensor cu_seqlens, int64_t num_tokens);
