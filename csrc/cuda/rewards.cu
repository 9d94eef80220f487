#include "ops.h"

namespace rpp::cuda {
Tensor token_rewards_fwd(Tensor scores, Tensor kl, MaybeTensor mask, Tensor cu_seqlens, double beta) {
  STD_TORCH_CHECK(false, "token_rewards_fwd is not written yet");
}
std::tuple<Tensor, Tensor> token_rewards_bwd(Tensor drewards, MaybeTensor mask, Tensor cu_seqlens, double beta) {
  STD_TORCH_CHECK(false, "token_rewards_bwd is not written yet");
}
Tensor returns_fwd(Tensor rewards, MaybeTensor mask, Tensor cu_seqlens, double gamma, int64_t gap) {
  STD_TORCH_CHECK(false, "returns_fwd is not written yet");
}
Tensor returns_bwd(Tensor dreturns, MaybeTensor mask, Tensor cu_seqlens, double gamma, int64_t gap) {
  STD_TORCH_CHECK(false, "returns_bwd is not written yet");
}
std::tuple<Tensor, Tensor> gae_fwd(Tensor rewards, Tensor values, MaybeTensor mask, Tensor cu_seqlens, double gamma,
                                   double gae_lambda, int64_t gap) {
  STD_TORCH_CHECK(false, "gae_fwd is not written yet");
}
std::tuple<Tensor, Tensor> gae_bwd(Tensor dadvantages, Tensor dreturns, MaybeTensor mask, Tensor cu_seqlens,
                                   double gamma, double gae_lambda, int64_t gap) {
  STD_TORCH_CHECK(false, "gae_bwd is not written yet");
}
}  // namespace rpp::cuda
