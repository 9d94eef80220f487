#include "ops.h"

namespace rpp::cuda {
std::tuple<Tensor, Tensor> rollout_weights_fwd(Tensor old_logps, Tensor sampling_logps, MaybeTensor mask,
                                               Tensor cu_seqlens, int64_t level, bool truncate, double low, double high,
                                               double log_ratio_clamp) {
  STD_TORCH_CHECK(false, "rollout_weights_fwd is not written yet");
}
}  // namespace rpp::cuda
