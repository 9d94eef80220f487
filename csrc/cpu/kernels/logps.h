// Log-prob, entropy and log-sum-exp of rows of logits, and their gradient. One read of the logits forward; one read and
// one write backward. No include guard: see for_each_isa.h. Arguments: cpu/logps.h.

template <class S, bool with_squares>
struct RowSum {
  // sum = sum_j exp(t_j), weighted = sum_j t_j exp(t_j), squares = sum_j exp(t_j)^2, t_j = (x_j - max) / temperature:
  // float lanes over one block of the row, which adds few enough terms; double across blocks.
  using T = Compute<S>;
  T max = -std::numeric_limits<T>::infinity();
  double sum = 0, weighted = 0, squares = 0;

  // Blocks stay in the L1 cache between the search for their maximum and the exponentials.
  static constexpr int64_t kBlock = 2048;

  RPP_HD void add_block(const S* x, int64_t n, T inverse_temperature) {
    using V = Vector<T>;
    constexpr int64_t N = lanes<T>;
    raise_max(x, n, inverse_temperature);
    // A row that is -inf so far has no maximum to subtract; 0 keeps its terms at exp(-inf).
    const V offset = V{} + (max == -std::numeric_limits<T>::infinity() ? T(0) : max);
    V s0{}, s1{}, w0{}, w1{}, q0 = V{} + kNothing, q1 = q0;
    int64_t i = 0;
    for (; i + 2 * N <= n; i += 2 * N) {
      __builtin_prefetch(x + i + kBlock);  // the next block arrives while this one is summed
      __builtin_prefetch(x + i + N + kBlock);
      add(load(x + i), offset, inverse_temperature, s0, w0, q0);
      add(load(x + i + N), offset, inverse_temperature, s1, w1, q1);
    }
    for (; i < n; i += N) {
      const V tail = n - i < N ? load(x + i, n - i, lowest()) : load(x + i);
      add(tail, offset, inverse_temperature, s0, w0, q0);
    }
    sum += horizontal_sum(s0 + s1);
    weighted += horizontal_sum(w0 + w1);
    if constexpr (with_squares) squares += horizontal_sum(q0 + q1);
  }

 private:
  // Where lanes of squares start: 0 beside the square of the maximum, 1, yet so large that no square added to it leaves
  // a subnormal number, of 100 times the cost of others.
  static constexpr T kNothing = T(1e-30);

  static RPP_HD S lowest() {  // -inf
    if constexpr (std::is_same_v<S, bf16>) return bf16{0xff80};
    else return static_cast<S>(-std::numeric_limits<T>::infinity());
  }

  template <class V>
  static RPP_HD void add(V x, V offset, T inverse_temperature, V& sum, V& weighted, V& squares) {
    const V t = at_least((x - offset) * inverse_temperature, num<V>(ExpConstants<T>::lowest));  // 0 * -inf never arises
    const V e = exponential_in_range(t);
    sum += e;
    weighted += e * t;
    if constexpr (with_squares) squares += e * e;
  }

  RPP_HD void raise_max(const S* x, int64_t n, T inverse_temperature) {
    using V = Vector<T>;
    constexpr int64_t N = lanes<T>;
    const V start = V{} + max;
    V m[4] = {start, start, start, start};
    int64_t i = 0;
    for (; i + 4 * N <= n; i += 4 * N) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const V v = load(x + i + k * N);
        m[k] = v > m[k] ? v : m[k];  // passes over NaN, which the sum then keeps
      }
    }
    for (; i < n; i += N) {
      const V v = n - i < N ? load(x + i, n - i, lowest()) : load(x + i);
      m[0] = v > m[0] ? v : m[0];
    }
    m[0] = m[0] > m[1] ? m[0] : m[1];
    m[2] = m[2] > m[3] ? m[2] : m[3];
    const T raised = horizontal_max(m[0] > m[2] ? m[0] : m[2]);
    if (raised == max) return;
    if (max == -std::numeric_limits<T>::infinity()) {
      sum *= 0;  // nothing but -inf so far, or a NaN, which survives
      weighted *= 0;
      if constexpr (with_squares) squares *= 0;
    } else {
      const double shift = (double(max) - double(raised)) * inverse_temperature;
      const double scale = std::exp(shift);
      weighted = (weighted + shift * sum) * scale;
      sum *= scale;
      if constexpr (with_squares) squares *= scale * scale;
    }
    max = raised;
  }
};

template <bool with_squares, class S>
void logps_fwd_each_row(const LogpsArgs<S>& a, int64_t begin, int64_t end) {
  using T = Compute<S>;
  for (int64_t row = begin; row < end; ++row) {
    if (a.mask && !a.mask[row]) {
      a.logps[row] = a.entropy[row] = a.lse[row] = a.lse_rest[row] = 0;
      if constexpr (with_squares) a.sum_squares[row] = 0;
      continue;
    }
    const S* x = a.logits.row(row);
    const T inverse_temperature = static_cast<T>(1 / a.temperature_of(row));
    RowSum<S, with_squares> r;
    for (int64_t i = 0; i < a.logits.vocab; i += r.kBlock)
      r.add_block(x + i, std::min(a.logits.vocab - i, r.kBlock), inverse_temperature);
    const auto results =
        row_results<T>(r.max, r.sum, r.weighted, to_double(x[a.target_ids[row]]), a.temperature_of(row));
    a.logps[row] = results.logps;
    a.entropy[row] = results.entropy;
    a.lse[row] = results.lse;
    a.lse_rest[row] = results.lse_rest;
    if constexpr (with_squares) a.sum_squares[row] = row_sum_squares<T>(r.max, r.sum, r.squares);
  }
}

template <class S>
void logps_fwd_rows(const LogpsArgs<S>& a, int64_t begin, int64_t end) {
  if (a.sum_squares) logps_fwd_each_row<true>(a, begin, end);
  else logps_fwd_each_row<false>(a, begin, end);
}

template <bool with_entropy, class S>
RPP_HD void dlogits_row(const S* x, S* dx, int64_t n, RowGradient<Compute<S>> g) {
  using V = Vector<Compute<S>>;
  constexpr int64_t N = lanes<Compute<S>>;
  const RowGradient<V> gv = {V{} + g.shift, V{} + g.rest, V{} + g.inverse_temperature, V{} + g.weight,
                             V{} + g.entropy_weight};
  // What the hardware fetches by itself comes too late, most of all for bf16.
  constexpr int64_t kAhead = 2048 / sizeof(S);
  int64_t i = 0;
  for (; i + 2 * N <= n; i += 2 * N) {
    __builtin_prefetch(x + i + kAhead);
    if constexpr (2 * N * sizeof(S) > 64) __builtin_prefetch(x + i + N + kAhead);
    const V a = dlogit<with_entropy>(load(x + i), gv);
    const V b = dlogit<with_entropy>(load(x + i + N), gv);
    store(dx + i, a);
    store(dx + i + N, b);
  }
  for (; i < n; i += N) {
    const int64_t k = std::min(n - i, N);
    store(dx + i, dlogit<with_entropy>(load(x + i, k, S{}), gv), k);
  }
}

template <class S>
void logps_bwd_rows(const LogpsGradArgs<S>& a, int64_t begin, int64_t end) {
  using T = Compute<S>;
  const auto at = [](const T* p, int64_t row) { return p ? p[row] : T(0); };
  for (int64_t row = begin; row < end; ++row) {
    S* dx = a.dlogits + row * a.logits.vocab;
    const T dlogps = at(a.dlogps, row), dentropy = at(a.dentropy, row), dlse = at(a.dlse, row);
    if ((a.mask && !a.mask[row]) || (dlogps == 0 && dentropy == 0 && dlse == 0)) {
      std::memset(static_cast<void*>(dx), 0, a.logits.vocab * sizeof(S));  // exactly zero, and the logits are not read
      continue;
    }
    const S* x = a.logits.row(row);
    const auto g = row_gradient(double(a.lse[row]) + a.lse_rest[row], a.entropy[row], a.temperature_of(row), dlogps,
                                dentropy, dlse);
    const int64_t y = a.target_ids[row];
    const T target = to_double(x[y]);  // before an in-place write
    if (dentropy == 0) dlogits_row<false>(x, dx, a.logits.vocab, g);
    else dlogits_row<true>(x, dx, a.logits.vocab, g);
    const T dtarget = dentropy == 0 ? dlogit<false>(target, g) : dlogit<true>(target, g);
    from_compute(dtarget + dlogps * g.inverse_temperature, dx[y]);
  }
}
