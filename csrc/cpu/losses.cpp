#include "cpu/losses.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"
#include "ops.h"

#define RPP_KERNELS "cpu/kernels/losses.h"
#include "cpu/for_each_isa.h"

namespace rpp::cpu {
namespace {

// Runs a fused loss: `set` fills in the arguments of its own, `kernel(begin, end)` walks the sequences.
template <class T, class Args, class Kernel>
std::tuple<Tensor, Tensor, Tensor> fused_loss(Args& a, const Tensor& like, const MaybeTensor& mask,
                                              const Tensor& cu_seqlens, bool sequence_mean, bool per_token,
                                              int64_t num_stats, const Kernel& kernel) {
  const int64_t tokens = like.numel(), count = cu_seqlens.numel() - 1;
  Tensor loss, slope, stats;
  std::vector<double> sums(count * kLossSums);
  a.mask = data_of<bool>(mask, tokens, "completion_mask");
  a.cu_seqlens = sequences_of(cu_seqlens, tokens);
  a.sequence_mean = sequence_mean;
  T* loss_data = per_token ? new_like<T>(like, {tokens}, loss) : new_like<T>(like, {}, loss);
  a.loss = per_token ? loss_data : nullptr;
  a.slope = new_like<T>(like, {tokens}, slope);
  a.sums = sums.data();
  parallel_rows(count, tokens / std::max<int64_t>(count, 1), kernel);
  double total[kLossSums] = {};
  for (int64_t i = 0; i < count; ++i)
    for (int k = 0; k < kLossSums; ++k) total[k] += sums[i * kLossSums + k];
  if (!per_token) *loss_data = static_cast<T>(total[0]);
  double* stats_data = new_like<double>(like, {num_stats}, stats);
  for (int64_t k = 0; k < num_stats; ++k) stats_data[k] = total[1 + k];
  return {loss, slope, stats};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss_fwd(
    Tensor logps, Tensor old_logps, Tensor advantages, MaybeTensor mask, Tensor cu_seqlens, MaybeTensor weights,
    MaybeTensor ref_logps, MaybeTensor entropy, MaybeTensor dloss, double option_0, double option_1, double option_2,
    double option_3, double log_ratio_clamp, double beta, double kl_clamp, double entropy_coef, int64_t surrogate,
    int64_t level, int64_t kl_estimator, int64_t kl_gradient, bool kl_bias_correction, bool sequence_advantages,
    bool sequence_mean, bool per_token) {
  return for_float_type(logps, [&]<class T>(T*) {
    const int64_t tokens = logps.numel(), count = cu_seqlens.numel() - 1;
    const auto number = [](double x) { return static_cast<T>(x); };
    Tensor entropy_slope;
    PolicyArgs<T> a{};
    a.logps = data_of<T>(logps, tokens, "logps");
    a.old_logps = data_of<T>(old_logps, tokens, "old_logps");
    a.sequence_advantages = sequence_advantages;
    a.advantages = data_of<T>(advantages, a.sequence_advantages ? count : tokens, "advantages");
    a.weights = data_of<T>(weights, tokens, "weights");
    a.ref_logps = data_of<T>(ref_logps, tokens, "ref_logps");
    a.entropy = data_of<T>(entropy, tokens, "entropy");
    a.dloss = data_of<T>(dloss, tokens, "dloss");
    a.entropy_slope = new_like<T>(logps, {entropy.has_value() ? tokens : 0}, entropy_slope);
    a.surrogate = surrogate;
    a.level = static_cast<Level>(level);
    std::ranges::copy(std::array{number(option_0), number(option_1), number(option_2), number(option_3)}, a.options);
    a.log_ratio_clamp = number(log_ratio_clamp);
    a.kl_estimator = kl_estimator;
    a.kl_gradient = kl_gradient;
    a.kl_bias_correction = kl_bias_correction;
    a.beta = number(beta);
    a.kl_clamp = number(kl_clamp);
    a.entropy_coef = number(entropy_coef);
    const auto [loss, slope, stats] =
        fused_loss<T>(a, logps, mask, cu_seqlens, sequence_mean, per_token, kLossSums - 1,
                      [&](int64_t begin, int64_t end) { RPP_CALL(policy_sequences<T>, a, begin, end); });
    return std::tuple{loss, slope, entropy_slope, stats};
  });
}

std::tuple<Tensor, Tensor, Tensor> value_loss_fwd(Tensor values, Tensor old_values, Tensor returns, MaybeTensor mask,
                                                  Tensor cu_seqlens, double epsilon, bool sequence_mean,
                                                  bool per_token) {
  return for_float_type(values, [&]<class T>(T*) {
    const int64_t tokens = values.numel();
    ValueArgs<T> a{};
    a.values = data_of<T>(values, tokens, "values");
    a.old_values = data_of<T>(old_values, tokens, "old_values");
    a.returns = data_of<T>(returns, tokens, "returns");
    a.epsilon = static_cast<T>(epsilon);
    return fused_loss<T>(a, values, mask, cu_seqlens, sequence_mean, per_token, 4,
                         [&](int64_t begin, int64_t end) { RPP_CALL(value_sequences<T>, a, begin, end); });
  });
}

}  // namespace rpp::cpu
