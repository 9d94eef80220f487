#include "cpu/losses.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"
#include "ops.h"

#define RPP_KERNELS "cpu/kernels/losses.h"
#include "cpu/for_each_isa.h"

namespace rpp {
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

std::tuple<Tensor, Tensor, Tensor> policy_loss_fwd(Tensor logps, Tensor old_logps, Tensor advantages,
                                                   bool sequence_advantages, MaybeTensor mask, Tensor cu_seqlens,
                                                   double epsilon_low, double epsilon_high, double dual_clip,
                                                   double log_ratio_clamp, bool sequence_ratio, bool sequence_mean,
                                                   bool per_token) {
  return for_float_type(logps, [&]<class T>(T*) {
    const int64_t tokens = logps.numel(), count = cu_seqlens.numel() - 1;
    PolicyArgs<T> a{};
    a.logps = data_of<T>(logps, tokens, "logps");
    a.old_logps = data_of<T>(old_logps, tokens, "old_logps");
    a.sequence_advantages = sequence_advantages;
    a.advantages = data_of<T>(advantages, a.sequence_advantages ? count : tokens, "advantages");
    a.sequence_ratio = sequence_ratio;
    a.low = static_cast<T>(1 - epsilon_low);
    a.high = static_cast<T>(1 + epsilon_high);
    a.dual = static_cast<T>(dual_clip);
    a.log_ratio_clamp = static_cast<T>(log_ratio_clamp);
    return fused_loss<T>(a, logps, mask, cu_seqlens, sequence_mean, per_token, 7,
                         [&](int64_t begin, int64_t end) { RPP_CALL(policy_sequences<T>, a, begin, end); });
  });
}

// Of unreduced losses of a sequence-level ratio: dlogps_t = sum_u dloss_u slope_u / n over the sequence of t.
Tensor policy_loss_bwd(Tensor dloss, Tensor slope, MaybeTensor mask, Tensor cu_seqlens) {
  return for_float_type(slope, [&]<class T>(T*) {
    const int64_t tokens = slope.numel(), count = cu_seqlens.numel() - 1;
    const T* d = data_of<T>(dloss, tokens, "dloss");
    const T* s = data_of<T>(slope, tokens, "slope");
    const bool* m = data_of<bool>(mask, tokens, "completion_mask");
    const int64_t* cu = sequences_of(cu_seqlens, tokens);
    Tensor dlogps;
    T* out = new_like<T>(slope, {tokens}, dlogps);
    parallel_rows(count, tokens / std::max<int64_t>(count, 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double sum = 0, valid = 0;
        for (int64_t t = cu[i]; t < cu[i + 1]; ++t)
          if (!m || m[t]) sum += double(d[t]) * s[t], valid += 1;
        const T share = static_cast<T>(sum / std::max(valid, 1.0));
        for (int64_t t = cu[i]; t < cu[i + 1]; ++t) out[t] = !m || m[t] ? share : T(0);
      }
    });
    return dlogps;
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

}  // namespace rpp
