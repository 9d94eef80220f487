// No include guard: see for_each_isa.h. Arguments: cpu/kl.h.

#include "cpu/kernels/tokens.h"

template <Kl estimator, class T>
RPP_HD void kl_tokens(const KlArgs<T>& a, int64_t begin, int64_t end) {
  using V = Vector<T>;
  const KlClamps<V> clamps = {V{} + a.log_ratio_clamp, V{} + a.kl_clamp};
  for_each_vector<T>(begin, end, [&](int64_t i, int64_t n) {
    const V d = load_tokens(a.logps, i, n) - load_tokens(a.ref_logps, i, n);
    V out = a.dkl ? load_tokens(a.dkl, i, n) * kl_slope<estimator>(d, clamps) : kl_value<estimator>(d, clamps);
    store_tokens(a.out, i, n, token_mask<T>(a.mask, i, n) ? out : V{});
  });
}

template <class T>
void kl_tokens(const KlArgs<T>& a, int64_t begin, int64_t end) {
  with_estimator(a.estimator, [&]<Kl estimator>() { kl_tokens<estimator>(a, begin, end); });
}
