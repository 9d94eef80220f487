// dpo_loss, a block for each pair; copg_loss, one for each sequence, of which the last compares all; and the gradient
// of both. Numbers of whole completions are double.
#include "cuda/sequences.h"
#include "ops.h"

namespace rpp::cuda {
namespace {

// What a loss of compared completions walks: groups of consecutive sequences.
template <class T>
struct PreferenceArgs {
  const T *logps, *ref_logps;  // ref_logps may be null
  const bool* mask;            // may be null
  const int64_t* cu_seqlens;
  int64_t batch;
  T* loss;   // of each group; null where only the sum is wanted
  T* slope;  // of each sequence: d(loss of its group) / d(logps), the same for all its valid tokens
  Results<T> results;
};

// Adds a sequence's log-ratios to `sum`, those of this thread; the tokens that count to `valid`.
template <class T>
__device__ __forceinline__ void add_log_ratios(const PreferenceArgs<T>& a, int64_t sequence, double& sum,
                                               double& valid) {
  struct Token {
    bool valid;
    T logp, ref_logp;
  };
  const auto load = [&](int64_t t) -> Token {
    return {!a.mask || a.mask[t], a.logps[t], a.ref_logps ? a.ref_logps[t] : T(0)};
  };
  int count = 0;
  for_tokens_of({a.cu_seqlens[sequence], a.cu_seqlens[sequence + 1]}, load, [&](int64_t, const Token& x) {
    if (!x.valid) return;
    count += 1;
    sum += static_cast<double>(x.logp) - x.ref_logp;  // terms of both signs cancel
  });
  valid += count;
}

// ---- pairs

constexpr int kDpoSums = 6;  // the loss, then PreferenceStats in its order

template <class T>
struct DpoArgs : PreferenceArgs<T> {
  Pair loss_type;
  double beta, label_smoothing, margin;
  bool length_normalized;
  Partials partials;
};

struct DpoShared {
  SumsInBlock<4> pair;
  TotalsInBlock<kDpoSums, kTokenThreads> totals;
};

template <class T>
__global__ void __launch_bounds__(kTokenThreads, 2) dpo_kernel(DpoArgs<T> a) {
  auto& shared = shared_memory<DpoShared>();
  const int64_t pair = blockIdx.x;
  const bool inside = 2 * pair < a.batch;  // but in the one block of an empty batch
  double sums[4] = {};
  if (inside) {
    add_log_ratios(a, 2 * pair, sums[0], sums[1]);
    add_log_ratios(a, 2 * pair + 1, sums[2], sums[3]);
  }
  block_sum(sums, shared.pair);
  if (threadIdx.x == 0) {
    const auto share = [&](double valid) { return a.length_normalized && valid > 1 ? 1 / valid : 1; };
    const double w_share = share(sums[1]), l_share = share(sums[3]);
    const double chosen = sums[0] * w_share, rejected = sums[2] * l_share;
    const bool counted = sums[1] + sums[3] > 0;
    const PairLoss each = pair_loss(a.loss_type, chosen, rejected, a.beta, a.label_smoothing, a.margin);
    const double loss = counted ? each.value : 0;
    if (inside) {
      if (a.loss) a.loss[pair] = static_cast<T>(loss);
      a.slope[2 * pair] = static_cast<T>(each.dchosen * w_share);
      a.slope[2 * pair + 1] = static_cast<T>(each.drejected * l_share);
    }
    double* total = shared.totals.total;
    total[0] = loss, total[1] = counted;
    total[2] = a.beta * chosen, total[3] = a.beta * rejected;
    total[4] = a.beta * (chosen - rejected), total[5] = chosen > rejected;
  }
  __syncthreads();
  double all[kDpoSums];
  if (!gathered(all, a.partials, shared.totals)) return;
  block_totals(all, shared.totals);
  store_results(a.results, shared.totals);
}

// ---- groups

constexpr int kCopgSums = 4;  // the loss, then CopgStats in its order

struct LogRatio {
  double sum, valid;  // of how many tokens
};

template <class T>
struct CopgArgs : PreferenceArgs<T> {
  const T* scores;
  int64_t group_size;
  double beta;
  LogRatio* of_sequence;
  unsigned* arrived;
};

struct CopgShared {
  SumsInBlock<2> sequence;
  TotalsInBlock<kCopgSums, kTokenThreads> totals;
};

// Compares the completions of a group, and adds to the sums of this thread.
template <class T>
__device__ void add_group(const CopgArgs<T>& a, int64_t group, double (&sums)[kCopgSums]) {
  const int64_t first = group * a.group_size, last = first + a.group_size;
  const double others = static_cast<double>(a.group_size) - 1;
  double sum_h = 0, sum_r = 0, loss = 0;
  for (int64_t i = first; i < last; ++i) sum_h += __ldcg(&a.of_sequence[i].sum), sum_r += a.scores[i];
  for (int64_t i = first; i < last; ++i) {
    const double h = __ldcg(&a.of_sequence[i].sum), r = a.scores[i];
    const double h_gap = h - (sum_h - h) / others, r_gap = r - (sum_r - r) / others;
    a.slope[i] = static_cast<T>(a.beta * h_gap - r_gap);
    if (__ldcg(&a.of_sequence[i].valid) > 0) {
      loss += h * (0.5 * a.beta * h_gap - r_gap);
      sums[1] += 1, sums[2] += r;
    }
  }
  if (a.loss) a.loss[group] = static_cast<T>(loss);
  sums[0] += loss, sums[3] += sum_h;
}

template <class T>
__global__ void __launch_bounds__(kTokenThreads) copg_kernel(CopgArgs<T> a) {
  auto& shared = shared_memory<CopgShared>();
  const int64_t sequence = blockIdx.x;
  double sums[2] = {};
  if (sequence < a.batch) add_log_ratios(a, sequence, sums[0], sums[1]);
  block_sum(sums, shared.sequence);
  if (threadIdx.x == 0) a.of_sequence[sequence] = {sums[0], sums[1]};
  if (!block_arrives_last(a.arrived, gridDim.x, shared.totals.last)) return;
  double all[kCopgSums] = {};
  for (int64_t group = threadIdx.x; group < a.batch / a.group_size; group += kTokenThreads) add_group(a, group, all);
  block_totals(all, shared.totals);
  store_results(a.results, shared.totals);
}

// ---- the gradient of both

template <class T>
struct SpreadArgs {
  Sequences sequences;
  const T* each;     // of each sequence
  const bool* mask;  // may be null
  T* out;            // the same for each of its valid tokens
};

template <class T>
__global__ void __launch_bounds__(kTokenThreads) spread_kernel(SpreadArgs<T> a) {
  const Part part = a.sequences.part();
  const auto load = [&](int64_t t) {
    const bool valid = !a.mask || a.mask[t];
    return valid ? a.each[a.sequences.sequence_of(t, part)] : T(0);
  };
  for_tokens_of(part.tokens, load, [&](int64_t t, T value) { a.out[t] = value; });
}

// ---- the host's side

// Sets what all losses share, with room for results.
template <class T>
std::tuple<Tensor, Tensor, Tensor> set_groups(PreferenceArgs<T>& a, const Tensor& logps, const MaybeTensor& ref_logps,
                                              const MaybeTensor& mask, const Tensor& cu_seqlens, int64_t group_size,
                                              bool per_group, int64_t num_stats) {
  const int64_t tokens = logps.numel(), batch = cu_seqlens.numel() - 1;
  STD_TORCH_CHECK(group_size > 1 && batch % group_size == 0, batch, " sequences are no whole groups of ", group_size);
  Tensor loss, slope, stats;
  a.logps = data_of<T>(logps, tokens, "logps");
  a.ref_logps = data_of<T>(ref_logps, tokens, "ref_logps");
  a.mask = data_of<bool>(mask, tokens, "completion_mask");
  a.cu_seqlens = data_of<int64_t>(cu_seqlens, batch + 1, "cu_seqlens");
  a.batch = batch;
  a.loss = per_group ? new_like<T>(logps, {batch / group_size}, loss) : nullptr;
  a.slope = new_like<T>(logps, {batch}, slope);
  a.results = {per_group ? nullptr : new_like<T>(logps, {}, loss), new_like<double>(logps, {num_stats}, stats)};
  return {loss, slope, stats};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> dpo_loss_fwd(Tensor logps, MaybeTensor ref_logps, MaybeTensor mask,
                                                Tensor cu_seqlens, int64_t loss_type, double beta,
                                                double label_smoothing, double margin, bool length_normalized,
                                                bool per_pair) {
  return for_float_type(logps, [&]<class T>(T*) {
    Tensor counter, partials;
    DpoArgs<T> a{};
    const auto results = set_groups<T>(a, logps, ref_logps, mask, cu_seqlens, 2, per_pair, kDpoSums - 1);
    a.loss_type = static_cast<Pair>(loss_type);
    a.beta = beta;
    a.label_smoothing = label_smoothing;
    a.margin = margin;
    a.length_normalized = length_normalized;
    const int64_t blocks = most(1, a.batch / 2);
    a.partials = new_partials(logps, kDpoSums, blocks, new_counters(logps, 1, counter), partials);
    launch(logps, {blocks, kTokenThreads, sizeof(DpoShared)}, dpo_kernel<T>, a);
    return results;
  });
}

std::tuple<Tensor, Tensor, Tensor> copg_loss_fwd(Tensor logps, Tensor ref_logps, Tensor scores, MaybeTensor mask,
                                                 Tensor cu_seqlens, int64_t group_size, double beta, bool per_group) {
  return for_float_type(logps, [&]<class T>(T*) {
    Tensor counter, of_sequence;
    CopgArgs<T> a{};
    const auto results = set_groups<T>(a, logps, ref_logps, mask, cu_seqlens, group_size, per_group, kCopgSums - 1);
    a.scores = data_of<T>(scores, a.batch, "scores");
    a.group_size = group_size;
    a.beta = beta;
    const int64_t blocks = most(1, a.batch);
    a.of_sequence = reinterpret_cast<LogRatio*>(new_like<double>(logps, {blocks, 2}, of_sequence));
    a.arrived = new_counters(logps, 1, counter);
    launch(logps, {blocks, kTokenThreads, sizeof(CopgShared)}, copg_kernel<T>, a);
    return results;
  });
}

Tensor preference_loss_bwd(Tensor each, MaybeTensor mask, Tensor cu_seqlens, int64_t num_tokens) {
  return for_float_type(each, [&]<class T>(T*) {
    Tensor dlogps;
    const SpreadArgs<T> a{sequences_of(cu_seqlens, num_tokens, true), data_of<T>(each, cu_seqlens.numel() - 1, "each"),
                          data_of<bool>(mask, num_tokens, "completion_mask"), new_like<T>(each, {num_tokens}, dlogps)};
    launch(each, {a.sequences.blocks(), kTokenThreads}, spread_kernel<T>, a);
    return dlogps;
  });
}

}  // namespace rpp::cuda
