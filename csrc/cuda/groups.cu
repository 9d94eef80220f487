#include "ops.h"

namespace rpp::cuda {
Tensor group_advantages_fwd(Tensor scores, MaybeTensor group_index, MaybeTensor lengths, MaybeTensor moments,
                            int64_t group_size, int64_t num_groups, int64_t baseline, int64_t std, bool unbiased,
                            double eps, bool keep_singletons) {
  STD_TORCH_CHECK(false, "group_advantages_fwd is not written yet");
}
Tensor group_advantages_bwd(Tensor dadvantages, Tensor scores, MaybeTensor group_index, MaybeTensor lengths,
                            int64_t group_size, int64_t num_groups, int64_t baseline, int64_t std, bool unbiased,
                            double eps, bool keep_singletons) {
  STD_TORCH_CHECK(false, "group_advantages_bwd is not written yet");
}
}  // namespace rpp::cuda
