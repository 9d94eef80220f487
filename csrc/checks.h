// What a kernel needs to be true before it touches memory. The messages a user should meet are raised by
// rpp_kernels.ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace rpp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline void check_contiguous(const Tensor& x, int64_t numel, const char* name) {
  STD_TORCH_CHECK(x.is_contiguous() && x.numel() == numel, name, ": want ", numel, " contiguous elements, got ",
                  x.numel());
}

template <class T>
constexpr ScalarType scalar_type() {
  if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  else if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  else if constexpr (std::is_same_v<T, int64_t>) return ScalarType::Long;
  else if constexpr (std::is_same_v<T, bool>) return ScalarType::Bool;
}

// The data of a contiguous tensor of `numel` elements of type T.
template <class T>
const T* data_of(const Tensor& x, int64_t numel, const char* name) {
  check_contiguous(x, numel, name);
  STD_TORCH_CHECK(x.scalar_type() == scalar_type<T>(), name, ": wrong dtype");
  return static_cast<const T*>(x.data_ptr());
}
template <class T>
const T* data_of(const MaybeTensor& x, int64_t numel, const char* name) {
  return x.has_value() ? data_of<T>(*x, numel, name) : nullptr;
}

template <class T>
T* new_like(const Tensor& like, std::initializer_list<int64_t> sizes, Tensor& out) {
  out = torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, scalar_type<T>());
  return static_cast<T*>(out.data_ptr());
}

// Calls f with a null pointer of the floating type of x: the token-level ops work in float or double.
template <class F>
auto for_float_type(const Tensor& x, F f) {
  if (x.scalar_type() == ScalarType::Double) return f(static_cast<double*>(nullptr));
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "want float32 or float64");
  return f(static_cast<float*>(nullptr));
}

// cu_seqlens: int64, from 0, never falling, up to the number of tokens.
inline const int64_t* sequences_of(const Tensor& cu_seqlens, int64_t tokens) {
  const int64_t* cu = data_of<int64_t>(cu_seqlens, cu_seqlens.numel(), "cu_seqlens");
  const int64_t count = cu_seqlens.numel();
  STD_TORCH_CHECK(count >= 1 && cu[0] == 0 && cu[count - 1] == tokens, "cu_seqlens must run from 0 to ", tokens);
  for (int64_t i = 1; i < count; ++i) STD_TORCH_CHECK(cu[i] >= cu[i - 1], "cu_seqlens[", i, "] falls");
  return cu;
}

}  // namespace rpp
