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
