// rollout_weights: of a ratio of each token in pieces of all tokens; else a block takes a sequence, which it reads
// twice.
#include "choices.h"
#include "cuda/sequences.h"
#include "ops.h"

namespace rpp::cuda {
namespace {

constexpr int kSums = 5;  // RolloutStats, in its order

template <class T>
struct RolloutArgs {
  Sequences sequences;
  const T *old_logps, *sampling_logps;
  const bool* mask;  // may be null
  RolloutLevel level;
  RolloutBounds<T> bounds;
  T* weights;
  Partials partials;
  double* stats;
};

struct RolloutShared {
  SumsInBlock<2> log_ratio;
  TotalsInBlock<kSums, kTokenThreads> totals;
};

template <class T>
struct RolloutToken {
  bool valid;
  T old_logp, sampling_logp;
};

template <class T>
__global__ void __launch_bounds__(kTokenThreads) rollout_kernel(RolloutArgs<T> a) {
  auto& shared = shared_memory<RolloutShared>();
  const Range tokens = a.sequences.tokens_of_block();
  const bool of_token = a.level == RolloutLevel::token;
  const auto load = [&](int64_t t) -> RolloutToken<T> {
    return {!a.mask || a.mask[t], a.old_logps[t], a.sampling_logps[t]};
  };
  double log_ratios = 0;  // they are of both signs
  int valid = 0, low = 0, high = 0;
  RolloutWeight<T> of_sequence{};
  if (!of_token) {
    for_tokens_of(tokens, load, [&](int64_t, RolloutToken<T> x) {
      if (x.valid) log_ratios += x.old_logp - x.sampling_logp, valid += 1;
    });
    double sums[2] = {log_ratios, static_cast<double>(valid)};
    block_sum(sums, shared.log_ratio);
    const double divisor = a.level == RolloutLevel::geometric && sums[1] > 1 ? sums[1] : 1;
    of_sequence = rollout_weight(static_cast<T>(sums[0] / divisor), a.bounds);
    log_ratios = 0, valid = 0;
  }
  T sum = 0;
  for_tokens_of(tokens, load, [&](int64_t t, RolloutToken<T> x) {
    const T d = x.old_logp - x.sampling_logp;
    const auto w = of_token ? rollout_weight(d, a.bounds) : of_sequence;
    a.weights[t] = x.valid ? w.weight : T(0);
    if (!x.valid) return;
    log_ratios += d, sum += w.weight;
    valid += 1, low += w.low, high += w.high;
  });
  double sums[kSums] = {static_cast<double>(valid), static_cast<double>(low), static_cast<double>(high), sum,
                        -log_ratios};
  block_totals(sums, shared.totals);
  if (!gathered(sums, a.partials, shared.totals)) return;
  block_totals(sums, shared.totals);
  if (threadIdx.x < kSums) a.stats[threadIdx.x] = shared.totals.total[threadIdx.x];
}

}  // namespace

std::tuple<Tensor, Tensor> rollout_weights_fwd(Tensor old_logps, Tensor sampling_logps, MaybeTensor mask,
                                               Tensor cu_seqlens, int64_t level, bool truncate, double low, double high,
                                               double log_ratio_clamp) {
  return for_float_type(old_logps, [&]<class T>(T*) {
    const int64_t tokens = old_logps.numel();
    const auto number = [](double x) { return static_cast<T>(x); };
    Tensor weights, stats, counter, partials;
    RolloutArgs<T> a{};
    a.level = static_cast<RolloutLevel>(level);
    a.sequences = sequences_of(cu_seqlens, tokens, a.level == RolloutLevel::token);
    a.old_logps = data_of<T>(old_logps, tokens, "old_logps");
    a.sampling_logps = data_of<T>(sampling_logps, tokens, "sampling_logps");
    a.mask = data_of<bool>(mask, tokens, "completion_mask");
    a.bounds = {number(log_ratio_clamp), number(low), number(high), number(truncate ? low : 0),
                number(truncate ? high : 0)};
    a.weights = new_like<T>(old_logps, {tokens}, weights);
    a.stats = new_like<double>(old_logps, {kSums}, stats);
    const int64_t blocks = a.sequences.blocks();
    a.partials = new_partials(old_logps, kSums, blocks, new_counters(old_logps, 1, counter), partials);
    launch(old_logps, {blocks, kTokenThreads, sizeof(RolloutShared)}, rollout_kernel<T>, a);
    return std::tuple{weights, stats};
  });
}

}  // namespace rpp::cuda
