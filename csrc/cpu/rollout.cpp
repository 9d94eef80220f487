#include "cpu/rollout.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"
#include "ops.h"

#define RPP_KERNELS "cpu/kernels/rollout.h"
#include "cpu/for_each_isa.h"

namespace rpp::cpu {

std::tuple<Tensor, Tensor> rollout_weights_fwd(Tensor old_logps, Tensor sampling_logps, MaybeTensor mask,
                                               Tensor cu_seqlens, int64_t level, bool truncate, double low, double high,
                                               double log_ratio_clamp) {
  return for_float_type(old_logps, [&]<class T>(T*) {
    const int64_t tokens = old_logps.numel(), count = cu_seqlens.numel() - 1;
    std::vector<double> sums(count * kRolloutSums);
    Tensor weights, stats;
    const RolloutArgs<T> a{data_of<T>(old_logps, tokens, "old_logps"),
                           data_of<T>(sampling_logps, tokens, "sampling_logps"),
                           data_of<bool>(mask, tokens, "completion_mask"),
                           sequences_of(cu_seqlens, tokens),
                           static_cast<RolloutLevel>(level),
                           truncate,
                           static_cast<T>(low),
                           static_cast<T>(high),
                           static_cast<T>(log_ratio_clamp),
                           new_like<T>(old_logps, {tokens}, weights),
                           sums.data()};
    parallel_rows(count, tokens / std::max<int64_t>(count, 1),
                  [&](int64_t begin, int64_t end) { RPP_CALL(rollout_sequences<T>, a, begin, end); });
    double* total = new_like<double>(old_logps, {kRolloutSums}, stats);
    std::fill_n(total, kRolloutSums, 0.0);
    for (size_t i = 0; i < sums.size(); ++i) total[i % kRolloutSums] += sums[i];
    return std::tuple{weights, stats};
  });
}

}  // namespace rpp::cpu
