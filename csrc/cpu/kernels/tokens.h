// How a kernel walks tokens: whole vectors, then the tail with the same formula. No include guard: see for_each_isa.h.

// f(i, n): n tokens from i, n = lanes except for the last call.
template <class T, class F>
RPP_HD void for_each_vector(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + lanes<T> <= end; i += lanes<T>) f(i, lanes<T>);
  if (i < end) f(i, end - i);
}

template <class T>
RPP_HD Vector<T> load_tokens(const T* p, int64_t i, int64_t n) {
  return n == lanes<T> ? load(p + i) : load(p + i, n, T(0));
}

template <class T>
RPP_HD void store_tokens(T* p, int64_t i, int64_t n, Vector<T> v) {
  if (n == lanes<T>) store(p + i, v);
  else store(p + i, v, n);
}

template <class T>
RPP_HD Mask<Vector<T>> token_mask(const bool* mask, int64_t i, int64_t n) {
  return load_mask<Vector<T>>(mask ? mask + i : nullptr, n);
}

// Sums in lanes of T over at most kBlock tokens, then in double: counts stay exact and long sums keep their digits.
template <class T, int K>
struct LaneSums {
  static constexpr int64_t kBlock = 64 * lanes<T>;
  Vector<T> lane[K] = {};
  double total[K] = {};

  RPP_HD void flush() {
    for (int k = 0; k < K; ++k) {
      total[k] += horizontal_sum(lane[k]);
      lane[k] = Vector<T>{};
    }
  }

  template <class F>
  RPP_HD void walk(int64_t begin, int64_t end, const F& f) {  // f as in for_each_vector
    for (int64_t start = begin; start < end; start += kBlock) {
      for_each_vector<T>(start, std::min(start + kBlock, end), f);
      flush();
    }
  }
};

// f.operator()<estimator>(), chosen once for all tokens.
template <class F>
RPP_HD void with_estimator(int64_t estimator, const F& f) {
  switch (static_cast<Kl>(estimator)) {
    case Kl::none: return f.template operator()<Kl::none>();
    case Kl::k1: return f.template operator()<Kl::k1>();
    case Kl::k2: return f.template operator()<Kl::k2>();
    case Kl::k3: return f.template operator()<Kl::k3>();
    case Kl::abs: return f.template operator()<Kl::abs>();
  }
}
