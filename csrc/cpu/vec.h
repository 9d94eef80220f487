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

// ---- lanes that change their width. GCC 12 takes __builtin_convertvector of narrow lanes apart, one at a time, so
// where there is one instruction for it, it is named.

#if RPP_VECTOR_BYTES == 64
RPP_HD vu32 widen(vu16 v) { return (vu32)_mm512_cvtepu16_epi32((__m256i)v); }
RPP_HD vf32 widen(vf16 v) { return _mm512_cvtph_ps((__m256i)v); }
RPP_HD vi32 widen(Traits<vf32>::Bytes v) { return (vi32)_mm512_cvtepu8_epi32((__m128i)v); }
RPP_HD vu16 narrow(vu32 v) { return (vu16)_mm512_cvtepi32_epi16((__m512i)v); }
RPP_HD vf16 narrow(vf32 v) { return (vf16)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#elif RPP_VECTOR_BYTES == 32
RPP_HD vu32 widen(vu16 v) { return (vu32)_mm256_cvtepu16_epi32((__m128i)v); }
RPP_HD vf32 widen(vf16 v) { return _mm256_cvtph_ps((__m128i)v); }
RPP_HD vi32 widen(Traits<vf32>::Bytes v) { return (vi32)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)v)); }
RPP_HD vu16 narrow(vu32 v) {                                           // of lanes below 2^16
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);  // in each half of the register
  return (vu16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
RPP_HD vf16 narrow(vf32 v) { return (vf16)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#else
RPP_HD vu32 widen(vu16 v) { return __builtin_convertvector(v, vu32); }
RPP_HD vf32 widen(vf16 v) { return __builtin_convertvector(v, vf32); }
RPP_HD vi32 widen(Traits<vf32>::Bytes v) { return __builtin_convertvector(v, vi32); }
RPP_HD vu16 narrow(vu32 v) { return __builtin_convertvector(v, vu16); }
RPP_HD vf16 narrow(vf32 v) { return __builtin_convertvector(v, vf16); }
#endif
RPP_HD vi64 widen(Traits<vf64>::Bytes v) { return __builtin_convertvector(v, vi64); }

// ---- memory: any storage type in and out, computed in float or double

template <class V>
RPP_HD V load_as(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
RPP_HD vf32 load(const float* p) { return load_as<vf32>(p); }
RPP_HD vf64 load(const double* p) { return load_as<vf64>(p); }
RPP_HD vf32 load(const bf16* p) { return (vf32)(widen(load_as<vu16>(p)) << 16); }
RPP_HD vf32 load(const f16* p) { return widen(load_as<vf16>(p)); }

RPP_HD void store(float* p, vf32 v) { __builtin_memcpy(p, &v, sizeof v); }
RPP_HD void store(double* p, vf64 v) { __builtin_memcpy(p, &v, sizeof v); }
RPP_HD void store(bf16* p, vf32 v) {  // round to nearest even; a NaN keeps its top bits and stays one
  const vu32 bits = (vu32)v;
  const vu32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu16 half = narrow(v == v ? rounded : (bits >> 16) | 0x40u);
  __builtin_memcpy(p, &half, sizeof half);
}
RPP_HD void store(f16* p, vf32 v) {
  const vf16 half = narrow(v);
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
#if RPP_VECTOR_BYTES == 64
RPP_HD vf32 load(const float* p, int64_t n, float rest) {
  return _mm512_mask_loadu_ps(_mm512_set1_ps(rest), static_cast<__mmask16>((1u << n) - 1), p);
}
RPP_HD vf64 load(const double* p, int64_t n, double rest) {
  return _mm512_mask_loadu_pd(_mm512_set1_pd(rest), static_cast<__mmask8>((1u << n) - 1), p);
}
RPP_HD void store(float* p, vf32 v, int64_t n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v); }
RPP_HD void store(double* p, vf64 v, int64_t n) { _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), v); }
#elif RPP_VECTOR_BYTES == 32
RPP_HD vi32 first_lanes(vf32, int64_t n) { return vi32{0, 1, 2, 3, 4, 5, 6, 7} < vi32{} + static_cast<int32_t>(n); }
RPP_HD vi64 first_lanes(vf64, int64_t n) { return vi64{0, 1, 2, 3} < vi64{} + n; }
RPP_HD vf32 load(const float* p, int64_t n, float rest) {
  const vi32 first = first_lanes(vf32{}, n);
  return first ? (vf32)_mm256_maskload_ps(p, (__m256i)first) : vf32{} + rest;
}
RPP_HD vf64 load(const double* p, int64_t n, double rest) {
  const vi64 first = first_lanes(vf64{}, n);
  return first ? (vf64)_mm256_maskload_pd(p, (__m256i)first) : vf64{} + rest;
}
RPP_HD void store(float* p, vf32 v, int64_t n) { _mm256_maskstore_ps(p, (__m256i)first_lanes(v, n), v); }
RPP_HD void store(double* p, vf64 v, int64_t n) { _mm256_maskstore_pd(p, (__m256i)first_lanes(v, n), v); }
#endif

// A vector of doubles, of numbers stored as float or double.
RPP_HD vf64 load_wide(const double* p) { return load(p); }
RPP_HD vf64 load_wide(const float* p) {
#if RPP_VECTOR_BYTES == 64
  return _mm512_cvtps_pd(_mm256_loadu_ps(p));
#elif RPP_VECTOR_BYTES == 32
  return _mm256_cvtps_pd(_mm_loadu_ps(p));
#else
  return vf64{p[0], p[1]};
#endif
}

// Two and two lanes of v added up in double, for sums whose terms cancel.
RPP_HD vf64 wide(vf64 v) { return v; }
RPP_HD vf64 wide(vf32 v) {
  float lane[sizeof(vf32) / sizeof(float)];
  store(lane, v);
  return load_wide(lane) + load_wide(lane + sizeof(vf64) / sizeof(double));
}

// The mask of the next lanes; without a mask every token counts.
template <class V>
RPP_HD Mask<V> load_mask(const bool* p, int64_t n) {
  typename Traits<V>::Bytes bytes{};
  if (!p) __builtin_memset(&bytes, 1, n);
  else if (n == int64_t{sizeof bytes}) __builtin_memcpy(&bytes, p, sizeof bytes);
  else __builtin_memcpy(&bytes, p, n);
  return widen(bytes) != Mask<V>{};
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
