// Helpers of every compiled backend for tensors: they end where the kernels begin, with pointers and sizes.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "check.h"
#include "dtypes.h"

namespace rana {

// A string as an op takes it. As std::string, torch 2.13 hands over a copy that nobody frees.
struct Text {
  std::string value;
};

// A small argument (input, bias, threshold), made contiguous if it is not. Calls of torch that would do nothing are
// skipped: during decode their code is no longer in the caches, and a cold call costs 5 to 10 µs.
template <class T>
struct Packed {
  Tensor tensor;
  const T* data;

  Packed(const Tensor& t)
      : tensor(t.is_contiguous() ? t : torch::stable::contiguous(t)),
        data(static_cast<const T*>(tensor.const_data_ptr())) {}
};

template <class T>
std::optional<Packed<T>> packed(const OptionalTensor& t) {
  return t ? std::optional<Packed<T>>(*t) : std::nullopt;
}

template <class T>
const T* data_of(const std::optional<Packed<T>>& t) {
  return t ? t->data : nullptr;
}

inline int64_t tokens_of(const Tensor& t) {
  int64_t tokens = 1;
  for (int64_t d = 0; d + 1 < t.dim(); d++) tokens *= t.size(d);
  return tokens;
}

// An uninitialised, contiguous [..., columns] for an input [..., size]. torch::stable::new_empty would make cold calls
// (see Packed).
inline Tensor empty_output(const Tensor& input, int64_t columns) {
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end()), strides(sizes.size(), 1);
  sizes.back() = columns;
  for (size_t d = sizes.size() - 1; d > 0; d--) strides[d - 1] = strides[d] * std::max<int64_t>(1, sizes[d]);
  const auto ask = [&](auto get) {
    int32_t answer;
    TORCH_ERROR_CODE_CHECK(get(input.get(), &answer));
    return answer;
  };
  AtenTensorHandle y;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), ask(aoti_torch_get_dtype),
                                                  ask(aoti_torch_get_device_type), ask(aoti_torch_get_device_index),
                                                  &y));
  return Tensor(y);
}

// Calls an op of torch. `stack` holds the arguments before the call and the result after it.
inline Tensor call(const char* name, const char* overload, StableIValue* stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Returns x weightᵀ + bias, computed by torch.
inline Tensor torch_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  return call("aten::linear", "", stack.data());
}

// The first of the `ranks` values of h that belongs to gate. Gate always reads the last ones: either they follow those
// of up, or both read the same values.
inline int64_t first_gate_rank(int64_t ranks, const OptionalTensor& gate_rows) {
  return gate_rows ? ranks - gate_rows->size(0) : 0;
}

}  // namespace rana

template <>
struct torch::stable::detail::ToImpl<rana::Text> {
  static rana::Text call(StableIValue value, uint64_t, bool) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    size_t length;
    const char* data;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    rana::Text text{std::string(data, length)};
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

// The names that the sources of the ops use without rana::.
namespace {

using rana::data_of;
using rana::empty_output;
using rana::first_gate_rank;
using rana::last_size;
using rana::OptionalTensor;
using rana::Packed;
using rana::packed;
using rana::ScalarType;
using rana::Tensor;
using rana::Text;
using rana::tokens_of;

// Calls f with a value of the element type of `dtype`, which Check has found to be one of these three.
template <class F>
void for_dtype(ScalarType dtype, F f) {
  if (dtype == ScalarType::Float) f(float{});
  else if (dtype == ScalarType::BFloat16) f(bfloat16{});
  else f(half{});
}

}  // namespace
