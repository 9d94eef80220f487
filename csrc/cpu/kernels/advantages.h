// No include guard: see for_each_isa.h. Arguments: cpu/advantages.h.

#include "cpu/kernels/tokens.h"

// Moments of one block that lies in the L1 cache: the mean first, then the deviations from it.
template <class T>
RPP_HD Moments block_moments(const T* x, const bool* mask, int64_t n) {
  using V = Vector<T>;
  V sum{}, count{};
  for_each_vector<T>(0, n, [&](int64_t i, int64_t k) {
    const auto valid = token_mask<T>(mask, i, k);
    sum += valid ? load_tokens(x, i, k) : V{};
    count += valid ? num<V>(1) : V{};
  });
  Moments m;
  m.count = horizontal_sum(count);
  if (m.count == 0) return m;
  m.mean = horizontal_sum(sum) / m.count;
  // The mean is rounded to T below; `rest` puts back what that lost.
  const V mean = V{} + static_cast<T>(m.mean);
  V squares{}, rest{};
  for_each_vector<T>(0, n, [&](int64_t i, int64_t k) {
    const V deviation = token_mask<T>(mask, i, k) ? load_tokens(x, i, k) - mean : V{};
    squares += deviation * deviation;
    rest += deviation;
  });
  const double residual = horizontal_sum(rest);
  m.mean = static_cast<T>(m.mean) + residual / m.count;
  m.squares = horizontal_sum(squares) - residual * residual / m.count;
  return m;
}

template <class T>
void moments_blocks(const MomentsArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t i = block * kMomentsBlock, n = std::min(kMomentsBlock, a.size - i);
    a.blocks[block] = block_moments(a.values + i, a.mask ? a.mask + i : nullptr, n);
  }
}

template <class T>
void products_blocks(const ProductsArgs<T>& a, int64_t begin, int64_t end) {
  using V = Vector<T>;
  for (int64_t block = begin; block < end; ++block) {
    V sum{}, products{}, count{};
    const int64_t start = block * kMomentsBlock;
    for_each_vector<T>(start, std::min(start + kMomentsBlock, a.size), [&](int64_t i, int64_t n) {
      const auto valid = token_mask<T>(a.mask, i, n);
      const V dout = valid ? load_tokens(a.dout, i, n) : V{};
      sum += dout;
      products += valid ? dout * (load_tokens(a.values, i, n) - a.shift) : V{};
      count += valid ? num<V>(1) : V{};
    });
    const double c = horizontal_sum(count);
    a.blocks[block] = {c, c > 0 ? horizontal_sum(sum) / c : 0, horizontal_sum(products)};
  }
}

template <class T>
void affine_tokens(const AffineArgs<T>& a, int64_t begin, int64_t end) {
  using V = Vector<T>;
  for_each_vector<T>(begin, end, [&](int64_t i, int64_t n) {
    V out = (load_tokens(a.values, i, n) - a.shift) * a.scale + a.offset;
    if (a.dout) out += load_tokens(a.dout, i, n) * a.dout_scale;
    store_tokens(a.out, i, n, token_mask<T>(a.mask, i, n) ? out : V{});
  });
}

template <class T>
struct ReinforcePPLane {
  int64_t begin = 0, start = 0, end = 0;  // of the sequence, of the block, of both
  int64_t paid_at = -1;                   // the last valid token
  double score = 0, carry = 0;
  Moments moments;
};

// KL, terminal reward, return and moments of a few sequences, block by block from their ends: each block is still in
// the L1 cache when the next step wants it, so memory is read once and written once. Side by side, because each token
// of a scan waits for the one before it. What this leaves at masked tokens is for the whitening to select away.
template <Kl estimator, class T>
RPP_HD void reinforce_pp_lanes(const ReinforcePPArgs<T>& a, int64_t first, int64_t count) {
  using V = Vector<T>;
  constexpr int64_t kBlock = 1024;
  const KlClamps<V> clamps = {V{} + a.log_ratio_clamp, V{} + a.kl_clamp};
  const double discount[] = {1, a.gamma};  // a masked token passes the carry on
  ReinforcePPLane<T> parallel_lanes[kReinforcePPLanes];
  bool busy = false;
  for (int64_t k = 0; k < count; ++k) {
    auto& lane = parallel_lanes[k];
    lane.begin = a.cu_seqlens[first + k];
    lane.end = a.cu_seqlens[first + k + 1];
    lane.score = a.scores[first + k];
    lane.paid_at = lane.end - 1;
    while (a.mask && lane.paid_at >= lane.begin && !a.mask[lane.paid_at]) --lane.paid_at;
    busy |= lane.end > lane.begin;
  }
  const auto step = [&](double& carry, int64_t t) {
    carry = a.returns[t] + (a.mask ? discount[a.mask[t]] : discount[1]) * carry;
    a.returns[t] = static_cast<T>(carry);
  };
  while (busy) {
    int64_t together = kBlock;
    for (auto& lane : parallel_lanes) {
      lane.start = std::max(lane.begin, lane.end - kBlock);
      for_each_vector<T>(lane.start, lane.end, [&](int64_t i, int64_t n) {
        V kl{};
        if (a.ref_logps)
          kl = kl_value<estimator>(load_tokens(a.old_logps, i, n) - load_tokens(a.ref_logps, i, n), clamps);
        store_tokens(a.returns, i, n, token_mask<T>(a.mask, i, n) ? kl * -a.beta : V{});
      });
      if (lane.paid_at >= lane.start && lane.paid_at < lane.end) a.returns[lane.paid_at] += lane.score;
      together = std::min(together, lane.end - lane.start);
    }
    double carry[kReinforcePPLanes];
    for (int k = 0; k < kReinforcePPLanes; ++k) carry[k] = parallel_lanes[k].carry;
    for (int64_t i = 1; i <= together; ++i) {
#pragma GCC unroll 4
      for (int k = 0; k < kReinforcePPLanes; ++k) step(carry[k], parallel_lanes[k].end - i);
    }
    busy = false;
    for (int k = 0; k < kReinforcePPLanes; ++k) {
      auto& lane = parallel_lanes[k];
      for (int64_t t = lane.end - together - 1; t >= lane.start; --t) step(carry[k], t);
      lane.carry = carry[k];
      lane.moments.merge(
          block_moments(a.returns + lane.start, a.mask ? a.mask + lane.start : nullptr, lane.end - lane.start));
      lane.end = lane.start;
      busy |= lane.end > lane.begin;
    }
  }
  for (int64_t k = 0; k < count; ++k) a.sequences[first + k] = parallel_lanes[k].moments;
}

template <class T>
void reinforce_pp_sequences(const ReinforcePPArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kReinforcePPLanes) {
    const int64_t count = std::min<int64_t>(kReinforcePPLanes, end - i);
    switch (static_cast<Kl>(a.estimator)) {
      case Kl::none: break;
      case Kl::k1: reinforce_pp_lanes<Kl::k1>(a, i, count); break;
      case Kl::k2: reinforce_pp_lanes<Kl::k2>(a, i, count); break;
      case Kl::k3: reinforce_pp_lanes<Kl::k3>(a, i, count); break;
      case Kl::abs: reinforce_pp_lanes<Kl::abs>(a, i, count); break;
    }
  }
}
