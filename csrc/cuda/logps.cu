// Log-prob, entropy and log-sum-exp of rows of logits, and their gradient. One read of the logits forward; one read and
// one write backward. A block takes a row, or one of the parts into which the vocabulary cuts it.
#include "cuda/row.h"
#include "ops.h"

namespace rpp::cuda {
namespace {

template <class S>
struct RowArgs {
  using T = Compute<S>;
  const S* logits;
  Rows rows;
  const int64_t* target_ids;
  const bool* mask;
  double temperature;
  const T* token_temperature;
  double softcap;

  __device__ double temperature_of(int64_t token) const {
    return token_temperature ? static_cast<double>(token_temperature[token]) : temperature;
  }
};

template <class S>
struct StatisticsArgs : RowArgs<S> {
  using T = Compute<S>;
  T *logps, *entropy, *lse, *lse_rest, *sum_squares;
  RowSums* of_part;   // (T, parts), where there are several
  unsigned* arrived;  // (T,) of those
};

template <class S, bool with_softcap, bool with_squares>
__global__ void __launch_bounds__(kRowThreads) row_statistics_kernel(StatisticsArgs<S> a) {
  using T = Compute<S>;
  constexpr int N = kVector<S>, U = 4;
  const int64_t parts = parts_of(a.rows.vocab), token = blockIdx.x / parts, part = blockIdx.x % parts;
  if (a.mask && !a.mask[token]) {
    if (part != 0 || threadIdx.x != 0) return;
    a.logps[token] = a.entropy[token] = a.lse[token] = a.lse_rest[token] = 0;
    if constexpr (with_squares) a.sum_squares[token] = 0;
    return;
  }
  const S* row = a.logits + a.rows.offset(token);
  const double temperature = a.temperature_of(token), rate = kLog2E / temperature;
  const auto cap = softcap_of<T>(with_softcap ? a.softcap : 1);
  RowTerms<T, with_squares> terms;
  for_columns<N, U>(row, part_of(a.rows.vocab, part), begins_16_bytes(row), [&](int64_t, T(&x)[N], int n) {
    if constexpr (with_softcap)
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = i < n ? softcapped(x[i], cap).value : x[i];
    terms.add(x, static_cast<T>(rate));
  });
  RowSums sums = merged_in_block(terms, static_cast<T>(rate), shared_memory<RowShared>());
  if (threadIdx.x != 0) return;
  if (parts > 1) {
    RowSums* each = a.of_part + token * parts;
    each[part] = sums;
    if (!arrives_last(a.arrived + token, parts)) return;
    const auto fresh = [&](int64_t i) {
      return RowSums{__ldcg(&each[i].top), __ldcg(&each[i].sum), __ldcg(&each[i].weighted), __ldcg(&each[i].squares)};
    };
    sums = fresh(0);
    for (int64_t i = 1; i < parts; ++i) sums = merged(sums, fresh(i), rate);
  }
  const T target = target_logit<S, with_softcap>(row, a.target_ids[token], a.rows.vocab, cap);
  const auto results = results_of<T>(sums, target, temperature);
  a.logps[token] = results.logps;
  a.entropy[token] = results.entropy;
  a.lse[token] = results.lse;
  a.lse_rest[token] = results.lse_rest;
  if constexpr (with_squares) a.sum_squares[token] = row_sum_squares<T>(sums.top, sums.sum, sums.squares);
}

template <class S, class D>
struct GradientArgs : RowArgs<S> {
  using T = Compute<S>;
  D* dlogits;             // may be the logits
  int64_t out_stride;     // of its rows
  const int64_t* tokens;  // that its rows are of, or null: all
  const T *entropy, *lse, *lse_rest;
  const T *dlogps, *dentropy, *dlse;  // each may be null
};

template <class T>
struct GradientShared {
  RowGradient<T> gradient;
  T dlogps;
  bool wanted;
};

template <class S, class D, bool with_softcap>
__global__ void __launch_bounds__(kRowThreads) dlogits_kernel(GradientArgs<S, D> a) {
  using T = Compute<S>;
  constexpr int N = kVector<D> > kVector<S> ? kVector<D> : kVector<S>, U = N > kVector<S> ? 1 : 2;
  const int64_t parts = parts_of(a.rows.vocab), index = blockIdx.x / parts, part = blockIdx.x % parts;
  const int64_t token = a.tokens ? a.tokens[index] : index;
  auto& shared = shared_memory<GradientShared<T>>();
  if (threadIdx.x == 0) {
    const auto at = [&](const T* p) { return p ? p[token] : T(0); };
    const T dlogps = at(a.dlogps), dentropy = at(a.dentropy), dlse = at(a.dlse);
    const T entropy = dentropy == 0 ? T(0) : a.entropy[token];
    shared.gradient = row_gradient(static_cast<double>(a.lse[token]) + a.lse_rest[token], entropy,
                                   a.temperature_of(token), dlogps, dentropy, dlse);
    shared.dlogps = dlogps;
    shared.wanted = !(a.mask && !a.mask[token]) && (dlogps != 0 || dentropy != 0 || dlse != 0);
  }
  __syncthreads();
  const S* row = a.logits + a.rows.offset(token);
  D* out = a.dlogits + index * a.out_stride;
  const Range columns = part_of(a.rows.vocab, part);
  const bool aligned = begins_16_bytes(row) && begins_16_bytes(out);
  const auto store = [&](int64_t column, const T(&d)[N], int n) {
    if (aligned && n == N) return store_whole(out + column, d);
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < n) out[column + i] = narrowed<D>(d[i]);
  };
  if (!shared.wanted) {  // exactly zero, and the logits are not read
    const T zeros[N] = {};
    for (int64_t column = column_of(columns.begin, threadIdx.x, kRowThreads, 0, N); column < columns.end;
         column += kRowThreads * N)
      store(column, zeros, static_cast<int>(least(N, columns.end - column)));
    return;
  }
  const auto cap = softcap_of<T>(with_softcap ? a.softcap : 1);
  const auto gradient = shared.gradient;
  const T dlogps = shared.dlogps;
  const int64_t target = a.target_ids[token];
  for_columns<N, U>(row, columns, aligned, [&](int64_t column, T(&x)[N], int n) {
    dlogits_of<with_softcap>(x, gradient, dlogps, target - column, cap);
    store(column, x, n);
  });
}

// ---- the host's side

Rows rows_of(const Tensor& logits) {
  const int64_t dim = logits.dim();
  STD_TORCH_CHECK(dim == 2 || dim == 3, "logits: want 2 or 3 dimensions, got ", dim);
  STD_TORCH_CHECK(logits.stride(dim - 1) == 1 || logits.size(dim - 1) <= 1, "logits: want rows without gaps");
  return {logits.size(dim - 1), most(logits.size(dim - 2), 1), dim == 3 ? logits.stride(0) : 0, logits.stride(dim - 2)};
}

template <class S>
void fill(RowArgs<S>& a, const Tensor& logits, const Tensor& target_ids, const MaybeTensor& mask, double temperature,
          const MaybeTensor& token_temperature, double softcap) {
  const int64_t tokens = target_ids.numel();
  a.rows = rows_of(logits);
  STD_TORCH_CHECK(logits.numel() == tokens * a.rows.vocab, "logits: want a row for each of ", tokens, " target_ids");
  a.logits = static_cast<const S*>(logits.data_ptr());
  a.target_ids = data_of<int64_t>(target_ids, tokens, "target_ids");
  a.mask = data_of<bool>(mask, tokens, "completion_mask");
  a.temperature = temperature;
  a.token_temperature = data_of<Compute<S>>(token_temperature, tokens, "temperature");
  a.softcap = softcap;
}

using Statistics = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class S>
Statistics statistics(const Tensor& logits, const Tensor& target_ids, const MaybeTensor& mask, double temperature,
                      const MaybeTensor& token_temperature, double softcap, bool sum_squares) {
  using T = Compute<S>;
  const int64_t tokens = target_ids.numel();
  StatisticsArgs<S> a{};
  fill(a, logits, target_ids, mask, temperature, token_temperature, softcap);
  Tensor logps, entropy, lse, lse_rest, squares, of_part, arrived;
  a.logps = new_like<T>(logits, {tokens}, logps);
  a.entropy = new_like<T>(logits, {tokens}, entropy);
  a.lse = new_like<T>(logits, {tokens}, lse);
  a.lse_rest = new_like<T>(logits, {tokens}, lse_rest);
  a.sum_squares = new_like<T>(logits, {sum_squares ? tokens : 0}, squares);
  const int64_t parts = parts_of(a.rows.vocab), several = parts > 1 ? tokens : 0;
  a.of_part = reinterpret_cast<RowSums*>(new_like<double>(logits, {several * parts * 4}, of_part));
  a.arrived = several ? new_counters(logits, several, arrived) : nullptr;
  auto* kernel = sum_squares ? row_statistics_kernel<S, false, true> : row_statistics_kernel<S, false, false>;
  if constexpr (std::is_same_v<S, T>)  // chunks alone have one
    if (softcap != 0) kernel = row_statistics_kernel<S, true, false>;
  launch(logits, {tokens * parts, kRowThreads, sizeof(RowShared)}, kernel, a);
  return {logps, entropy, lse, lse_rest, squares};
}

template <class S, class D>
void gradient(const Tensor& dlogits, const Tensor& logits, const MaybeTensor& rows, const Tensor& target_ids,
              const MaybeTensor& mask, double temperature, const MaybeTensor& token_temperature, double softcap,
              const Tensor& entropy, const Tensor& lse, const Tensor& lse_rest, const MaybeTensor& dlogps,
              const MaybeTensor& dentropy, const MaybeTensor& dlse) {
  using T = Compute<S>;
  const int64_t tokens = target_ids.numel(), count = rows.has_value() ? rows->numel() : tokens;
  GradientArgs<S, D> a{};
  fill(a, logits, target_ids, mask, temperature, token_temperature, softcap);
  const int64_t dim = dlogits.dim();
  STD_TORCH_CHECK(dlogits.numel() == count * a.rows.vocab && (dim == 2 || dlogits.is_contiguous()) &&
                      (dlogits.stride(dim - 1) == 1 || a.rows.vocab <= 1),
                  "dlogits: want a row for each of ", count, " tokens");
  a.dlogits = static_cast<D*>(dlogits.data_ptr());
  a.out_stride = dlogits.stride(dim - 2);
  a.tokens = data_of<int64_t>(rows, count, "rows");
  a.entropy = data_of<T>(entropy, tokens, "entropy");
  a.lse = data_of<T>(lse, tokens, "lse");
  a.lse_rest = data_of<T>(lse_rest, tokens, "lse_rest");
  a.dlogps = data_of<T>(dlogps, tokens, "dlogps");
  a.dentropy = data_of<T>(dentropy, tokens, "dentropy");
  a.dlse = data_of<T>(dlse, tokens, "dlse");
  auto* kernel = dlogits_kernel<S, D, false>;
  if constexpr (std::is_same_v<S, T>)
    if (softcap != 0) kernel = dlogits_kernel<S, D, true>;
  launch(logits, {count * parts_of(a.rows.vocab), kRowThreads, sizeof(GradientShared<T>)}, kernel, a);
}

}  // namespace

Statistics logps_fwd(Tensor logits, Tensor target_ids, MaybeTensor mask, double temperature,
                     MaybeTensor token_temperature, bool sum_squares) {
  return for_storage_types(logits, logits.scalar_type(), [&]<class S, class D>(S*, D*) {
    return statistics<S>(logits, target_ids, mask, temperature, token_temperature, 0, sum_squares);
  });
}

void logps_bwd_out(Tensor dlogits, Tensor logits, Tensor target_ids, MaybeTensor mask, double temperature,
                   MaybeTensor token_temperature, Tensor entropy, Tensor lse, Tensor lse_rest, MaybeTensor dlogps,
                   MaybeTensor dentropy, MaybeTensor dlse) {
  for_storage_types(logits, dlogits.scalar_type(), [&]<class S, class D>(S*, D*) {
    gradient<S, D>(dlogits, logits, std::nullopt, target_ids, mask, temperature, token_temperature, 0, entropy, lse,
                   lse_rest, dlogps, dentropy, dlse);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> chunk_logps_fwd(Tensor logits, Tensor target_ids, double temperature,
                                                           MaybeTensor token_temperature, double softcap) {
  return for_float_type(logits, [&]<class T>(T*) {
    const auto [logps, entropy, lse, lse_rest, none] =
        statistics<T>(logits, target_ids, std::nullopt, temperature, token_temperature, softcap, false);
    return std::tuple{logps, entropy, lse, lse_rest};
  });
}

void chunk_logps_bwd_out(Tensor dlogits, Tensor logits, MaybeTensor rows, Tensor target_ids, double temperature,
                         MaybeTensor token_temperature, double softcap, Tensor entropy, Tensor lse, Tensor lse_rest,
                         MaybeTensor dlogps, MaybeTensor dentropy, MaybeTensor dlse) {
  for_storage_types(logits, dlogits.scalar_type(), [&]<class S, class D>(S*, D*) {
    gradient<S, D>(dlogits, logits, rows, target_ids, std::nullopt, temperature, token_temperature, softcap, entropy,
                   lse, lse_rest, dlogps, dentropy, dlse);
  });
}

}  // namespace rpp::cuda
