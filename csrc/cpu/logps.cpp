#include "cpu/logps.h"

#include <cstring>

#include "checks.h"
#include "cpu/parallel.h"
#include "ops.h"

namespace rpp {

inline double to_double(double x) { return x; }
inline double to_double(float x) { return x; }
inline double to_double(f16 x) { return static_cast<float>(x); }
inline double to_double(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

inline void from_compute(double x, double& out) { out = x; }
inline void from_compute(float x, float& out) { out = x; }
inline void from_compute(float x, f16& out) { out = static_cast<f16>(x); }
inline void from_compute(float x, bf16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  out.bits = x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : (bits >> 16) | 0x40u;
}

}  // namespace rpp

#define RPP_KERNELS "cpu/kernels/logps.h"
#include "cpu/for_each_isa.h"

namespace rpp::cpu {
namespace {

template <class S>
Logits<S> logits_of(const Tensor& logits) {
  const int64_t dim = logits.dim();
  STD_TORCH_CHECK((dim == 2 || dim == 3) && (logits.stride(dim - 1) == 1 || logits.size(dim - 1) == 1),
                  "logits: want rows that are contiguous");
  const int64_t vocab = logits.size(dim - 1), inner = logits.size(dim - 2);
  const int64_t outer = dim == 3 ? logits.size(0) : 1;
  return {static_cast<const S*>(logits.data_ptr()), outer * inner,         vocab, inner > 0 ? inner : 1,
          dim == 3 ? logits.stride(0) : 0,          logits.stride(dim - 2)};
}

template <class S>
LogpsArgs<S> args_of(const Tensor& logits, const Tensor& target_ids, const MaybeTensor& mask, double temperature,
                     const MaybeTensor& token_temperature) {
  const auto view = logits_of<S>(logits);
  LogpsArgs<S> a{view,
                 data_of<int64_t>(target_ids, view.rows, "target_ids"),
                 data_of<bool>(mask, view.rows, "completion_mask"),
                 temperature,
                 data_of<Compute<S>>(token_temperature, view.rows, "temperature"),
                 nullptr,
                 nullptr,
                 nullptr,
                 nullptr,
                 nullptr};
  for (int64_t i = 0; i < view.rows; ++i) {
    const int64_t y = a.target_ids[i];
    STD_TORCH_CHECK((a.mask && !a.mask[i]) || (y >= 0 && y < view.vocab), "target_ids: ", y, " at token ", i,
                    " is outside the vocabulary of ", view.vocab);
  }
  return a;
}

// Calls f with a null pointer of the storage type of x.
template <class F>
auto for_storage_type(const Tensor& x, F f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(static_cast<float*>(nullptr));
    case ScalarType::Double: return f(static_cast<double*>(nullptr));
    case ScalarType::BFloat16: return f(static_cast<bf16*>(nullptr));
    case ScalarType::Half: return f(static_cast<f16*>(nullptr));
    default: STD_TORCH_CHECK(false, "logits: want float32, float64, bfloat16 or float16");
  }
}

template <class S>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& target_ids,
                                                           const MaybeTensor& mask, double temperature,
                                                           const MaybeTensor& token_temperature, bool sum_squares) {
  auto a = args_of<S>(logits, target_ids, mask, temperature, token_temperature);
  Tensor logps, entropy, lse, lse_rest, squares;
  a.logps = new_like<Compute<S>>(logits, {a.logits.rows}, logps);
  a.entropy = new_like<Compute<S>>(logits, {a.logits.rows}, entropy);
  a.lse = new_like<Compute<S>>(logits, {a.logits.rows}, lse);
  a.lse_rest = new_like<Compute<S>>(logits, {a.logits.rows}, lse_rest);
  Compute<S>* data = new_like<Compute<S>>(logits, {sum_squares ? a.logits.rows : 0}, squares);
  a.sum_squares = sum_squares ? data : nullptr;
  parallel_rows(a.logits.rows, a.logits.vocab,
                [&](int64_t begin, int64_t end) { RPP_CALL(logps_fwd_rows<S>, a, begin, end); });
  return {logps, entropy, lse, lse_rest, squares};
}

template <class S>
void backward(const Tensor& dlogits, const Tensor& logits, const Tensor& target_ids, const MaybeTensor& mask,
              double temperature, const MaybeTensor& token_temperature, const Tensor& entropy, const Tensor& lse,
              const Tensor& lse_rest, const MaybeTensor& dlogps, const MaybeTensor& dentropy, const MaybeTensor& dlse) {
  using T = Compute<S>;
  LogpsGradArgs<S> a{args_of<S>(logits, target_ids, mask, temperature, token_temperature)};
  const int64_t rows = a.logits.rows;
  a.entropy = const_cast<T*>(data_of<T>(entropy, rows, "entropy"));
  a.lse = const_cast<T*>(data_of<T>(lse, rows, "lse"));
  a.lse_rest = const_cast<T*>(data_of<T>(lse_rest, rows, "lse_rest"));
  a.dlogps = data_of<T>(dlogps, rows, "dlogps");
  a.dentropy = data_of<T>(dentropy, rows, "dentropy");
  a.dlse = data_of<T>(dlse, rows, "dlse");
  check_contiguous(dlogits, rows * a.logits.vocab, "dlogits");
  a.dlogits = static_cast<S*>(dlogits.data_ptr());
  parallel_rows(rows, a.logits.vocab, [&](int64_t begin, int64_t end) { RPP_CALL(logps_bwd_rows<S>, a, begin, end); });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> logps_fwd(Tensor logits, Tensor target_ids, MaybeTensor mask,
                                                             double temperature, MaybeTensor token_temperature,
                                                             bool sum_squares) {
  return for_storage_type(logits, [&]<class S>(S*) {
    return forward<S>(logits, target_ids, mask, temperature, token_temperature, sum_squares);
  });
}

void logps_bwd_out(Tensor dlogits, Tensor logits, Tensor target_ids, MaybeTensor mask, double temperature,
                   MaybeTensor token_temperature, Tensor entropy, Tensor lse, Tensor lse_rest, MaybeTensor dlogps,
                   MaybeTensor dentropy, MaybeTensor dlse) {
  for_storage_type(logits, [&]<class S>(S*) {
    backward<S>(dlogits, logits, target_ids, mask, temperature, token_temperature, entropy, lse, lse_rest, dlogps,
                dentropy, dlse);
  });
}

}  // namespace rpp::cpu
