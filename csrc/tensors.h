// What every compiled backend does with tensors before its kernels see pointers and sizes.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <vector>

#include "check.h"

namespace rana {

// A small argument (input, bias, threshold), made contiguous if it is not. Torch's ops are called only where they
// have something to do: decode finds their code gone from the caches, at 5 to 10 µs a call.
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

// [..., columns] for an input [..., size], contiguous. Not torch::stable::new_empty: see Packed.
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

// An op of torch's. `stack` holds its arguments, and its result afterwards.
inline Tensor call(const char* name, const char* overload, StableIValue* stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// torch's own x weightᵀ + bias
inline Tensor torch_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  return call("aten::linear", "", stack.data());
}

}  // namespace rana
