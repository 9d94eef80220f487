// A row of logits, walked by the threads of a block: what logps.cu reads twice and chunk_policy.cu once.
#pragma once

#include "cuda/sums.h"

namespace rpp::cuda {

constexpr int kRowThreads = 256;
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

RPP_HD double power_of_2(double x) { return exp2(x); }

// The least power of two that is a normal number, for 0 * -inf never to arise.
template <class T>
constexpr T kLowestPower = std::is_same_v<T, float> ? -126 : -1022;

// Of the logits x_j that a thread has seen: with t_j = (x_j - top) log2(e) / temperature the sums of 2^t_j, t_j 2^t_j
// and 4^t_j.
template <class T, bool with_squares>
struct RowTerms {
  T top = -std::numeric_limits<T>::infinity(), sum = 0, weighted = 0, squares = 0;

  static __device__ __forceinline__ T or_0(T top) { return top == -std::numeric_limits<T>::infinity() ? T(0) : top; }

  // What the sums are about becomes `offset`.
  __device__ __forceinline__ void move(T offset, T rate) {
    const T d = at_least((top - offset) * rate, kLowestPower<T>), scale = power_of_2(d);
    weighted = (weighted + sum * d) * scale;
    sum *= scale;
    if constexpr (with_squares) squares *= scale * scale;
  }

  template <int N>
  __device__ __forceinline__ void add(const T (&x)[N], T rate) {
    T raised = top;
#pragma unroll
    for (int i = 0; i < N; ++i) raised = x[i] > raised ? x[i] : raised;  // passes over NaN, which the sum then keeps
    const T offset = or_0(raised);
    move(offset, rate);
    top = raised;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const T t = (x[i] - offset) * rate, power = power_of_2(t);
      sum += power;
      weighted += power * at_least(t, kLowestPower<T>);  // 0 for a logit of -inf
      if constexpr (with_squares) squares += power * power;
    }
  }
};

// The sums of many threads or blocks about one maximum.
struct RowSums {
  double top, sum, weighted, squares;
};

struct RowShared {
  SumsInBlock<1> top;
  SumsInBlock<3> sums;
};

// In all threads.
template <class T, bool with_squares>
__device__ __forceinline__ RowSums merged_in_block(RowTerms<T, with_squares> terms, T rate, RowShared& shared) {
  const T top = block_max(terms.top, shared.top);
  terms.move(terms.or_0(top), rate);
  double sums[3] = {terms.sum, terms.weighted, terms.squares};
  block_sum(sums, shared.sums);
  return {top, sums[0], sums[1], sums[2]};
}

__device__ __forceinline__ RowSums merged(RowSums a, RowSums b, double rate) {
  const double top = b.top > a.top ? b.top : a.top, offset = RowTerms<double, true>::or_0(top);
  RowTerms<double, true> x{a.top, a.sum, a.weighted, a.squares}, y{b.top, b.sum, b.weighted, b.squares};
  x.move(offset, rate), y.move(offset, rate);
  return {top, x.sum + y.sum, x.weighted + y.weighted, x.squares + y.squares};
}

// What the results are of; the target's logit is that of the row, or a NaN for an id outside of it.
template <class T>
__device__ __forceinline__ RowResults<T> results_of(RowSums sums, T target, double temperature) {
  // Capped twice, it may differ in a digit.
  const double logit = target > sums.top ? sums.top : static_cast<double>(target);
  return row_results<T>(sums.top, sums.sum, sums.weighted * kLn2, logit, temperature);
}

template <bool with_softcap, class T>
__device__ __forceinline__ T capped(T x, Softcap<T> cap) {
  if constexpr (with_softcap) return softcapped(x, cap).value;
  else return x;
}

template <class S, bool with_softcap>
__device__ __forceinline__ Compute<S> target_logit(const S* row, int64_t id, int64_t vocab, Softcap<Compute<S>> cap) {
  const bool known = id >= 0 && id < vocab;  // of another there is no access beyond the row
  return known ? capped<with_softcap>(widened(row[id]), cap) : std::numeric_limits<Compute<S>>::quiet_NaN();
}

// each(column, x, n): x of n logits from `column` on, n == N unless the row ends there. `U` vectors of a thread are on
// their way at a time.
template <int N, int U, class S, class F>
__device__ __forceinline__ void for_columns(const S* row, Range columns, bool aligned, const F& each) {
  const int64_t step = int64_t{kRowThreads} * U * N;
  int64_t begin = columns.begin;
  if (aligned)
    for (; begin + step <= columns.end; begin += step) {
      Loaded<S, N> loaded[U];
#pragma unroll
      for (int k = 0; k < U; ++k) loaded[k].load(row + column_of(begin, threadIdx.x, kRowThreads, k, N));
#pragma unroll
      for (int k = 0; k < U; ++k) {
        Compute<S> x[N];
        loaded[k].widen(x);
        each(column_of(begin, threadIdx.x, kRowThreads, k, N), x, N);
      }
    }
  for (int64_t column = column_of(begin, threadIdx.x, kRowThreads, 0, N); column < columns.end;
       column += int64_t{kRowThreads} * N) {
    const int n = static_cast<int>(least(N, columns.end - column));
    Compute<S> x[N];
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = i < n ? widened(row[column + i]) : -std::numeric_limits<Compute<S>>::infinity();
    each(column, x, n);
  }
}

// dlogits of x, for the gradient g; `own` is the place of the target among them, or outside of them.
template <bool with_softcap, int N, class T>
__device__ __forceinline__ void dlogits_of(T (&x)[N], RowGradient<T> g, T dlogps, int64_t own, Softcap<T> cap) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    Capped<T> z{x[i], T(1)};
    if constexpr (with_softcap) z = softcapped(x[i], cap);
    T d = dlogit<true>(z.value, g);
    if (i == own) d += dlogps * g.inverse_temperature;
    x[i] = d * z.slope;
  }
}

// ---- the host's side: f with null pointers of the storage types of logits and of their gradient.
template <class F>
auto for_storage_types(const Tensor& logits, ScalarType gradient, F f) {
  const auto storage = logits.scalar_type();
  if (storage == ScalarType::Float && gradient == ScalarType::BFloat16)
    return f(static_cast<float*>(nullptr), static_cast<bf16*>(nullptr));
  if (storage == ScalarType::Float && gradient == ScalarType::Half)
    return f(static_cast<float*>(nullptr), static_cast<f16*>(nullptr));
  STD_TORCH_CHECK(storage == gradient, "dlogits: want the dtype of logits, or a half beside float32");
  switch (storage) {
    case ScalarType::Float: return f(static_cast<float*>(nullptr), static_cast<float*>(nullptr));
    case ScalarType::Double: return f(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
    case ScalarType::BFloat16: return f(static_cast<bf16*>(nullptr), static_cast<bf16*>(nullptr));
    case ScalarType::Half: return f(static_cast<f16*>(nullptr), static_cast<f16*>(nullptr));
    default: STD_TORCH_CHECK(false, "logits: want float32, float64, bfloat16 or float16");
  }
}

}  // namespace rpp::cuda
