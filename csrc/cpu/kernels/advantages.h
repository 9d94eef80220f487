// No include guard: see for_each_isa.h. Arguments: cpu/advantages.h.

#include "cpu/kernels/tokens.h"

// Moments of one block that lies in the L1 cache: the mean first, then the deviations from it.
template <class T>
RPP_HD Moments block_moments(const T* x, const bool* mask, int64_t n) {
  using V = Vector<T>;
  LaneSums<T, 2> sum;
  sum.walk(0, n, [&](int64_t i, int64_t k) {
    const auto valid = token_mask<T>(mask, i, k);
    sum.lane[0] += valid ? load_tokens(x, i, k) : V{};
    sum.lane[1] += valid ? num<V>(1) : V{};
  });
  Moments m;
  m.count = sum.total[1];
  if (m.count == 0) return m;
  m.mean = sum.total[0] / m.count;
  // The mean is rounded to T below; `rest` puts back what that lost.
  const V mean = V{} + static_cast<T>(m.mean);
  LaneSums<T, 2> rest;
  rest.walk(0, n, [&](int64_t i, int64_t k) {
    const V deviation = token_mask<T>(mask, i, k) ? load_tokens(x, i, k) - mean : V{};
    rest.lane[0] += deviation;
    rest.lane[1] += deviation * deviation;
  });
  const double residual = rest.total[0];
  m.mean = static_cast<T>(m.mean) + residual / m.count;
  m.squares = rest.total[1] - residual * residual / m.count;
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
    LaneSums<T, 3> sum;
    const int64_t start = block * kMomentsBlock;
    sum.walk(start, std::min(start + kMomentsBlock, a.size), [&](int64_t i, int64_t n) {
      const auto valid = token_mask<T>(a.mask, i, n);
      const V dout = valid ? load_tokens(a.dout, i, n) : V{};
      const V deviation = valid ? load_tokens(a.values, i, n) - a.shift : V{};
      sum.lane[0] += valid ? num<V>(1) : V{};
      sum.lane[1] += dout;
      sum.lane[2] += dout * deviation;
    });
    const auto [count, total, products] = sum.total;
    a.blocks[block] = {count, count > 0 ? total / count : 0, products};
  }
}

template <class T>
void affine_tokens(const AffineArgs<T>& a, int64_t begin, int64_t end) {
  using V = Vector<T>;
  for_each_vector<T>(begin, end, [&](int64_t i, int64_t n) {
    V out = (load_tokens(a.values, i, n) - a.by.shift) * a.by.scale + a.by.offset;
    if (a.dout) out += load_tokens(a.dout, i, n) * a.by.dout_scale;
    store_tokens(a.out, i, n, token_mask<T>(a.mask, i, n) ? out : V{});
  });
}

constexpr int kSideBySide = 4;

struct ReinforcePPSequence {
  int64_t begin = 0, start = 0, end = 0;  // of the sequence, of the block, of both
  int64_t paid_at = -1;                   // the last valid token
  double score = 0, carry = 0;
  Moments moments;
};

// KL, terminal reward, return and moments of a few sequences, block by block from their ends: each block is still in
// the L1 cache when the next step wants it, so memory is read once and written once. Side by side, because each token
// of a scan waits for the one before it. What this leaves at masked tokens is for the whitening to select away.
template <Kl estimator, class T>
RPP_HD void reinforce_pp_side_by_side(const ReinforcePPArgs<T>& a, int64_t first, int64_t count) {
  using V = Vector<T>;
  constexpr int64_t kBlock = 1024;
  const KlClamps<V> clamps = {V{} + a.log_ratio_clamp, V{} + a.kl_clamp};
  const double discount[] = {1, a.gamma};  // a masked token passes the carry on
  ReinforcePPSequence sequences[kSideBySide];
  bool busy = false;
  for (int64_t k = 0; k < count; ++k) {
    auto& s = sequences[k];
    s.begin = a.cu_seqlens[first + k];
    s.end = a.cu_seqlens[first + k + 1];
    s.score = a.scores[first + k];
    s.paid_at = s.end - 1;
    while (a.mask && s.paid_at >= s.begin && !a.mask[s.paid_at]) --s.paid_at;
    busy |= s.end > s.begin;
  }
  const auto step = [&](double& carry, int64_t t) {
    carry = a.returns[t] + (a.mask ? discount[a.mask[t]] : discount[1]) * carry;
    a.returns[t] = static_cast<T>(carry);
  };
  while (busy) {
    int64_t together = kBlock;
    for (auto& s : sequences) {
      s.start = std::max(s.begin, s.end - kBlock);
      for_each_vector<T>(s.start, s.end, [&](int64_t i, int64_t n) {
        V kl{};
        if (a.ref_logps)
          kl = kl_value<estimator>(load_tokens(a.old_logps, i, n) - load_tokens(a.ref_logps, i, n), clamps);
        store_tokens(a.returns, i, n, token_mask<T>(a.mask, i, n) ? kl * -a.beta : V{});
      });
      if (s.paid_at >= s.start && s.paid_at < s.end) a.returns[s.paid_at] += s.score;
      together = std::min(together, s.end - s.start);
    }
    double carry[kSideBySide];
    for (int k = 0; k < kSideBySide; ++k) carry[k] = sequences[k].carry;
    for (int64_t i = 1; i <= together; ++i) {
#pragma GCC unroll 4
      for (int k = 0; k < kSideBySide; ++k) step(carry[k], sequences[k].end - i);
    }
    busy = false;
    for (int k = 0; k < kSideBySide; ++k) {
      auto& s = sequences[k];
      for (int64_t t = s.end - together - 1; t >= s.start; --t) step(carry[k], t);
      s.carry = carry[k];
      s.moments.merge(block_moments(a.returns + s.start, a.mask ? a.mask + s.start : nullptr, s.end - s.start));
      s.end = s.start;
      busy |= s.end > s.begin;
    }
  }
  for (int64_t k = 0; k < count; ++k) a.sequences[first + k] = sequences[k].moments;
}

template <class T>
void reinforce_pp_sequences(const ReinforcePPArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kSideBySide) {
    const int64_t count = std::min<int64_t>(kSideBySide, end - i);
    switch (static_cast<Kl>(a.estimator)) {
      case Kl::none: break;
      case Kl::k1: reinforce_pp_side_by_side<Kl::k1>(a, i, count); break;
      case Kl::k2: reinforce_pp_side_by_side<Kl::k2>(a, i, count); break;
      case Kl::k3: reinforce_pp_side_by_side<Kl::k3>(a, i, count); break;
      case Kl::abs: reinforce_pp_side_by_side<Kl::abs>(a, i, count); break;
    }
  }
}
