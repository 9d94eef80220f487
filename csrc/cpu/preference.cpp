#include "cpu/preference.h"

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "ops.h"

#define RPP_KERNELS "cpu/kernels/preference.h"
#include "cpu/for_each_isa.h"

namespace rpp::cpu {
namespace {

// Fills in the arguments that all losses share and adds up what `kernel(begin, end)` finds in its groups.
template <class T, class Args, class Kernel>
std::tuple<Tensor, Tensor, Tensor> over_groups(Args& a, const Tensor& logps, const MaybeTensor& ref_logps,
                                               const MaybeTensor& mask, const Tensor& cu_seqlens, int64_t group_size,
                                               bool per_group, int64_t num_stats, const Kernel& kernel) {
  const int64_t tokens = logps.numel(), batch = cu_seqlens.numel() - 1;
  a.cu_seqlens = sequences_of(cu_seqlens, tokens);
  STD_TORCH_CHECK(group_size > 1 && batch % group_size == 0, batch, " sequences are no whole groups of ", group_size);
  const int64_t groups = batch / group_size;
  Tensor loss, slope, stats;
  std::vector<double> sums(groups * kPreferenceSums);
  a.logps = data_of<T>(logps, tokens, "logps");
  a.ref_logps = data_of<T>(ref_logps, tokens, "ref_logps");
  a.mask = data_of<bool>(mask, tokens, "completion_mask");
  T* loss_data = per_group ? new_like<T>(logps, {groups}, loss) : new_like<T>(logps, {}, loss);
  a.loss = per_group ? loss_data : nullptr;
  a.slope = new_like<T>(logps, {batch}, slope);
  a.sums = sums.data();
  parallel_rows(groups, tokens / std::max<int64_t>(groups, 1), kernel);
  double total[kPreferenceSums] = {};
  for (int64_t i = 0; i < groups; ++i)
    for (int k = 0; k < kPreferenceSums; ++k) total[k] += sums[i * kPreferenceSums + k];
  if (!per_group) *loss_data = static_cast<T>(total[0]);
  std::copy_n(total + 1, num_stats, new_like<double>(logps, {num_stats}, stats));
  return {loss, slope, stats};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> dpo_loss_fwd(Tensor logps, MaybeTensor ref_logps, MaybeTensor mask,
                                                Tensor cu_seqlens, int64_t loss_type, double beta,
                                                double label_smoothing, double margin, bool length_normalized,
                                                bool per_pair) {
  return for_float_type(logps, [&]<class T>(T*) {
    DpoArgs<T> a{};
    a.loss_type = loss_type;
    a.beta = beta;
    a.label_smoothing = label_smoothing;
    a.margin = margin;
    a.length_normalized = length_normalized;
    return over_groups<T>(a, logps, ref_logps, mask, cu_seqlens, 2, per_pair, 5,
                          [&](int64_t begin, int64_t end) { RPP_CALL(dpo_pairs<T>, a, begin, end); });
  });
}

std::tuple<Tensor, Tensor, Tensor> copg_loss_fwd(Tensor logps, Tensor ref_logps, Tensor scores, MaybeTensor mask,
                                                 Tensor cu_seqlens, int64_t group_size, double beta, bool per_group) {
  return for_float_type(logps, [&]<class T>(T*) {
    const int64_t batch = cu_seqlens.numel() - 1;
    std::vector<double> log_ratios(batch);
    std::vector<int64_t> valid(batch);
    CopgArgs<T> a{};
    a.scores = data_of<T>(scores, batch, "scores");
    a.group_size = group_size;
    a.beta = beta;
    a.log_ratios = log_ratios.data();
    a.valid = valid.data();
    return over_groups<T>(a, logps, ref_logps, mask, cu_seqlens, group_size, per_group, 3,
                          [&](int64_t begin, int64_t end) { RPP_CALL(copg_groups<T>, a, begin, end); });
  });
}

Tensor preference_loss_bwd(Tensor each, MaybeTensor mask, Tensor cu_seqlens, int64_t num_tokens) {
  return for_float_type(each, [&]<class T>(T*) {
    const int64_t batch = cu_seqlens.numel() - 1;
    Tensor dlogps;
    SpreadArgs<T> a{};
    a.each = data_of<T>(each, batch, "each");
    a.mask = data_of<bool>(mask, num_tokens, "completion_mask");
    a.cu_seqlens = sequences_of(cu_seqlens, num_tokens);
    a.out = new_like<T>(each, {num_tokens}, dlogps);
    parallel_rows(batch, num_tokens / std::max<int64_t>(batch, 1),
                  [&](int64_t begin, int64_t end) { RPP_CALL(spread<T>, a, begin, end); });
    return dlogps;
  });
}

}  // namespace rpp::cpu
