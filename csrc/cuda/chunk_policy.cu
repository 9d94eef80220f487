// A chunk of logits -> log-probs, entropy, and the gradient of the policy loss by the logits, which may take their
// place: one read and one write of them, where statistics and gradient apart take two reads. A row lies in the shared
// memory of a cluster of blocks while its log-probs, and from them its slopes, become known.
#include "cuda/policy.h"
#include "cuda/row.h"
#include "cuda/tokens.h"
#include "ops.h"

namespace rpp::cuda {
namespace {

constexpr int kMostRanks = 8;

template <class T>
struct PolicyInputs : PolicyNumbers<T> {
  const T *old_logps, *advantages, *weights, *ref_logps;  // old_logps: null for those of the policy itself
  Surrogate surrogate;
  const double* scale;  // of the slopes of each token, or of all
  bool scale_of_each;
};

template <class T>
struct TokenSlopes {
  T logps, entropy;  // d(loss) / d(logp), d(loss) / d(entropy)
};

template <class T>
__device__ __forceinline__ TokenSlopes<T> token_slopes(const PolicyInputs<T>& a, int64_t t, T logp) {
  const auto at = [&](const T* p) { return p ? p[t] : T(1); };
  const T log_ratio = logp - (a.old_logps ? a.old_logps[t] : logp);
  const Ratio<T> ratio = ratio_of(log_ratio, a.clamps.log_ratio);
  const PolicyToken<T> token{logp, a.advantages[t], log_ratio, ratio, T(1)};
  const auto slope_of = [&]<Surrogate surrogate>() {
    const auto x = policy_terms<surrogate>(a, token, ratio, at(a.weights), a.ref_logps != nullptr, at(a.ref_logps));
    return x.slope + (x.through + x.through_kl);
  };
  T slope = 0;
  switch (a.surrogate) {  // those with a ratio for each token
    case Surrogate::reinforce: slope = slope_of.template operator()<Surrogate::reinforce>(); break;
    case Surrogate::cispo: slope = slope_of.template operator()<Surrogate::cispo>(); break;
    case Surrogate::sapo: slope = slope_of.template operator()<Surrogate::sapo>(); break;
    default: slope = slope_of.template operator()<Surrogate::clip>();
  }
  const double scale = a.scale[a.scale_of_each ? t : 0];
  return {static_cast<T>(slope * scale), static_cast<T>(-a.entropy_coef * scale)};
}

template <class S, class D>
struct ChunkPolicyArgs {
  using T = Compute<S>;
  const S* logits;
  int64_t vocab, row_stride;
  D* dlogits;  // may be the logits
  int64_t out_stride;
  const int64_t* target_ids;
  const bool* mask;
  double temperature;
  const T* token_temperature;
  double softcap;
  int ranks;  // of a cluster
  PolicyInputs<T> policy;
  T *logps, *entropy, *lse, *lse_rest;
};

template <class T>
struct ClusterShared {
  RowShared row;
  RowSums own, of_rank[kMostRanks];
  T target;
  RowGradient<T> gradient;
  T dlogps;
  bool wanted;
  alignas(16) unsigned char columns[16];  // and as many more as the launch gives
};

// The log-probs of a row and what they make of its gradient, by one thread; `writes`: of the one block that does.
template <class S, class D, class T = Compute<S>>
__device__ __forceinline__ void finish_row(const ChunkPolicyArgs<S, D>& a, int64_t token, RowSums sums, bool writes,
                                           ClusterShared<T>& shared) {
  const double temperature = a.token_temperature ? a.token_temperature[token] : a.temperature;
  const auto results = results_of<T>(sums, shared.target, temperature);
  const auto [dlogps, dentropy] = token_slopes(a.policy, token, results.logps);
  shared.gradient = row_gradient(static_cast<double>(results.lse) + results.lse_rest,
                                 dentropy == 0 ? T(0) : results.entropy, temperature, dlogps, dentropy, T(0));
  shared.dlogps = dlogps;
  shared.wanted = dlogps != 0 || dentropy != 0;
  if (!writes) return;
  a.logps[token] = results.logps;
  a.entropy[token] = results.entropy;
  a.lse[token] = results.lse;
  a.lse_rest[token] = results.lse_rest;
}

// In every lane below `ranks`: the sums of all blocks of the cluster about one maximum.
template <class T>
__device__ __forceinline__ RowSums merged_in_cluster(ClusterShared<T>& shared, int ranks, double rate) {
  const int lane = threadIdx.x;
  RowSums sums = *in_block(&shared.own, lane < ranks ? lane : 0);
  double top = sums.top;
#pragma unroll
  for (int lanes = kMostRanks / 2; lanes > 0; lanes /= 2) {
    const double other = __shfl_xor_sync(kAllLanes, top, lanes);
    top = other > top ? other : top;
  }
  RowTerms<double, false> terms{sums.top, sums.sum, sums.weighted, 0};
  terms.move(terms.or_0(top), rate);
  if (lane < ranks) shared.of_rank[lane] = {top, terms.sum, terms.weighted, 0};
  __syncwarp();
  sums = {top, 0, 0, 0};
  for (int r = 0; r < ranks; ++r) {
    sums.sum += shared.of_rank[r].sum;
    sums.weighted += shared.of_rank[r].weighted;
  }
  return sums;
}

template <class S, class D, bool with_softcap>
__global__ void __launch_bounds__(kRowThreads, 2) chunk_policy_kernel(ChunkPolicyArgs<S, D> a) {
  using T = Compute<S>;
  constexpr int N = kVector<D> > kVector<S> ? kVector<D> : kVector<S>;
  constexpr int kGroups = 3, U = 4;  // on their way at a time, of U vectors of each thread
  auto& shared = shared_memory<ClusterShared<T>>();
  S* kept = reinterpret_cast<S*>(shared.columns);
  const int rank = cluster_rank();
  const int64_t token = blockIdx.x / a.ranks;
  const Range columns = slice_of(a.vocab, rank, a.ranks, N);
  const int64_t size = columns.end - columns.begin;
  const S* row = a.logits + token * a.row_stride + columns.begin;
  D* out = a.dlogits + token * a.out_stride + columns.begin;
  const auto cap = softcap_of<T>(with_softcap ? a.softcap : 1);
  const bool valid = !a.mask || a.mask[token];
  if (valid) {
    constexpr int V = kVector<S>;
    const double temperature = a.token_temperature ? a.token_temperature[token] : a.temperature;
    const double rate = kLog2E / temperature;
    RowTerms<T, false> terms;
    const auto add = [&](T(&x)[V], int n) {
      if constexpr (with_softcap)
#pragma unroll
        for (int i = 0; i < V; ++i) x[i] = i < n ? softcapped(x[i], cap).value : x[i];
      terms.add(x, static_cast<T>(rate));
    };
    // Whole vectors arrive while others are summed; each thread sums what it has copied.
    const int64_t step = int64_t{kRowThreads} * U * V, whole = begins_16_bytes(row) ? size / V * V : 0;
    const auto copy = [&](int64_t begin) {
#pragma unroll
      for (int k = 0; k < U; ++k) {
        const int64_t column = column_of(begin, threadIdx.x, kRowThreads, k, V);
        if (column < whole) copy_16_bytes(kept + column, row + column);
      }
      end_of_group();
    };
#pragma unroll
    for (int g = 0; g < kGroups; ++g) copy(g * step);
    for (int64_t begin = 0; begin < whole; begin += step) {
      wait_for_groups<kGroups - 1>();
#pragma unroll
      for (int k = 0; k < U; ++k) {
        const int64_t column = column_of(begin, threadIdx.x, kRowThreads, k, V);
        if (column >= whole) continue;
        T x[V];
        load_shared<S, V>(kept + column, x);
        add(x, V);
      }
      copy(begin + kGroups * step);
    }
    wait_for_groups<0>();
    // The others, a thread the same ones whether or not the row begins 16 bytes.
    const int64_t round = kRowThreads * V;
    for (int64_t column = whole / round * round + threadIdx.x * V; column < size; column += round) {
      if (column < whole) continue;
      const int n = static_cast<int>(least(V, size - column));
      T x[V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (i < n) kept[column + i] = row[column + i];
        x[i] = i < n ? widened(row[column + i]) : -std::numeric_limits<T>::infinity();
      }
      add(x, n);
    }
    const RowSums sums = merged_in_block(terms, static_cast<T>(rate), shared.row);
    if (threadIdx.x == 0) {
      shared.own = sums;
      // Now, while no block has written.
      shared.target = target_logit<S, with_softcap>(row - columns.begin, a.target_ids[token], a.vocab, cap);
    }
    sync_cluster();
    if (threadIdx.x < kWarp) {
      const RowSums of_row = merged_in_cluster(shared, a.ranks, rate);
      if (threadIdx.x == 0) finish_row(a, token, of_row, rank == 0, shared);
    }
  } else if (threadIdx.x == 0) {
    shared.wanted = false;
    if (rank == 0) a.logps[token] = a.entropy[token] = a.lse[token] = a.lse_rest[token] = 0;
  }
  sync_cluster();  // the others have read our sums, and our threads see the gradient
  const auto gradient = shared.gradient;
  const T dlogps = shared.dlogps;
  const bool wanted = shared.wanted, aligned = begins_16_bytes(out);
  const int64_t target = a.target_ids[token] - columns.begin;
  for (int64_t column = threadIdx.x * N; column < size; column += kRowThreads * N) {
    const int n = static_cast<int>(least(N, size - column));
    T x[N] = {};
    if (wanted) {
      if (n == N) load_shared<S, N>(kept + column, x);
      else
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = i < n ? widened(kept[column + i]) : T(0);
      dlogits_of<with_softcap>(x, gradient, dlogps, target - column, cap);
    }
    if (aligned && n == N) {
      store_whole(out + column, x);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (i < n) out[column + i] = narrowed<D>(x[i]);
    }
  }
}

// ---- where a row does not fit: statistics, slopes and gradient by the kernels of logps.cu

template <class T>
struct SlopesArgs {
  PolicyInputs<T> policy;
  int64_t tokens;
  const bool* mask;
  T *logps, *entropy, *lse, *lse_rest;  // become 0 where masked
  T *dlogps, *dentropy;
};

template <class T>
__global__ void __launch_bounds__(kTokenThreads) slopes_kernel(SlopesArgs<T> a) {
  for_tokens(a.tokens, [&](int64_t t) {
    if (a.mask && !a.mask[t]) {
      a.logps[t] = a.entropy[t] = a.lse[t] = a.lse_rest[t] = a.dlogps[t] = a.dentropy[t] = 0;
      return;
    }
    const auto slopes = token_slopes(a.policy, t, a.logps[t]);
    a.dlogps[t] = slopes.logps;
    a.dentropy[t] = slopes.entropy;
  });
}

// ---- the host's side

using Statistics = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class S, class D>
Statistics chunk_policy(const Tensor& dlogits, const Tensor& logits, ChunkPolicyArgs<S, D> a) {
  using T = Compute<S>;
  const int64_t tokens = logits.size(0);
  Tensor logps, entropy, lse, lse_rest;
  a.logps = new_like<T>(logits, {tokens}, logps);
  a.entropy = new_like<T>(logits, {tokens}, entropy);
  a.lse = new_like<T>(logits, {tokens}, lse);
  a.lse_rest = new_like<T>(logits, {tokens}, lse_rest);
  constexpr int N = kVector<D> > kVector<S> ? kVector<D> : kVector<S>;
  auto* kernel = chunk_policy_kernel<S, D, false>;
  if constexpr (std::is_same_v<S, T>)
    if (a.softcap != 0) kernel = chunk_policy_kernel<S, D, true>;
  const size_t bytes = slice_size(a.vocab, a.ranks, N) * sizeof(S);
  launch(logits, {tokens * a.ranks, kRowThreads, sizeof(ClusterShared<T>) + bytes, a.ranks}, kernel, a);
  return {logps, entropy, lse, lse_rest};
}

template <class S, class D>
Statistics in_two_reads(const Tensor& dlogits, const Tensor& logits, const Tensor& target_ids, const MaybeTensor& mask,
                        const MaybeTensor& token_temperature, const ChunkPolicyArgs<S, D>& a) {
  using T = Compute<S>;
  const int64_t tokens = logits.size(0);
  const auto [logps, entropy, lse, lse_rest] = [&]() -> Statistics {
    if constexpr (std::is_same_v<S, T>) {
      return chunk_logps_fwd(logits, target_ids, a.temperature, token_temperature, a.softcap);
    } else {
      const auto all = logps_fwd(logits, target_ids, mask, a.temperature, token_temperature, false);
      return {std::get<0>(all), std::get<1>(all), std::get<2>(all), std::get<3>(all)};
    }
  }();
  const auto data = [](const Tensor& x) { return static_cast<T*>(x.data_ptr()); };
  Tensor dlogps, dentropy;
  const SlopesArgs<T> slopes{a.policy,
                             tokens,
                             a.mask,
                             data(logps),
                             data(entropy),
                             data(lse),
                             data(lse_rest),
                             new_like<T>(logits, {tokens}, dlogps),
                             new_like<T>(logits, {tokens}, dentropy)};
  launch(logits, grid_of(tokens), slopes_kernel<T>, slopes);
  chunk_logps_bwd_out(dlogits, logits, std::nullopt, target_ids, a.temperature, token_temperature, a.softcap, entropy,
                      lse, lse_rest, dlogps, dentropy, std::nullopt);
  return {logps, entropy, lse, lse_rest};
}

}  // namespace

Statistics chunk_policy_out(Tensor dlogits, Tensor logits, Tensor target_ids, MaybeTensor mask, double temperature,
                            MaybeTensor token_temperature, double softcap, MaybeTensor old_logps, Tensor advantages,
                            MaybeTensor weights, MaybeTensor ref_logps, Tensor scale, double option_0, double option_1,
                            double option_2, double option_3, double log_ratio_clamp, double beta, double kl_clamp,
                            double entropy_coef, int64_t surrogate, int64_t kl_estimator, int64_t kl_gradient,
                            bool kl_bias_correction) {
  return for_storage_types(logits, dlogits.scalar_type(), [&]<class S, class D>(S*, D*) {
    using T = Compute<S>;
    STD_TORCH_CHECK(logits.dim() == 2 && dlogits.dim() == 2 && dlogits.numel() == logits.numel() &&
                        logits.stride(1) == 1 && dlogits.stride(1) == 1,
                    "logits, dlogits: want (tokens, vocabulary) of rows without gaps");
    STD_TORCH_CHECK((std::is_same_v<S, T>) || softcap == 0, "softcap: want logits of float32 or float64 with it");
    const int64_t tokens = logits.size(0), vocab = logits.size(1), scales = scale.numel();
    STD_TORCH_CHECK(scales == 1 || scales == tokens, "scale: want one number, or one for each token");
    ChunkPolicyArgs<S, D> a{};
    a.logits = static_cast<const S*>(logits.data_ptr());
    a.vocab = vocab;
    a.row_stride = logits.stride(0);
    a.dlogits = static_cast<D*>(dlogits.data_ptr());
    a.out_stride = dlogits.stride(0);
    a.target_ids = data_of<int64_t>(target_ids, tokens, "target_ids");
    a.mask = data_of<bool>(mask, tokens, "completion_mask");
    a.temperature = temperature;
    a.token_temperature = data_of<T>(token_temperature, tokens, "temperature");
    a.softcap = softcap;
    a.policy = {policy_numbers<T>(option_0, option_1, option_2, option_3, log_ratio_clamp, beta, kl_clamp, entropy_coef,
                                  kl_estimator, kl_gradient, kl_bias_correction),
                data_of<T>(old_logps, tokens, "old_logps"),
                data_of<T>(advantages, tokens, "advantages"),
                data_of<T>(weights, tokens, "weights"),
                data_of<T>(ref_logps, tokens, "ref_logps"),
                static_cast<Surrogate>(surrogate),
                data_of<double>(scale, scales, "scale"),
                scales == tokens && scales > 1};
    constexpr int N = kVector<D> > kVector<S> ? kVector<D> : kVector<S>;
    const int64_t most_bytes = most_shared_bytes(logits) - sizeof(ClusterShared<T>);
    a.ranks = cluster_of(vocab, N, sizeof(S), largest_cluster(logits), most_bytes);
    if (a.ranks == 0) return in_two_reads(dlogits, logits, target_ids, mask, token_temperature, a);
    return chunk_policy(dlogits, logits, a);
  });
}

}  // namespace rpp::cuda
