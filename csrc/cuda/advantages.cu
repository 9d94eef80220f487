#include "ops.h"

namespace rpp::cuda {
Tensor moments(Tensor values, MaybeTensor mask) { STD_TORCH_CHECK(false, "moments is not written yet"); }
void whiten_out(Tensor out, Tensor values, MaybeTensor mask, Tensor moments, bool shift_mean, bool unbiased, double eps,
                int64_t eps_mode) {
  STD_TORCH_CHECK(false, "whiten_out is not written yet");
}
Tensor whiten_bwd(Tensor dout, Tensor values, MaybeTensor mask, Tensor moments, bool shift_mean, bool unbiased,
                  double eps, int64_t eps_mode) {
  STD_TORCH_CHECK(false, "whiten_bwd is not written yet");
}
std::tuple<Tensor, Tensor> reinforce_pp_fwd(Tensor scores, Tensor old_logps, MaybeTensor ref_logps, MaybeTensor mask,
                                            Tensor cu_seqlens, double beta, double gamma, int64_t estimator,
                                            double log_ratio_clamp, double kl_clamp) {
  STD_TORCH_CHECK(false, "reinforce_pp_fwd is not written yet");
}
}  // namespace rpp::cuda
