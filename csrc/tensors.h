// What every compiled backend does with tensors before its kernels see pointers and sizes.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "check.h"

namespace rana {

// A small argument (input, bias, threshold), made contiguous if it is not.
template <class T>
struct Packed {
  Tensor tensor;
  const T* data;

  Packed(const Tensor& t)
      : tensor(torch::stable::contiguous(t)), data(static_cast<const T*>(tensor.const_data_ptr())) {}
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

inline Tensor empty_output(const Tensor& input, int64_t columns) {
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = columns;
  return torch::stable::new_empty(input, sizes);
}

}  // namespace rana
