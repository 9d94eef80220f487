// token_rewards, returns and gae: a block for each sequence, tile after tile with a carry in float64. A batch of one
// long sequence is the work of one block.
#include "cuda/scans.h"
#include "ops.h"

namespace rpp::cuda {
namespace {

Grid grid_of_sequences(int64_t count, size_t shared_bytes) { return {count, kTokenThreads, shared_bytes}; }

// ---- token_rewards

template <class T>
struct TokenRewardsArgs {
  T *out, *dscores;     // rewards, or dkl and dscores of the backward
  const T *x, *scores;  // kl and scores, or drewards
  const bool* mask;
  const int64_t* cu_seqlens;
  T price;
};

template <class T>
__global__ void __launch_bounds__(kTokenThreads) token_rewards_kernel(TokenRewardsArgs<T> a) {
  const Range sequence = sequence_of(a.cu_seqlens, blockIdx.x);
  const int64_t last = last_valid(a.mask, sequence, shared_memory<SumsInBlock<1>>());
  const T score = a.scores ? a.scores[blockIdx.x] : T(0);
  for_tiles<true>({a.x}, a.mask, sequence, [&](const Tile<T, 1>& tile) {
    T out[kTokensEach];
#pragma unroll
    for (int k = 0; k < kTokensEach; ++k) {
      out[k] = a.price * tile.value(0, k);
      if (a.scores && tile.at + k == last) out[k] += score;
    }
    tile.store(a.out, out);
  });
  if (a.dscores && threadIdx.x == 0) a.dscores[blockIdx.x] = last < 0 ? T(0) : a.x[last];
}

// ---- returns: between two valid tokens lie as many factors from either side, so that the gradient of the returns is
// the
//      same sum from the other end, `forward`

template <class T>
struct ReturnsArgs {
  T* out;
  const T* x;
  const bool* mask;
  const int64_t* cu_seqlens;
  Discount discount;
};

template <bool forward, class T>
__global__ void __launch_bounds__(kTokenThreads) returns_kernel(ReturnsArgs<T> a) {
  Scan scan{shared_memory<ScanShared>()};
  for_tiles<forward>({a.x}, a.mask, sequence_of(a.cu_seqlens, blockIdx.x), [&](const Tile<T, 1>& tile) {
    const auto step = [&](int k) { return Step{a.discount.of(tile, k), tile.value(0, k)}; };
    Step own;
    for_each_in_order<forward>([&](int k) { own = followed(own, step(k)); });
    double carry = scan.before(own);
    T out[kTokensEach];
    for_each_in_order<forward>([&](int k) {
      carry = step(k).after(carry);
      out[k] = static_cast<T>(carry);
    });
    tile.store(a.out, out);
  });
}

template <bool forward>
Tensor discounted(const Tensor& x, const MaybeTensor& mask, const Tensor& cu_seqlens, double gamma, int64_t gap) {
  return for_float_type(x, [&]<class T>(T*) {
    const int64_t tokens = x.numel(), count = cu_seqlens.numel() - 1;
    Tensor out;
    const ReturnsArgs<T> a{
        new_like<T>(x, {tokens}, out), data_of<T>(x, tokens, "x"), data_of<bool>(mask, tokens, "completion_mask"),
        data_of<int64_t>(cu_seqlens, count + 1, "cu_seqlens"), Discount(gamma, static_cast<Gap>(gap))};
    launch(x, grid_of_sequences(count, sizeof(ScanShared)), returns_kernel<forward, T>, a);
    return out;
  });
}

// ---- gae: with E_t = V_t + lambda A_t both are one scan, E_t = lambda r_t + (1 - lambda) V_t + gamma lambda E_{t+1},
// and
//      A_t = r_t - V_t + gamma E_{t+1}

template <class T>
struct GaeArgs {
  T *advantages, *returns;    // of the backward drewards, dvalues
  const T *rewards, *values;  // of the backward dadvantages, dreturns
  const bool* mask;
  const int64_t* cu_seqlens;
  double gamma, gae_lambda;
  Discount discount;  // by gamma lambda
};

template <class T>
__global__ void __launch_bounds__(kTokenThreads) gae_fwd_kernel(GaeArgs<T> a) {
  Scan scan{shared_memory<ScanShared>()};
  for_tiles<false>({a.rewards, a.values}, a.mask, sequence_of(a.cu_seqlens, blockIdx.x), [&](const Tile<T, 2>& tile) {
    const auto step = [&](int k) {
      const double reward = tile.value(0, k), value = tile.value(1, k);
      return Step{a.discount.of(tile, k), a.gae_lambda * reward + (1 - a.gae_lambda) * value};
    };
    Step own;
    for_each_in_order<false>([&](int k) { own = followed(own, step(k)); });
    double carry = scan.before(own);
    T advantages[kTokensEach], returns[kTokensEach];
    for_each_in_order<false>([&](int k) {
      const double value = tile.value(1, k), advantage = tile.value(0, k) - value + a.gamma * carry;
      advantages[k] = static_cast<T>(advantage);
      returns[k] = static_cast<T>(advantage + value);
      carry = step(k).after(carry);
    });
    tile.store(a.advantages, advantages);
    tile.store(a.returns, returns);
  });
}

// The transposed scan: c_t = dadvantages_t + dreturns_t + gamma lambda c_{t-1} is d(loss) / d(delta_t).
template <class T>
__global__ void __launch_bounds__(kTokenThreads) gae_bwd_kernel(GaeArgs<T> a) {
  Scan scan{shared_memory<ScanShared>()};
  for_tiles<true>({a.rewards, a.values}, a.mask, sequence_of(a.cu_seqlens, blockIdx.x), [&](const Tile<T, 2>& tile) {
    const auto step = [&](int k) {
      return Step{a.discount.of(tile, k), static_cast<double>(tile.value(0, k)) + tile.value(1, k)};
    };
    Step own;
    for_each_in_order<true>([&](int k) { own = followed(own, step(k)); });
    double carry = scan.before(own);
    T drewards[kTokensEach], dvalues[kTokensEach];
    for_each_in_order<true>([&](int k) {
      const double before = carry;
      carry = step(k).after(carry);
      drewards[k] = static_cast<T>(carry);
      dvalues[k] = static_cast<T>(tile.value(1, k) - carry + a.gamma * before);
    });
    tile.store(a.advantages, drewards);
    tile.store(a.returns, dvalues);
  });
}

template <bool backward>
std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const MaybeTensor& mask,
                               const Tensor& cu_seqlens, double gamma, double gae_lambda, int64_t gap) {
  return for_float_type(rewards, [&]<class T>(T*) {
    const int64_t tokens = rewards.numel(), count = cu_seqlens.numel() - 1;
    Tensor advantages, returns;
    const GaeArgs<T> a{new_like<T>(rewards, {tokens}, advantages),
                       new_like<T>(rewards, {tokens}, returns),
                       data_of<T>(rewards, tokens, backward ? "dadvantages" : "rewards"),
                       data_of<T>(values, tokens, backward ? "dreturns" : "values"),
                       data_of<bool>(mask, tokens, "completion_mask"),
                       data_of<int64_t>(cu_seqlens, count + 1, "cu_seqlens"),
                       gamma,
                       gae_lambda,
                       Discount(gamma * gae_lambda, static_cast<Gap>(gap))};
    launch(rewards, grid_of_sequences(count, sizeof(ScanShared)), backward ? gae_bwd_kernel<T> : gae_fwd_kernel<T>, a);
    return std::tuple{advantages, returns};
  });
}

}  // namespace

Tensor token_rewards_fwd(Tensor scores, Tensor kl, MaybeTensor mask, Tensor cu_seqlens, double beta) {
  return for_float_type(kl, [&]<class T>(T*) {
    const int64_t tokens = kl.numel(), count = cu_seqlens.numel() - 1;
    Tensor rewards;
    const TokenRewardsArgs<T> a{new_like<T>(kl, {tokens}, rewards),
                                nullptr,
                                data_of<T>(kl, tokens, "kl"),
                                data_of<T>(scores, count, "scores"),
                                data_of<bool>(mask, tokens, "completion_mask"),
                                data_of<int64_t>(cu_seqlens, count + 1, "cu_seqlens"),
                                static_cast<T>(-beta)};
    launch(kl, grid_of_sequences(count, sizeof(SumsInBlock<1>)), token_rewards_kernel<T>, a);
    return rewards;
  });
}

std::tuple<Tensor, Tensor> token_rewards_bwd(Tensor drewards, MaybeTensor mask, Tensor cu_seqlens, double beta) {
  return for_float_type(drewards, [&]<class T>(T*) {
    const int64_t tokens = drewards.numel(), count = cu_seqlens.numel() - 1;
    Tensor dscores, dkl;
    const TokenRewardsArgs<T> a{new_like<T>(drewards, {tokens}, dkl),
                                new_like<T>(drewards, {count}, dscores),
                                data_of<T>(drewards, tokens, "drewards"),
                                nullptr,
                                data_of<bool>(mask, tokens, "completion_mask"),
                                data_of<int64_t>(cu_seqlens, count + 1, "cu_seqlens"),
                                static_cast<T>(-beta)};
    launch(drewards, grid_of_sequences(count, sizeof(SumsInBlock<1>)), token_rewards_kernel<T>, a);
    return std::tuple{dscores, dkl};
  });
}

Tensor returns_fwd(Tensor rewards, MaybeTensor mask, Tensor cu_seqlens, double gamma, int64_t gap) {
  return discounted<false>(rewards, mask, cu_seqlens, gamma, gap);
}

Tensor returns_bwd(Tensor dreturns, MaybeTensor mask, Tensor cu_seqlens, double gamma, int64_t gap) {
  return discounted<true>(dreturns, mask, cu_seqlens, gamma, gap);
}

std::tuple<Tensor, Tensor> gae_fwd(Tensor rewards, Tensor values, MaybeTensor mask, Tensor cu_seqlens, double gamma,
                                   double gae_lambda, int64_t gap) {
  return gae<false>(rewards, values, mask, cu_seqlens, gamma, gae_lambda, gap);
}

std::tuple<Tensor, Tensor> gae_bwd(Tensor dadvantages, Tensor dreturns, MaybeTensor mask, Tensor cu_seqlens,
                                   double gamma, double gae_lambda, int64_t gap) {
  return gae<true>(dadvantages, dreturns, mask, cu_seqlens, gamma, gae_lambda, gap);
}

}  // namespace rpp::cuda
