#include "cpu/advantages.h"

#include <cstring>
#include <vector>

#include "cpu/parallel.h"
#include "ops.h"

#define RPP_KERNELS "cpu/kernels/advantages.h"
#include "cpu/for_each_isa.h"

namespace rpp::cpu {
namespace {

Moments merged(const std::vector<Moments>& parts) {
  Moments total;
  for (const auto& part : parts) total.merge(part);
  return total;
}

int64_t blocks_of(int64_t size) { return (size + kMomentsBlock - 1) / kMomentsBlock; }

Tensor as_tensor(const Moments& m, const Tensor& like) {
  Tensor out;
  double* data = new_like<double>(like, {3}, out);
  data[0] = m.count, data[1] = m.mean, data[2] = m.squares;
  return out;
}

Moments as_moments(const Tensor& moments) {
  const double* data = data_of<double>(moments, 3, "moments");
  return {data[0], data[1], data[2]};
}

template <class T>
void affine(const AffineArgs<T>& a, int64_t size) {
  parallel_rows(size, 1, [&](int64_t begin, int64_t end) { RPP_CALL(affine_tokens<T>, a, begin, end); });
}

}  // namespace

Tensor moments(Tensor values, MaybeTensor mask) {
  return for_float_type(values, [&]<class T>(T*) {
    const int64_t size = values.numel();
    std::vector<Moments> blocks(blocks_of(size));
    const MomentsArgs<T> a{data_of<T>(values, size, "values"), data_of<bool>(mask, size, "completion_mask"), size,
                           blocks.data()};
    parallel_rows(blocks.size(), kMomentsBlock,
                  [&](int64_t begin, int64_t end) { RPP_CALL(moments_blocks<T>, a, begin, end); });
    return as_tensor(merged(blocks), values);
  });
}

void whiten_out(Tensor out, Tensor values, MaybeTensor mask, Tensor moments, bool shift_mean, bool unbiased, double eps,
                int64_t eps_mode) {
  for_float_type(values, [&]<class T>(T*) {
    const int64_t size = values.numel();
    const Moments m = as_moments(moments);
    const Whitening w(m, unbiased, eps, static_cast<EpsMode>(eps_mode));
    affine<T>({data_of<T>(values, size, "values"), nullptr, data_of<bool>(mask, size, "completion_mask"),
               whitened<T>(m, w, shift_mean), const_cast<T*>(data_of<T>(out, size, "out"))},
              size);
  });
}

Tensor whiten_bwd(Tensor dout, Tensor values, MaybeTensor mask, Tensor moments, bool shift_mean, bool unbiased,
                  double eps, int64_t eps_mode) {
  return for_float_type(values, [&]<class T>(T*) {
    const int64_t size = values.numel();
    const Moments m = as_moments(moments);
    const Whitening w(m, unbiased, eps, static_cast<EpsMode>(eps_mode));
    std::vector<Moments> blocks(blocks_of(size));
    const ProductsArgs<T> a{
        {data_of<T>(values, size, "values"), data_of<bool>(mask, size, "completion_mask"), size, blocks.data()},
        data_of<T>(dout, size, "dout"),
        static_cast<T>(m.mean)};
    parallel_rows(blocks.size(), kMomentsBlock,
                  [&](int64_t begin, int64_t end) { RPP_CALL(products_blocks<T>, a, begin, end); });
    double sum = 0, products = 0;
    for (const auto& b : blocks) sum += b.mean * b.count, products += b.squares;
    Tensor out;
    T* data = new_like<T>(values, {size}, out);
    affine<T>({a.values, a.dout, a.mask, whitened_gradient<T>(m, w, shift_mean, sum, products), data}, size);
    return out;
  });
}

std::tuple<Tensor, Tensor> reinforce_pp_fwd(Tensor scores, Tensor old_logps, MaybeTensor ref_logps, MaybeTensor mask,
                                            Tensor cu_seqlens, double beta, double gamma, int64_t estimator,
                                            double log_ratio_clamp, double kl_clamp) {
  return for_float_type(old_logps, [&]<class T>(T*) {
    const int64_t tokens = old_logps.numel(), count = cu_seqlens.numel() - 1;
    std::vector<Moments> sequences(count);
    Tensor returns;
    const ReinforcePPArgs<T> a{data_of<T>(scores, count, "scores"),
                               data_of<T>(old_logps, tokens, "old_logps"),
                               data_of<T>(ref_logps, tokens, "ref_logps"),
                               data_of<bool>(mask, tokens, "completion_mask"),
                               sequences_of(cu_seqlens, tokens),
                               static_cast<T>(beta),
                               static_cast<T>(gamma),
                               estimator,
                               static_cast<T>(log_ratio_clamp),
                               static_cast<T>(kl_clamp),
                               new_like<T>(old_logps, {tokens}, returns),
                               sequences.data()};
    parallel_rows(count, tokens / std::max<int64_t>(count, 1),
                  [&](int64_t begin, int64_t end) { RPP_CALL(reinforce_pp_sequences<T>, a, begin, end); });
    return std::tuple{returns, as_tensor(merged(sequences), old_logps)};
  });
}

}  // namespace rpp::cpu
