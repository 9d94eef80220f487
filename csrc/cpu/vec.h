// Vectors of RPP_VECTOR_BYTES bytes, in GCC's portable notation, and what formulas.h asks of its number types.
// No include guard: see for_each_isa.h.

using vf32 = float __attribute__((vector_size(RPP_VECTOR_BYTES)));
using vf64 = double __attribute__((vector_size(RPP_VECTOR_BYTES)));
using vi32 = int32_t __attribute__((vector_size(RPP_VECTOR_BYTES)));
using vu32 = uint32_t __attribute__((vector_size(RPP_VECTOR_BYTES)));
using vi64 = int64_t __attribute__((vector_size(RPP_VECTOR_BYTES)));
using vu64 = uint64_t __attribute__((vector_size(RPP_VECTOR_BYTES)));
using vu16 = uint16_t __attribute__((vector_size(RPP_VECTOR_BYTES / 2)));
using vf16 = f16 __attribute__((vector_size(RPP_VECTOR_BYTES / 2)));

template <class F>
struct Traits {
  using Element = F;
};
template <>
struct Traits<vf32> {
  using Element = float;
  using Bytes = uint8_t __attribute__((vector_size(RPP_VECTOR_BYTES / 4)));  // one for each lane
};
template <>
struct Traits<vf64> {
  using Element = double;
  using Bytes = uint8_t __attribute__((vector_size(RPP_VECTOR_BYTES / 8)));
};

template <class F>
using Mask = decltype(F{} < F{});

template <class Element>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = vf32;
};
template <>
struct VectorOf<double> {
  using type = vf64;
};
template <class Element>
using Vector = typename VectorOf<Element>::type;
template <class Element>
constexpr int64_t lanes = RPP_VECTOR_BYTES / sizeof(Element);

// 2^n from `shifted = n + round_magic`, whose low mantissa bits hold n.
RPP_HD float power_of_two(float shifted) {
  return std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + (127u << 23));
}
RPP_HD double power_of_two(double shifted) {
  return std::bit_cast<double>((std::bit_cast<uint64_t>(shifted) << 52) + (1023ull << 52));
}
RPP_HD vf32 power_of_two(vf32 shifted) { return (vf32)(((vu32)shifted << 23) + (127u << 23)); }
RPP_HD vf64 power_of_two(vf64 shifted) { return (vf64)(((vu64)shifted << 52) + (1023ull << 52)); }

// ---- memory: any storage type in and out, computed in float or double

template <class V>
RPP_HD V load_as(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
RPP_HD vf32 load(const float* p) { return load_as<vf32>(p); }
RPP_HD vf64 load(const double* p) { return load_as<vf64>(p); }
RPP_HD vf32 load(const bf16* p) { return (vf32)(__builtin_convertvector(load_as<vu16>(p), vu32) << 16); }
RPP_HD vf32 load(const f16* p) { return __builtin_convertvector(load_as<vf16>(p), vf32); }

RPP_HD void store(float* p, vf32 v) { __builtin_memcpy(p, &v, sizeof v); }
RPP_HD void store(double* p, vf64 v) { __builtin_memcpy(p, &v, sizeof v); }
RPP_HD void store(bf16* p, vf32 v) {  // round to nearest even; a NaN keeps its top bits and stays one
  const vu32 bits = (vu32)v;
  const vu32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu16 half = __builtin_convertvector(v == v ? rounded : (bits >> 16) | 0x40u, vu16);
  __builtin_memcpy(p, &half, sizeof half);
}
RPP_HD void store(f16* p, vf32 v) {
  const vf16 half = __builtin_convertvector(v, vf16);
  __builtin_memcpy(p, &half, sizeof half);
}

// The first n lanes only; the others read as `rest`, or are not written.
template <class S, class Element = Compute<S>>
RPP_HD Vector<Element> load(const S* p, int64_t n, S rest) {
  S buffer[lanes<Element>];
  for (auto& x : buffer) x = rest;
  __builtin_memcpy(buffer, p, n * sizeof(S));
  return load(buffer);
}
template <class S, class V>
RPP_HD void store(S* p, V v, int64_t n) {
  S buffer[lanes<Compute<S>>];
  store(buffer, v);
  __builtin_memcpy(p, buffer, n * sizeof(S));
}

// The mask of the next lanes; without a mask every token counts.
template <class V>
RPP_HD Mask<V> load_mask(const bool* p, int64_t n) {
  typename Traits<V>::Bytes bytes{};
  if (!p) __builtin_memset(&bytes, 1, n);
  else if (n == int64_t{sizeof bytes}) __builtin_memcpy(&bytes, p, sizeof bytes);
  else __builtin_memcpy(&bytes, p, n);
  return __builtin_convertvector(bytes, Mask<V>) != Mask<V>{};
}

template <class V>
RPP_HD double horizontal_sum(V v) {
  double sum = 0;
  for (int64_t i = 0; i < lanes<typename Traits<V>::Element>; ++i) sum += v[i];
  return sum;
}

template <class V>
RPP_HD auto horizontal_max(V v) {
  auto m = v[0];
  for (int64_t i = 1; i < lanes<typename Traits<V>::Element>; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
