// moments, whiten and reinforce_pp: sums of all tokens, which the last block to finish adds up in float64.
#include "cuda/moments.h"
#include "cuda/scans.h"
#include "ops.h"

namespace rpp::cuda {
namespace {

constexpr int kSumTiles = 2;  // of a block that sums: fewer leave more to the last block, more need registers

// Of a multiprocessor, at least: left alone, ptxas would spill a few bytes of float64 to fit in one more.
template <class T>
constexpr int kAffineBlocks = sizeof(T) == 8 ? 4 : 6;
template <class T>
constexpr int kReinforcePPBlocks = sizeof(T) == 8 ? 2 : 3;

int64_t summing_blocks(int64_t tokens) { return ceil_div(tokens, kSumTiles * kTileTokens); }

// The tiles of this block, all on their way before the first is waited for.
template <class T, int N>
struct SumTiles {
  Tile<T, N> tile[kSumTiles];

  __device__ __forceinline__ void load(const T* const (&from)[N], const bool* mask, int64_t tokens) {
#pragma unroll
    for (int i = 0; i < kSumTiles; ++i)
      tile[i].load(from, mask, tile_begin(static_cast<int64_t>(blockIdx.x) * kSumTiles + i), {0, tokens});
  }

  template <class F>
  __device__ __forceinline__ void for_each(const F& f) const {  // f(tile, k)
#pragma unroll
    for (int i = 0; i < kSumTiles; ++i)
#pragma unroll
      for (int k = 0; k < kTokensEach; ++k) f(tile[i], k);
  }
};

// ---- moments

template <class T>
struct MomentsArgs {
  const T* values;
  const bool* mask;
  int64_t tokens;
  MomentsOfBlocks out;
};

template <class T>
__global__ void __launch_bounds__(kTokenThreads) moments_kernel(MomentsArgs<T> a) {
  MomentsShared& shared = shared_memory<MomentsShared>();
  SumTiles<T, 1> tiles;
  tiles.load({a.values}, a.mask, a.tokens);
  RunningMoments running{shared};
  running.add(
      [&](const auto& f) { tiles.for_each([&](const Tile<T, 1>& tile, int k) { f(tile.raw[0][k], tile.valid(k)); }); });
  a.out.store(running.of_block(), shared);
}

// ---- whitening

template <class T>
struct AffineArgs {
  T* out;                  // may be the values
  const T *values, *dout;  // dout: of the backward
  const bool* mask;
  int64_t tokens;
  const Affine<T>* by;  // of the backward; else from the moments
  const Moments* moments;
  bool shift_mean, unbiased;
  double eps;
  EpsMode mode;

  __device__ Whitening whitening() const { return Whitening(*moments, unbiased, eps, mode); }
};

template <class T>
__global__ void __launch_bounds__(kTokenThreads, kAffineBlocks<T>) affine_kernel(AffineArgs<T> a) {
  Tile<T, 2> tile;
  tile.load({a.values, a.dout}, a.mask, tile_begin(blockIdx.x), {0, a.tokens});
  Affine<T>& shared = shared_memory<Affine<T>>();  // a root and divisions in float64, which one thread is enough for
  if (threadIdx.x == 0) shared = a.by ? *a.by : whitened<T>(*a.moments, a.whitening(), a.shift_mean);
  __syncthreads();
  const Affine<T> by = shared;
  T out[kTokensEach];
#pragma unroll
  for (int k = 0; k < kTokensEach; ++k)
    out[k] = (tile.value(0, k) - by.shift) * by.scale + by.offset + tile.value(1, k) * by.dout_scale;
  tile.store(a.out, out);
}

template <class T>
struct WhitenSumsArgs : AffineArgs<T> {
  Affine<T>* result;
  double* of_block;  // (blocks, 2): sums of dout, and of dout * (x - shift)
  unsigned* arrived;
};

struct WhitenSumsShared {
  SumsInBlock<2> sums;
  bool last;
};

template <class T>
__global__ void __launch_bounds__(kTokenThreads) whiten_sums_kernel(WhitenSumsArgs<T> a) {
  WhitenSumsShared& shared = shared_memory<WhitenSumsShared>();
  SumTiles<T, 2> tiles;
  tiles.load({a.values, a.dout}, a.mask, a.tokens);
  const T shift = static_cast<T>(a.moments->mean);
  double sums[2] = {0, 0};
  tiles.for_each([&](const Tile<T, 2>& tile, int k) {
    const double dout = tile.value(1, k), deviation = tile.valid(k) ? tile.raw[0][k] - shift : T(0);
    sums[0] += dout;
    sums[1] += dout * deviation;
  });
  block_sum(sums, shared.sums);
  double* ours = a.of_block + 2 * static_cast<int64_t>(blockIdx.x);
  if (threadIdx.x == 0) ours[0] = sums[0], ours[1] = sums[1];
  if (!block_arrives_last(a.arrived, gridDim.x, shared.last)) return;
  sums[0] = sums[1] = 0;
  for (int64_t i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
    sums[0] += __ldcg(a.of_block + 2 * i);
    sums[1] += __ldcg(a.of_block + 2 * i + 1);
  }
  block_sum(sums, shared.sums);
  if (threadIdx.x == 0) *a.result = whitened_gradient<T>(*a.moments, a.whitening(), a.shift_mean, sums[0], sums[1]);
}

template <class T>
AffineArgs<T> affine_args(T* out, const MaybeTensor& dout, const Tensor& values, const MaybeTensor& mask,
                          const Tensor& moments, bool shift_mean, bool unbiased, double eps, int64_t eps_mode) {
  const int64_t tokens = values.numel();
  return {out,
          data_of<T>(values, tokens, "values"),
          data_of<T>(dout, tokens, "dout"),
          data_of<bool>(mask, tokens, "completion_mask"),
          tokens,
          nullptr,
          reinterpret_cast<const Moments*>(data_of<double>(moments, 3, "moments")),
          shift_mean,
          unbiased,
          eps,
          static_cast<EpsMode>(eps_mode)};
}

template <class T>
void launch_affine(const Tensor& like, const AffineArgs<T>& a) {
  launch(like, {ceil_div(a.tokens, kTileTokens), kTokenThreads, sizeof(Affine<T>)}, affine_kernel<T>, a);
}

// ---- reinforce_pp: KL, terminal reward, return and moments of a sequence, tile by tile from its end: one read, one
// write

template <class T>
struct ReinforcePPArgs {
  T* returns;
  const T *scores, *old_logps, *ref_logps;
  const bool* mask;
  const int64_t* cu_seqlens;
  int64_t sequences;
  T price;
  Discount discount;
  KlClamps<T> clamps;
  MomentsOfBlocks moments;
};

struct ReinforcePPShared {
  SumsInBlock<1> last;
  ScanShared scan;
  MomentsShared moments;
};

template <Kl estimator, class T>  // Kl::none where there are no ref_logps
__global__ void __launch_bounds__(kTokenThreads, kReinforcePPBlocks<T>) reinforce_pp_kernel(ReinforcePPArgs<T> a) {
  ReinforcePPShared& shared = shared_memory<ReinforcePPShared>();
  const int64_t i = blockIdx.x;  // of no sequences one block finds that there are none
  const Range sequence = i < a.sequences ? sequence_of(a.cu_seqlens, i) : Range{0, 0};
  const T score = i < a.sequences ? a.scores[i] : T(0);
  const int64_t last = last_valid(a.mask, sequence, shared.last);
  Scan scan{shared.scan};
  RunningMoments running{shared.moments};
  const bool with_kl = estimator != Kl::none;
  const T* const log_probs[] = {with_kl ? a.old_logps : nullptr, with_kl ? a.ref_logps : nullptr};
  for_tiles<false>(log_probs, a.mask, sequence, [&](const Tile<T, 2>& tile) {
    T x[kTokensEach];
    Step own;
    for_each_in_order<false>([&](int k) {
      const T kl = kl_value<estimator>(tile.value(0, k) - tile.value(1, k), a.clamps);
      x[k] = tile.valid(k) ? a.price * kl : T(0);
      if (tile.at + k == last) x[k] += score;
      own = followed(own, {a.discount.of(tile, k), x[k]});
    });
    double carry = scan.before(own);
    for_each_in_order<false>([&](int k) {
      carry = Step{a.discount.of(tile, k), x[k]}.after(carry);
      x[k] = static_cast<T>(carry);
    });
    tile.store(a.returns, x);
    running.add([&](const auto& f) {
#pragma unroll
      for (int k = 0; k < kTokensEach; ++k) f(x[k], tile.valid(k));
    });
  });
  a.moments.store(running.of_block(), shared.moments);
}

}  // namespace

Tensor moments(Tensor values, MaybeTensor mask) {
  return for_float_type(values, [&]<class T>(T*) {
    const int64_t tokens = values.numel(), blocks = most(1, summing_blocks(tokens));  // of no values there are moments
    Tensor out, keep[2];
    const MomentsArgs<T> a{data_of<T>(values, tokens, "values"), data_of<bool>(mask, tokens, "completion_mask"), tokens,
                           MomentsOfBlocks(values, blocks, out, keep)};
    launch(values, {blocks, kTokenThreads, sizeof(MomentsShared)}, moments_kernel<T>, a);
    return out;
  });
}

void whiten_out(Tensor out, Tensor values, MaybeTensor mask, Tensor moments, bool shift_mean, bool unbiased, double eps,
                int64_t eps_mode) {
  for_float_type(values, [&]<class T>(T*) {
    launch_affine(values, affine_args(const_cast<T*>(data_of<T>(out, values.numel(), "out")), std::nullopt, values,
                                      mask, moments, shift_mean, unbiased, eps, eps_mode));
  });
}

Tensor whiten_bwd(Tensor dout, Tensor values, MaybeTensor mask, Tensor moments, bool shift_mean, bool unbiased,
                  double eps, int64_t eps_mode) {
  return for_float_type(values, [&]<class T>(T*) {
    Tensor out, terms, of_block, arrived;
    const int64_t blocks = summing_blocks(values.numel());
    WhitenSumsArgs<T> a{affine_args(new_like<T>(values, {values.numel()}, out), dout, values, mask, moments, shift_mean,
                                    unbiased, eps, eps_mode)};
    a.result = reinterpret_cast<Affine<T>*>(new_like<T>(values, {4}, terms));
    a.of_block = new_like<double>(values, {blocks, 2}, of_block);
    a.arrived = new_counters(values, 1, arrived);
    a.by = a.result;
    launch(values, {blocks, kTokenThreads, sizeof(WhitenSumsShared)}, whiten_sums_kernel<T>, a);
    launch_affine<T>(values, a);
    return out;
  });
}

std::tuple<Tensor, Tensor> reinforce_pp_fwd(Tensor scores, Tensor old_logps, MaybeTensor ref_logps, MaybeTensor mask,
                                            Tensor cu_seqlens, double beta, double gamma, int64_t estimator,
                                            double log_ratio_clamp, double kl_clamp) {
  return for_float_type(old_logps, [&]<class T>(T*) {
    const int64_t tokens = old_logps.numel(), count = cu_seqlens.numel() - 1, blocks = most(1, count);
    Tensor returns, moments, keep[2];
    const ReinforcePPArgs<T> a{new_like<T>(old_logps, {tokens}, returns),
                               data_of<T>(scores, count, "scores"),
                               data_of<T>(old_logps, tokens, "old_logps"),
                               data_of<T>(ref_logps, tokens, "ref_logps"),
                               data_of<bool>(mask, tokens, "completion_mask"),
                               data_of<int64_t>(cu_seqlens, count + 1, "cu_seqlens"),
                               count,
                               static_cast<T>(-beta),
                               Discount(gamma, Gap::carry),
                               {static_cast<T>(log_ratio_clamp), static_cast<T>(kl_clamp)},
                               MomentsOfBlocks(old_logps, blocks, moments, keep)};
    with_estimator(a.ref_logps ? estimator : static_cast<int64_t>(Kl::none), [&]<Kl k>() {
      launch(old_logps, {blocks, kTokenThreads, sizeof(ReinforcePPShared)}, reinforce_pp_kernel<k, T>, a);
    });
    return std::tuple{returns, moments};
  });
}

}  // namespace rpp::cuda
