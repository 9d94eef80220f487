// policy_loss and value_loss: loss, gradient and statistics in one launch. Where no token's loss hangs on the rest of
// its sequence, blocks take pieces of all tokens; else a block takes a sequence, and walks it up to three times.
#include "choices.h"
#include "cuda/policy.h"
#include "cuda/sequences.h"
#include "ops.h"

namespace rpp::cuda {
namespace {

template <class T>
struct LossArgs {
  Sequences sequences;
  const bool* mask;    // may be null
  bool sequence_mean;  // a token's loss is weighted by 1 / n for a mean over its sequence
  T* loss;             // each token's; null where only the sum is wanted
  T* slope;            // d(loss) / d(logps or values), with the token's weight
  unsigned* seen;      // of each sequence, where blocks take pieces: whether it has a valid token
  Partials partials;
  Results<T> results;
};

template <int K>
using LossTotals = TotalsInBlock<K, kTokenThreads>;

constexpr int kTokensAt = 1, kSequencesAt = 2;  // among the sums of a loss

// Where blocks take pieces, whoever meets a valid token leaves word of its sequence: the last block counts those.
template <class T>
__device__ __forceinline__ void meet(const LossArgs<T>& a, const Part& part, int64_t token) {
  if (!part.of_one_sequence()) a.seen[a.sequences.sequence_of(token, part)] = 1;
}

template <int K, class T>
__device__ __forceinline__ void add_up(double (&sums)[K], const LossArgs<T>& a, const Part& part,
                                       LossTotals<K>& shared) {
  const bool in_pieces = a.sequences.piece != 0;
  block_totals(sums, shared);
  if (threadIdx.x == 0 && shared.total[kTokensAt] > 0) {
    if (!in_pieces) shared.total[kSequencesAt] = 1;
    else if (part.of_one_sequence()) a.seen[part.first] = 1;
  }
  __syncthreads();
  if (!gathered(sums, a.partials, shared)) return;
  if (in_pieces)
    for (int64_t i = threadIdx.x; i < a.sequences.batch; i += kTokenThreads) sums[kSequencesAt] += __ldcg(a.seen + i);
  block_totals(sums, shared);
  store_results(a.results, shared);
}

// ---- policy

template <class T>
struct PolicyArgs : LossArgs<T>, PolicyNumbers<T> {
  const T *logps, *old_logps, *advantages;
  bool sequence_advantages;                        // one advantage for each sequence
  const T *weights, *ref_logps, *entropy, *dloss;  // each may be null; dloss multiplies each token's whole loss
  T* entropy_slope;                                // d(loss) / d(entropy), where there is entropy
  Level level;

  __device__ T advantage_of(int64_t token, const Part& part) const {
    return advantages[sequence_advantages ? this->sequences.sequence_of(token, part) : token];
  }
};

// That run on a multiprocessor at a time.
template <class T>
constexpr int kBlocksAtOnce = sizeof(T) == 4 ? 4 : 2;

struct PolicyShared {
  SumsInBlock<3> log_ratios;
  SumsInBlock<2> moved;
  LossTotals<9> totals;
};

// Over a sequence: of its log-ratios, of what the surrogate makes of them, and how many valid tokens it has.
struct LogRatioSums {
  double plain, terms, valid;
};

template <Surrogate surrogate, class T>
__device__ __forceinline__ LogRatioSums sum_log_ratios(const PolicyArgs<T>& a, const Part& part,
                                                       SumsInBlock<3>& shared) {
  const bool of_token = a.level == Level::token;
  struct Token {
    bool valid;
    T logp, old_logp, advantage;
  };
  const auto load = [&](int64_t t) -> Token {
    const bool valid = !a.mask || a.mask[t];
    if (of_token) return {valid, T(0), T(0), T(0)};
    return {valid, a.logps[t], a.old_logps[t], surrogate == Surrogate::gmpo ? a.advantage_of(t, part) : T(0)};
  };
  double sums[3] = {};  // log-ratios of both signs cancel
  int valid = 0;
  for_tokens_of(part.tokens, load, [&](int64_t, Token x) {
    if (!x.valid) return;
    const T d = x.logp - x.old_logp;
    ++valid;
    sums[0] += d;
    if constexpr (surrogate == Surrogate::gmpo) sums[1] += log_ratio_term<surrogate>(d, x.advantage, a.options).value;
  });
  sums[2] = valid;
  block_sum(sums, shared);
  return {sums[0], surrogate == Surrogate::gmpo ? sums[1] : sums[0], sums[2]};
}

// The slope of a token has a part of its own, and at Level::sequence a share of what moves the ratio of all tokens.
template <Surrogate surrogate, class T>
__global__ void __launch_bounds__(kTokenThreads, kBlocksAtOnce<T>) policy_kernel(PolicyArgs<T> a) {
  auto& shared = shared_memory<PolicyShared>();
  const Part part = a.sequences.part();
  const bool of_token = a.level == Level::token, moves_all = !of_token && a.level != Level::sequence_token;
  T sequence_weight = 1;
  double divisor = 1;  // of sums of log-ratios
  Ratio<T> plain{}, of_terms{};
  if (!of_token || a.sequence_mean) {
    const auto sums = sum_log_ratios<surrogate>(a, part, shared.log_ratios);
    const double length = sums.valid > 1 ? sums.valid : 1;
    if (a.sequence_mean) sequence_weight = T(1) / static_cast<T>(length);
    divisor = a.level == Level::sequence_sum ? 1 : length;
    plain = ratio_of(static_cast<T>(sums.plain / divisor), a.clamps.log_ratio);
    of_terms = ratio_of(static_cast<T>(sums.terms / divisor), a.clamps.log_ratio);
  }

  struct Token {
    bool valid;
    T logp, old_logp, advantage, weight, ref_logp, entropy;
  };
  const auto load = [&](int64_t t) -> Token {
    const auto at = [&](const T* p) { return p ? p[t] : T(1); };
    return {!a.mask || a.mask[t], a.logps[t],      a.old_logps[t], a.advantage_of(t, part),
            at(a.weights),        at(a.ref_logps), at(a.entropy)};
  };
  double losses = 0, log_ratios = 0;  // of both signs: they cancel
  T ratios = 0, kls = 0, moved = 0, kl_moved = 0;
  int valid = 0, low = 0, high = 0, dual = 0;
  for_tokens_of(part.tokens, load, [&](int64_t t, const Token& x) {
    if (!x.valid) {
      a.slope[t] = 0;
      if (a.loss) a.loss[t] = 0;
      if (a.entropy) a.entropy_slope[t] = 0;
      return;
    }
    const T d = x.logp - x.old_logp;
    const auto ratio = of_token ? ratio_of(d, a.clamps.log_ratio) : plain, of_surrogate = of_token ? ratio : of_terms;
    const PolicyToken<T> token{x.logp, x.advantage, d, of_surrogate, T(1)};
    auto terms = policy_terms<surrogate>(a, token, ratio, x.weight, a.ref_logps != nullptr, x.ref_logp);
    kls += terms.kl;
    if (a.entropy) {
      terms.loss -= x.entropy * a.entropy_coef;
      a.entropy_slope[t] = -a.entropy_coef * sequence_weight;
    }
    const T weight = a.dloss ? sequence_weight * a.dloss[t] : sequence_weight;
    if (moves_all) moved += terms.through * weight, kl_moved += terms.through_kl * weight;
    else terms.slope += terms.through + terms.through_kl;
    a.slope[t] = terms.slope * weight;
    if (a.loss) a.loss[t] = terms.loss;
    meet(a, part, t);
    losses += terms.loss, log_ratios += d, ratios += ratio.value;
    valid += 1, low += terms.low, high += terms.high, dual += terms.dual;
  });

  if (moves_all) {  // the ratio is one for all tokens, and each moves it by 1 / divisor
    double sums[2] = {moved, kl_moved};
    block_sum(sums, shared.moved);
    const T share = static_cast<T>(sums[0] / divisor), kl_share = static_cast<T>(sums[1] / divisor);
    struct Moved {
      bool valid;
      T log_ratio, advantage, slope;
    };
    const auto load_moved = [&](int64_t t) -> Moved {
      const bool counts = !a.mask || a.mask[t];
      if constexpr (surrogate == Surrogate::gmpo)
        return {counts, a.logps[t] - a.old_logps[t], a.advantage_of(t, part), a.slope[t]};
      else return {counts, T(0), T(0), a.slope[t]};
    };
    for_tokens_of(part.tokens, load_moved, [&](int64_t t, const Moved& x) {
      const T moves = log_ratio_term<surrogate>(x.log_ratio, x.advantage, a.options).slope;
      if (x.valid) a.slope[t] = x.slope + share * moves + kl_share;
    });
  }
  // Of a thread without a valid token the ratio of its sequence counts 0 times, even where it is infinite.
  const double ratio_sum = of_token ? ratios : valid ? static_cast<double>(plain.value) * valid : 0;
  double sums[9] = {losses * sequence_weight,
                    static_cast<double>(valid),
                    0,
                    static_cast<double>(low),
                    static_cast<double>(high),
                    static_cast<double>(dual),
                    ratio_sum,
                    -log_ratios,
                    kls};
  add_up(sums, a, part, shared.totals);
}

// ---- critic

template <class T>
struct ValueArgs : LossArgs<T> {
  const T *values, *old_values, *returns;
  T epsilon;
};

struct ValueShared {
  SumsInBlock<1> valid;
  LossTotals<5> totals;
};

template <class T>
__global__ void __launch_bounds__(kTokenThreads, 4) value_kernel(ValueArgs<T> a) {
  auto& shared = shared_memory<ValueShared>();
  const Part part = a.sequences.part();
  T weight = 1;
  if (a.sequence_mean) {
    double valid[1] = {};
    const auto load = [&](int64_t t) { return !a.mask || a.mask[t]; };
    for_tokens_of(part.tokens, load, [&](int64_t, bool counts) { valid[0] += counts; });
    block_sum(valid, shared.valid);
    weight = T(1) / static_cast<T>(valid[0] > 1 ? valid[0] : 1);
  }
  struct Token {
    bool valid;
    T value, old_value, target;
  };
  const auto load = [&](int64_t t) -> Token {
    return {!a.mask || a.mask[t], a.values[t], a.old_values[t], a.returns[t]};
  };
  double losses = 0;
  T errors = 0;
  int valid = 0, clipped = 0;
  for_tokens_of(part.tokens, load, [&](int64_t t, const Token& x) {
    const auto c = clipped_critic_loss(x.value, x.old_value, x.target, a.epsilon);
    a.slope[t] = x.valid ? c.slope * weight : T(0);
    if (a.loss) a.loss[t] = x.valid ? c.loss : T(0);
    if (!x.valid) return;
    meet(a, part, t);
    losses += c.loss, errors += c.squared_error;
    valid += 1, clipped += c.clipped;
  });
  double sums[5] = {losses * weight, static_cast<double>(valid), 0, static_cast<double>(clipped), errors};
  add_up(sums, a, part, shared.totals);
}

// ---- the host's side

// Runs a kernel of a loss of which all but the common arguments are set.
template <int sums, class T, class Args>
std::tuple<Tensor, Tensor, Tensor> fused_loss(Args& a, const Tensor& like, const MaybeTensor& mask,
                                              const Tensor& cu_seqlens, bool in_pieces, bool sequence_mean,
                                              bool per_token, size_t shared_bytes, void (*kernel)(Args)) {
  const int64_t tokens = like.numel();
  Tensor loss, slope, stats, counters, partials;
  a.sequences = sequences_of(cu_seqlens, tokens, in_pieces && !sequence_mean);
  a.mask = data_of<bool>(mask, tokens, "completion_mask");
  a.sequence_mean = sequence_mean;
  a.loss = per_token ? new_like<T>(like, {tokens}, loss) : nullptr;
  a.slope = new_like<T>(like, {tokens}, slope);
  a.results = {per_token ? nullptr : new_like<T>(like, {}, loss), new_like<double>(like, {sums - 1}, stats)};
  unsigned* arrived = new_counters(like, 1 + (a.sequences.piece ? a.sequences.batch : 0), counters);
  a.seen = arrived + 1;
  a.partials = new_partials(like, sums, a.sequences.blocks(), arrived, partials);
  launch(like, {a.sequences.blocks(), kTokenThreads, shared_bytes}, kernel, a);
  return {loss, slope, stats};
}

template <class T>
auto policy_kernel_of(int64_t surrogate) {
  switch (static_cast<Surrogate>(surrogate)) {
    case Surrogate::clip: return policy_kernel<Surrogate::clip, T>;
    case Surrogate::reinforce: return policy_kernel<Surrogate::reinforce, T>;
    case Surrogate::cispo: return policy_kernel<Surrogate::cispo, T>;
    case Surrogate::sapo: return policy_kernel<Surrogate::sapo, T>;
    case Surrogate::gmpo: return policy_kernel<Surrogate::gmpo, T>;
  }
  STD_TORCH_CHECK(false, "surrogate: there is no ", surrogate);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss_fwd(
    Tensor logps, Tensor old_logps, Tensor advantages, MaybeTensor mask, Tensor cu_seqlens, MaybeTensor weights,
    MaybeTensor ref_logps, MaybeTensor entropy, MaybeTensor dloss, double option_0, double option_1, double option_2,
    double option_3, double log_ratio_clamp, double beta, double kl_clamp, double entropy_coef, int64_t surrogate,
    int64_t level, int64_t kl_estimator, int64_t kl_gradient, bool kl_bias_correction, bool sequence_advantages,
    bool sequence_mean, bool per_token) {
  return for_float_type(logps, [&]<class T>(T*) {
    const int64_t tokens = logps.numel(), count = cu_seqlens.numel() - 1;
    Tensor entropy_slope;
    PolicyArgs<T> a{};
    a.logps = data_of<T>(logps, tokens, "logps");
    a.old_logps = data_of<T>(old_logps, tokens, "old_logps");
    a.sequence_advantages = sequence_advantages;
    a.advantages = data_of<T>(advantages, sequence_advantages ? count : tokens, "advantages");
    a.weights = data_of<T>(weights, tokens, "weights");
    a.ref_logps = data_of<T>(ref_logps, tokens, "ref_logps");
    a.entropy = data_of<T>(entropy, tokens, "entropy");
    a.dloss = data_of<T>(dloss, tokens, "dloss");
    a.entropy_slope = new_like<T>(logps, {entropy.has_value() ? tokens : 0}, entropy_slope);
    a.level = static_cast<Level>(level);
    static_cast<PolicyNumbers<T>&>(a) =
        policy_numbers<T>(option_0, option_1, option_2, option_3, log_ratio_clamp, beta, kl_clamp, entropy_coef,
                          kl_estimator, kl_gradient, kl_bias_correction);
    const auto [loss, slope, stats] =
        fused_loss<9, T>(a, logps, mask, cu_seqlens, a.level == Level::token, sequence_mean, per_token,
                         sizeof(PolicyShared), policy_kernel_of<T>(surrogate));
    return std::tuple{loss, slope, entropy_slope, stats};
  });
}

std::tuple<Tensor, Tensor, Tensor> value_loss_fwd(Tensor values, Tensor old_values, Tensor returns, MaybeTensor mask,
                                                  Tensor cu_seqlens, double epsilon, bool sequence_mean,
                                                  bool per_token) {
  return for_float_type(values, [&]<class T>(T*) {
    const int64_t tokens = values.numel();
    ValueArgs<T> a{};
    a.values = data_of<T>(values, tokens, "values");
    a.old_values = data_of<T>(old_values, tokens, "old_values");
    a.returns = data_of<T>(returns, tokens, "returns");
    a.epsilon = static_cast<T>(epsilon);
    return fused_loss<5, T>(a, values, mask, cu_seqlens, true, sequence_mean, per_token, sizeof(ValueShared),
                            value_kernel<T>);
  });
}

}  // namespace rpp::cuda
