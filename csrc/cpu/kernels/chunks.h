// As kernels/logps.h, for logits whose tokens are contiguous: lanes are tokens, and all that belongs to a token is in
// its lane. No include guard: see for_each_isa.h. Arguments: cpu/chunks.h.

// Rows of the vocabulary that are searched for their maximum and then, still in the L2 cache, summed; few enough to be
// summed in float.
constexpr int64_t kChunkBlock = 64;

// f(i, load) for every vector of tokens [i, i + lanes), where load(p) reads those of them that there are.
template <class T, class F>
RPP_HD void for_each_vector(int64_t tokens, const F& f) {
  int64_t i = 0;
  for (; i + lanes<T> <= tokens; i += lanes<T>) f(i, [](const T* p) __attribute__((always_inline)) { return load(p); });
  // Lanes without a token read 0, which no arithmetic trips over.
  if (const int64_t n = tokens - i; n > 0)
    f(i, [n](const T* p) __attribute__((always_inline)) { return load(p, n, T(0)); });
}

// f(row, std::integral_constant<int, R>) for all rows, R of them at a time while there are as many.
template <int R, class F>
RPP_HD void for_rows(int64_t begin, int64_t end, const F& f) {
  if constexpr (R > 1)
    for (; begin + R <= end; begin += R) f(begin, std::integral_constant<int, R>{});
  for (; begin < end; ++begin) f(begin, std::integral_constant<int, 1>{});
}

template <int R, class F>
RPP_HD void unrolled(const F& f) {  // f(0) ... f(R - 1)
  if constexpr (R > 1) unrolled<R - 1>(f);
  f(R - 1);
}

template <class V>
RPP_HD V or_0(V max) {  // what is -inf so far has no maximum to subtract; 0 keeps its terms at exp(-inf)
  return max == -num<V>(std::numeric_limits<double>::infinity()) ? V{} : max;
}

// Sums of exp((x - max) / temperature) become sums of exp((x - offset) / temperature). Where max was -inf they become
// 0, but for a NaN, which survives.
RPP_HD void rescale(vf64 max, vf64 offset, vf64 inverse_temperature, vf64& sum, vf64& weighted) {
  const vf64 shift = at_least((max - offset) * inverse_temperature, num<vf64>(ExpConstants<double>::lowest));
  const vf64 e = exponential_in_range(shift);
  weighted = (weighted + shift * sum) * e;
  sum *= e;
}

// The sums of one part of the vocabulary for one tile of tokens.
template <bool with_softcap, class T>
void sum_part(const ChunkSumArgs<T>& a, int64_t part, int64_t begin, int64_t tokens) {
  using V = Vector<T>;
  constexpr V kLowest = V{} - std::numeric_limits<T>::infinity();
  const auto softcap = softcap_of<V>(with_softcap ? a.softcap : 1);
  const int64_t ld = a.logits.ld, end = std::min(a.logits.vocab, (part + 1) * kChunkPart);
  T* max = a.max + part * a.stride + begin;
  double *sum = a.sum + part * a.stride + begin, *weighted = a.weighted + part * a.stride + begin;
  const T* inverse_temperature = a.inverse_temperature + begin;
  alignas(64) T raised[kChunkTile], offset[kChunkTile], s[kChunkTile], w[kChunkTile];

  for (int64_t i = 0; i < tokens; i += lanes<T>) store(max + i, kLowest);
  for (int64_t i = 0; i < tokens; i += lanes<double>) store(sum + i, vf64{}), store(weighted + i, vf64{});
  for (int64_t block = part * kChunkPart; block < end; block += kChunkBlock) {
    const T* x = a.logits.data + block * ld + begin;
    const int64_t rows = std::min(end - block, kChunkBlock);

    for (int64_t i = 0; i < tokens; i += lanes<T>) store(raised + i, kLowest);
    for_rows<8>(0, rows, [&](int64_t row, auto group) __attribute__((always_inline)) {
      for_each_vector<T>(tokens, [&](int64_t i, auto load_lanes) __attribute__((always_inline)) {
        V m = load(raised + i);
        unrolled<group>([&](int k) __attribute__((always_inline)) {
          const V v = load_lanes(x + (row + k) * ld + i);
          m = v > m ? v : m;  // passes over NaN, which the sum then keeps
        });
        store(raised + i, m);
      });
    });
    for (int64_t i = 0; i < tokens; i += lanes<T>) {
      V m = load(raised + i);
      if constexpr (with_softcap) m = softcapped(m, softcap).value;
      m = at_least(m, load(max + i));
      store(raised + i, m);
      store(offset + i, or_0(m));
      store(s + i, V{});
      store(w + i, V{});
    }

    for_rows<with_softcap ? 2 : 8>(0, rows, [&](int64_t row, auto group) __attribute__((always_inline)) {
      for_each_vector<T>(tokens, [&](int64_t i, auto load_lanes) __attribute__((always_inline)) {
        const V top = load(offset + i), rate = load(inverse_temperature + i);
        V terms = load(s + i), products = load(w + i);
        unrolled<group>([&](int k) __attribute__((always_inline)) {
          const T* p = x + (row + k) * ld + i;
          __builtin_prefetch(p + kChunkBlock * ld, 0, 2);  // the next block arrives while this one is summed
          V z = load_lanes(p);
          if constexpr (with_softcap) z = softcapped(z, softcap).value;
          const V t = at_least((z - top) * rate, num<V>(ExpConstants<T>::lowest));  // 0 * -inf never arises
          const V e = exponential_in_range(t);
          terms += e;
          products += e * t;
        });
        store(s + i, terms);
        store(w + i, products);
      });
    });
    for (int64_t i = 0; i < tokens; i += lanes<double>) {
      vf64 terms = load(sum + i), products = load(weighted + i);
      rescale(load_wide(max + i), load_wide(offset + i), load_wide(inverse_temperature + i), terms, products);
      store(sum + i, terms + load_wide(s + i));
      store(weighted + i, products + load_wide(w + i));
    }
    for (int64_t i = 0; i < tokens; i += lanes<T>) store(max + i, load(raised + i));
  }
}

template <class T>
void chunk_sums(const ChunkSumArgs<T>& a, int64_t begin, int64_t end) {  // tasks: the tiles of each part
  const int64_t tiles = (a.logits.tokens + kChunkTile - 1) / kChunkTile;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task / tiles, first = task % tiles * kChunkTile;
    const int64_t tokens = std::min(a.logits.tokens - first, kChunkTile);
    if (a.softcap > 0) sum_part<true>(a, part, first, tokens);
    else sum_part<false>(a, part, first, tokens);
  }
}

// Merges the parts, in their order.
template <class T>
void chunk_results(const ChunkSumArgs<T>& a, int64_t begin, int64_t end) {  // in vectors of kChunkRoom tokens
  for (int64_t i = begin * kChunkRoom; i < std::min(end * kChunkRoom, a.logits.tokens); i += lanes<double>) {
    vf64 max = -num<vf64>(std::numeric_limits<double>::infinity()), sum{}, weighted{};
    for (int64_t part = 0; part < a.parts; ++part) max = at_least(max, load_wide(a.max + part * a.stride + i));
    for (int64_t part = 0; part < a.parts; ++part) {
      const int64_t at = part * a.stride + i;
      vf64 terms = load(a.sum + at), products = load(a.weighted + at);
      rescale(load_wide(a.max + at), or_0(max), load_wide(a.inverse_temperature + i), terms, products);
      sum += terms;
      weighted += products;
    }
    for (int64_t lane = 0; lane < std::min(lanes<double>, a.logits.tokens - i); ++lane) {
      const int64_t token = i + lane;
      T target = a.logits.data[a.target_ids[token] * a.logits.ld + token];
      // The largest logit was capped in a vector: a last digit may differ, and no log-prob is above 0.
      if (a.softcap > 0) target = at_most(softcapped(target, softcap_of<T>(a.softcap)).value, T(max[lane]));
      const auto results = row_results<T>(max[lane], sum[lane], weighted[lane], target, a.temperature_of(token));
      a.logps[token] = results.logps;
      a.entropy[token] = results.entropy;
      a.lse[token] = results.lse;
      a.lse_rest[token] = results.lse_rest;
    }
  }
}

// ---- backward

template <class F, class T>
RPP_HD RowGradient<F> gradient_at(const ChunkGradArgs<T>& a, int64_t i) {
  const auto field = [&](ChunkField f) __attribute__((always_inline)) {
    const T* p = a.gradients + f * a.stride + i;
    if constexpr (std::is_same_v<F, T>) return *p;
    else return load(p);
  };
  return {field(kShift), field(kRest), field(kInverseTemperature), field(kWeight), field(kEntropyWeight)};
}

// Without a gradient through entropy its weight is 0: the kernel waits for memory, not for one more product.
template <bool with_softcap, class F>
RPP_HD F chunk_dlogit(F logit, RowGradient<F> g, Softcap<F> softcap) {
  if constexpr (!with_softcap) return dlogit<true>(logit, g);
  const auto z = softcapped(logit, softcap);
  return dlogit<true>(z.value, g) * z.slope;
}

template <class T>
void chunk_prepare(ChunkGradArgs<T>& a) {
  const auto at = [](const T* p, int64_t token) { return p ? p[token] : T(0); };
  a.num_vectors = 0;
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t token = a.row_of(i), source = token / lanes<T> * lanes<T>;
    if (a.rows) {
      if (a.num_vectors == 0 || a.vectors[a.num_vectors - 1].source != source) {
        a.vectors[a.num_vectors] = {source, i};
        for (int64_t k = 0; k < lanes<T>; ++k) a.index[a.num_vectors * lanes<T> + k] = 0;
        ++a.num_vectors;
      }
      a.index[(a.num_vectors - 1) * lanes<T> + i - a.vectors[a.num_vectors - 1].first] = token - source;
    }
    const T dlogps = at(a.dlogps, token), dentropy = at(a.dentropy, token), dlse = at(a.dlse, token);
    const auto g = row_gradient(double(a.lse[token]) + a.lse_rest[token], a.entropy[token], a.temperature_of(token),
                                dlogps, dentropy, dlse);
    T* out = a.gradients + i;
    out[kShift * a.stride] = g.shift;
    out[kRest * a.stride] = g.rest;
    out[kInverseTemperature * a.stride] = g.inverse_temperature;
    out[kWeight * a.stride] = g.weight;
    out[kEntropyWeight * a.stride] = g.entropy_weight;
    out[kWanted * a.stride] = dlogps != 0 || dentropy != 0 || dlse != 0;
    a.targets[i] = a.logits.data[a.target_ids[token] * a.logits.ld + token];  // before an in-place write
  }
  a.vectors[a.num_vectors] = {a.logits.tokens, a.count};
  for (int64_t i = a.count; i < a.stride; ++i)
    for (int64_t field = 0; field < kChunkFields; ++field) a.gradients[field * a.stride + i] = 0;
}

// R rows of the vocabulary, for the wanted tokens [first, first + tokens): x[k * x_ld + i] -> dx[k * dx_ld + i].
template <bool with_softcap, int R, class T>
RPP_HD void dlogits_rows(const ChunkGradArgs<T>& a, const T* x, int64_t x_ld, int64_t ahead, T* dx, int64_t dx_ld,
                         int64_t first, int64_t tokens) {
  using V = Vector<T>;
  const auto softcap = softcap_of<V>(with_softcap ? a.softcap : 1);
  const bool apart = a.dlogits != a.logits.data;
  const T* wanted = a.gradients + kWanted * a.stride + first;
  const auto at = [&](int64_t i, auto load_lanes, auto store_lanes) __attribute__((always_inline)) {
    const auto g = gradient_at<V>(a, first + i);
    const Mask<V> nonzero = load(wanted + i) != V{};
    V logits[R];  // all before the first store, for which a load of part of a vector behind it would wait
    unrolled<R>([&](int k) __attribute__((always_inline)) {
      logits[k] = load_lanes(x + k * x_ld + i);
      if (ahead) __builtin_prefetch(x + k * x_ld + ahead + i);
      if (apart) __builtin_prefetch(dx + (k + R) * dx_ld + i, 1);
    });
    unrolled<R>([&](int k) __attribute__((always_inline)) {
      const V d = chunk_dlogit<with_softcap>(logits[k], g, softcap);
      store_lanes(dx + k * dx_ld + i, nonzero ? d : V{});  // exactly zero, whatever the logits are
    });
  };
  int64_t i = 0;
  for (; i + lanes<T> <= tokens; i += lanes<T>)
    at(
        i, [](const T* p) __attribute__((always_inline)) { return load(p); },
        [](T* p, V v) __attribute__((always_inline)) { store(p, v); });
  if (const int64_t n = tokens - i; n > 0)
    at(
        i, [n](const T* p) __attribute__((always_inline)) { return load(p, n, T(0)); },
        [n](T* p, V v) __attribute__((always_inline)) { store(p, v, n); });
}

template <bool with_softcap, class T>
void dlogits_block(const ChunkGradArgs<T>& a, int64_t begin, int64_t end) {
  using V = Vector<T>;
  constexpr int R = with_softcap ? 1 : 4;  // with softcap it waits for arithmetic
  const int64_t ld = a.logits.ld, dld = a.dlogits_ld;
  if (!a.rows) {
    for (int64_t first = 0; first < a.count; first += kChunkTile)
      for_rows<R>(begin, end, [&](int64_t row, auto group) __attribute__((always_inline)) {
        dlogits_rows<with_softcap, group>(a, a.logits.data + row * ld + first, ld, R * ld,
                                          a.dlogits + row * dld + first, dld, first,
                                          std::min(a.count - first, kChunkTile));
      });
    return;
  }
  // Tokens move to the left, so that in place nothing is overwritten before it is read.
  alignas(64) T packed[R][kChunkTile + lanes<T>];
  constexpr int64_t kVectors = kChunkTile / lanes<T>;
  for (int64_t v0 = 0; v0 < a.num_vectors; v0 += kVectors) {
    const int64_t v1 = std::min(v0 + kVectors, a.num_vectors), first = a.vectors[v0].first;
    for_rows<R>(begin, end, [&](int64_t row, auto group) __attribute__((always_inline)) {
      const T* x = a.logits.data + row * ld;
      for (int64_t v = v0; v < v1; ++v) {
        const auto [source, to] = a.vectors[v];
        const auto index = load_as<Mask<V>>(a.index + v * lanes<T>);
        const int64_t left = a.logits.tokens - source;
        unrolled<group>([&](int k) __attribute__((always_inline)) {
          const T* p = x + k * ld + source;
          __builtin_prefetch(p + R * ld);
          const V all = left < lanes<T> ? load(p, left, T(0)) : load(p);
          store(packed[k] + (to - first), __builtin_shuffle(all, index));  // the next vector overwrites what is idle
        });
      }
      dlogits_rows<with_softcap, group>(a, packed[0], kChunkTile + lanes<T>, 0, a.dlogits + row * dld + first, dld,
                                        first, a.vectors[v1].first - first);
    });
  }
}

template <bool with_softcap, class T>
void dlogits_targets(const ChunkGradArgs<T>& a) {
  const auto softcap = softcap_of<T>(with_softcap ? a.softcap : 1);
  for (int64_t i = 0; i < a.count; ++i) {
    if (a.gradients[kWanted * a.stride + i] == 0) continue;
    const int64_t token = a.row_of(i);
    const auto g = gradient_at<T>(a, i);
    const auto z = with_softcap ? softcapped(a.targets[i], softcap) : Capped<T>{a.targets[i], 1};
    const T dtarget = (a.dlogps ? a.dlogps[token] : T(0)) * g.inverse_temperature;
    a.dlogits[a.target_ids[token] * a.dlogits_ld + i] = (dlogit<true>(z.value, g) + dtarget) * z.slope;
  }
}

template <class T>
void chunk_bwd(const ChunkGradArgs<T>& a, int64_t begin, int64_t end) {  // rows of the vocabulary
  for (; begin < end; begin += kChunkBlock) {
    const int64_t stop = std::min(begin + kChunkBlock, end);
    a.softcap > 0 ? dlogits_block<true>(a, begin, stop) : dlogits_block<false>(a, begin, stop);
  }
}

// The targets' own elements, after all of chunk_bwd: in place, another token may have lain there.
template <class T>
void chunk_targets(const ChunkGradArgs<T>& a) {
  a.softcap > 0 ? dlogits_targets<true>(a) : dlogits_targets<false>(a);
}
