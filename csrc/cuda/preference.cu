#include "ops.h"

namespace rpp::cuda {
std::tuple<Tensor, Tensor, Tensor> dpo_loss_fwd(Tensor logps, MaybeTensor ref_logps, MaybeTensor mask,
                                                Tensor cu_seqlens, int64_t loss_type, double beta,
                                                double label_smoothing, double margin, bool length_normalized,
                                                bool per_pair) {
  STD_TORCH_CHECK(false, "dpo_loss_fwd is not written yet");
}
std::tuple<Tensor, Tensor, Tensor> copg_loss_fwd(Tensor logps, Tensor ref_logps, Tensor scores, MaybeTensor mask,
                                                 Tensor cu_seqlens, int64_t group_size, double beta, bool per_group) {
  STD_TORCH_CHECK(false, "copg_loss_fwd is not written yet");
}
Tensor preference_loss_bwd(Tensor each, MaybeTensor mask, Tensor cu_seqlens, int64_t num_tokens) {
  STD_TORCH_CHECK(false, "preference_loss_bwd is not written yet");
}
}  // namespace rpp::cuda
