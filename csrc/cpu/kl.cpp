#include "cpu/kl.h"

#include <cstring>

#include "cpu/parallel.h"
#include "ops.h"

#define RPP_KERNELS "cpu/kernels/kl.h"
#include "cpu/for_each_isa.h"

namespace rpp::cpu {
namespace {

Tensor kl(const MaybeTensor& dkl, const Tensor& logps, const Tensor& ref_logps, const MaybeTensor& mask,
          int64_t estimator, double log_ratio_clamp, double kl_clamp) {
  return for_float_type(logps, [&]<class T>(T*) {
    const int64_t n = logps.numel();
    Tensor out;
    KlArgs<T> a{data_of<T>(logps, n, "logps"),
                data_of<T>(ref_logps, n, "ref_logps"),
                data_of<bool>(mask, n, "completion_mask"),
                data_of<T>(dkl, n, "dkl"),
                estimator,
                static_cast<T>(log_ratio_clamp),
                static_cast<T>(kl_clamp),
                new_like<T>(logps, {n}, out)};
    parallel_rows(n, 1, [&](int64_t begin, int64_t end) { RPP_CALL(kl_tokens<T>, a, begin, end); });
    return out;
  });
}

}  // namespace

Tensor kl_fwd(Tensor logps, Tensor ref_logps, MaybeTensor mask, int64_t estimator, double log_ratio_clamp,
              double kl_clamp) {
  return kl({}, logps, ref_logps, mask, estimator, log_ratio_clamp, kl_clamp);
}

Tensor kl_bwd(Tensor dkl, Tensor logps, Tensor ref_logps, MaybeTensor mask, int64_t estimator, double log_ratio_clamp,
              double kl_clamp) {
  return kl(dkl, logps, ref_logps, mask, estimator, log_ratio_clamp, kl_clamp);
}

}  // namespace rpp::cpu
