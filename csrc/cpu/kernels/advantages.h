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

// KL, terminal reward, return and moments of one sequence, block by block from its end: each block is still in the L1
// cache when the next step wants it, so memory is read once and written once.
template <Kl estimator, class T>
RPP_HD void reinforce_pp_sequence(const ReinforcePPArgs<T>& a, int64_t sequence) {
  using V = Vector<T>;
  constexpr int64_t kBlock = 1024;
  const KlClamps<V> clamps = {V{} + a.log_ratio_clamp, V{} + a.kl_clamp};
  const int64_t begin = a.cu_seqlens[sequence];
  double carry = 0, unpaid = a.scores[sequence];
  Moments moments;
  for (int64_t end = a.cu_seqlens[sequence + 1]; end > begin;) {
    const int64_t start = std::max(begin, end - kBlock);
    for_each_vector<T>(start, end, [&](int64_t i, int64_t n) {
      V kl{};
      if (a.ref_logps)
        kl = kl_value<estimator>(load_tokens(a.old_logps, i, n) - load_tokens(a.ref_logps, i, n), clamps);
      store_tokens(a.returns, i, n, token_mask<T>(a.mask, i, n) ? kl * -a.beta : V{});
    });
    for (int64_t t = end - 1; t >= start; --t) {
      if (a.mask && !a.mask[t]) continue;
      carry = a.returns[t] + unpaid + a.gamma * carry;
      unpaid = 0;
      a.returns[t] = static_cast<T>(carry);
    }
    moments.merge(block_moments(a.returns + start, a.mask ? a.mask + start : nullptr, end - start));
    end = start;
  }
  a.sequences[sequence] = moments;
}

template <class T>
void reinforce_pp_sequences(const ReinforcePPArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    switch (static_cast<Kl>(a.estimator)) {
      case Kl::none: break;
      case Kl::k1: reinforce_pp_sequence<Kl::k1>(a, i); break;
      case Kl::k2: reinforce_pp_sequence<Kl::k2>(a, i); break;
      case Kl::k3: reinforce_pp_sequence<Kl::k3>(a, i); break;
      case Kl::abs: reinforce_pp_sequence<Kl::abs>(a, i); break;
    }
  }
}
