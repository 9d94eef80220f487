// token_rewards, returns and gae: serial within a sequence, parallel over sequences. Sums are carried in double.
#include <algorithm>
#include <bit>
#include <type_traits>

#include "choices.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/scan.h"
#include "ops.h"

namespace rpp::cpu {
namespace {

// valid ? x : 0 without a branch, which a mask with holes would mispredict. By bits: a masked NaN must not survive.
template <class T>
T kept(bool valid, T x) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  return std::bit_cast<T>(std::bit_cast<Bits>(x) & -Bits(valid));
}

struct GaeCarry {
  double advantage = 0, next_value = 0;
};

struct Sequences {
  const int64_t* cu;
  const bool* mask;
  int64_t count, tokens;

  Sequences(const Tensor& cu_seqlens, const MaybeTensor& mask_tensor, const Tensor& like)
      : cu(sequences_of(cu_seqlens, like.numel())),
        mask(data_of<bool>(mask_tensor, like.numel(), "completion_mask")),
        count(cu_seqlens.numel() - 1),
        tokens(like.numel()) {}

  bool valid(int64_t t) const { return !mask || mask[t]; }

  int64_t last(int64_t i) const {  // the last valid token, or -1
    for (int64_t t = cu[i + 1] - 1; t >= cu[i]; --t)
      if (valid(t)) return t;
    return -1;
  }

  template <class F>
  void parallel(const F& f) const {  // f(sequence, begin, end)
    parallel_rows(count, tokens / std::max<int64_t>(count, 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i, cu[i], cu[i + 1]);
    });
  }

  template <class Carry, bool forward = false, class Step>
  void parallel_scan(const Step& step) const {  // step(carry, token), in the order of each sequence
    parallel_rows(count, tokens / std::max<int64_t>(count, 1),
                  [&](int64_t begin, int64_t end) { scan<Carry, forward>(cu, begin, end, step); });
  }
};

// carry_t = valid ? x_t + gamma carry : factor_of_masked carry. Between two valid tokens lie as many factors from
// either side, so that the gradient of the returns is the same sum from the other end.
template <bool forward>
Tensor discounted(const Tensor& x, const MaybeTensor& mask, const Tensor& cu_seqlens, double gamma, Gap gap) {
  return for_float_type(x, [&]<class T>(T*) {
    const Sequences s(cu_seqlens, mask, x);
    const T* data = data_of<T>(x, s.tokens, "x");
    Tensor result;
    T* out = new_like<T>(x, {s.tokens}, result);
    const double discount[] = {factor_of_masked(gap, gamma), gamma};
    const auto scan = [&]<bool resets>(std::bool_constant<resets>) {
      s.parallel_scan<double, forward>([=](double& carry, int64_t t) {
        const bool valid = s.valid(t);
        carry = kept(valid, data[t]) + discount[valid] * carry;
        if constexpr (resets) carry = kept(valid, carry);  // selected, not multiplied by 0: it may be NaN
        out[t] = kept(valid, static_cast<T>(carry));
      });
    };
    gap == Gap::reset ? scan(std::true_type{}) : scan(std::false_type{});
    return result;
  });
}

}  // namespace

Tensor token_rewards_fwd(Tensor scores, Tensor kl, MaybeTensor mask, Tensor cu_seqlens, double beta) {
  return for_float_type(kl, [&]<class T>(T*) {
    const Sequences s(cu_seqlens, mask, kl);
    const T* score = data_of<T>(scores, s.count, "scores");
    const T* penalty = data_of<T>(kl, s.tokens, "kl");
    Tensor rewards;
    T* out = new_like<T>(kl, {s.tokens}, rewards);
    s.parallel([&](int64_t i, int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) out[t] = kept(s.valid(t), static_cast<T>(-beta) * penalty[t]);
      const int64_t last = s.last(i);
      if (last >= 0) out[last] += score[i];
    });
    return rewards;
  });
}

std::tuple<Tensor, Tensor> token_rewards_bwd(Tensor drewards, MaybeTensor mask, Tensor cu_seqlens, double beta) {
  return for_float_type(drewards, [&]<class T>(T*) {
    const Sequences s(cu_seqlens, mask, drewards);
    const T* d = data_of<T>(drewards, s.tokens, "drewards");
    Tensor dscores, dkl;
    T* out_scores = new_like<T>(drewards, {s.count}, dscores);
    T* out_kl = new_like<T>(drewards, {s.tokens}, dkl);
    s.parallel([&](int64_t i, int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) out_kl[t] = kept(s.valid(t), static_cast<T>(-beta) * d[t]);
      const int64_t last = s.last(i);
      out_scores[i] = last >= 0 ? d[last] : T(0);
    });
    return std::tuple{dscores, dkl};
  });
}

Tensor returns_fwd(Tensor rewards, MaybeTensor mask, Tensor cu_seqlens, double gamma, int64_t gap) {
  return discounted<false>(rewards, mask, cu_seqlens, gamma, static_cast<Gap>(gap));
}

Tensor returns_bwd(Tensor dreturns, MaybeTensor mask, Tensor cu_seqlens, double gamma, int64_t gap) {
  return discounted<true>(dreturns, mask, cu_seqlens, gamma, static_cast<Gap>(gap));
}

std::tuple<Tensor, Tensor> gae_fwd(Tensor rewards, Tensor values, MaybeTensor mask, Tensor cu_seqlens, double gamma,
                                   double gae_lambda, int64_t gap) {
  return for_float_type(rewards, [&]<class T>(T*) {
    const Sequences s(cu_seqlens, mask, rewards);
    const T* r = data_of<T>(rewards, s.tokens, "rewards");
    const T* v = data_of<T>(values, s.tokens, "values");
    Tensor advantages, targets;
    T* out = new_like<T>(rewards, {s.tokens}, advantages);
    T* out_targets = new_like<T>(rewards, {s.tokens}, targets);
    const auto scan = [&]<bool steps>(std::bool_constant<steps>) {
      s.parallel_scan<GaeCarry>([=](GaeCarry& carry, int64_t t) {
        out[t] = out_targets[t] = 0;
        const bool valid = s.valid(t);
        if (!steps && !valid) return;
        const double reward = kept(valid, r[t]), value = kept(valid, v[t]);
        carry.advantage = reward + gamma * carry.next_value - value + gamma * gae_lambda * carry.advantage;
        carry.next_value = value;
        out[t] = kept(valid, static_cast<T>(carry.advantage));
        out_targets[t] = kept(valid, static_cast<T>(carry.advantage + value));
      });
    };
    static_cast<Gap>(gap) == Gap::step ? scan(std::true_type{}) : scan(std::false_type{});
    return std::tuple{advantages, targets};
  });
}

// The transposed scan: c_t = (dadvantages_t + dreturns_t) + gamma lambda c_{t-1} is d(loss)/d(delta_t).
std::tuple<Tensor, Tensor> gae_bwd(Tensor dadvantages, Tensor dreturns, MaybeTensor mask, Tensor cu_seqlens,
                                   double gamma, double gae_lambda, int64_t gap) {
  return for_float_type(dadvantages, [&]<class T>(T*) {
    const Sequences s(cu_seqlens, mask, dadvantages);
    const T* da = data_of<T>(dadvantages, s.tokens, "dadvantages");
    const T* dr = data_of<T>(dreturns, s.tokens, "dreturns");
    Tensor drewards, dvalues;
    T* out_rewards = new_like<T>(dadvantages, {s.tokens}, drewards);
    T* out_values = new_like<T>(dadvantages, {s.tokens}, dvalues);
    const double discount[] = {factor_of_masked(static_cast<Gap>(gap), gamma * gae_lambda), gamma * gae_lambda};
    s.parallel_scan<double, true>([=](double& ddelta, int64_t t) {
      const bool valid = s.valid(t);
      const double previous = ddelta;
      ddelta = kept(valid, double(da[t]) + dr[t]) + discount[valid] * previous;
      out_rewards[t] = kept(valid, static_cast<T>(ddelta));
      out_values[t] = kept(valid, static_cast<T>(dr[t] - ddelta + gamma * previous));
    });
    return std::tuple{drewards, dvalues};
  });
}

}  // namespace rpp::cpu
