// Many tokens: dense products by torch (cuBLAS), with our masks between them.
//
// The first product returns float32, so that the mask is decided on it. The masked values are rounded once, to the type
// of the weights, for the second product. torch's settings apply: that for TF32 to both products in float32, that for
// reduced-precision reductions to the second product in 16 bits.
#pragma once

#include <array>

#include "launch.cuh"

namespace {

// Returns a @ b in float32, for matrices of any element type.
inline Tensor wide_product(const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), 0};
  if (a.scalar_type() == ScalarType::Float) return rana::call("aten::mm", "", stack.data());
  stack[2] = from(ScalarType::Float);
  return rana::call("aten::mm", "dtype", stack.data());
}

// Returns z @ rows + bias in the shape of the output for `input`.
inline Tensor last_product(const Tensor& z, const Tensor& rows, const OptionalTensor& bias, const Tensor& input) {
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = rows.size(1);
  return torch::stable::reshape(rana::torch_linear(z, torch::stable::transpose(rows, 0, 1), bias), sizes);
}

// Returns x [..., K] as [tokens, K].
inline Tensor tokens_in_rows(const Tensor& x) { return torch::stable::reshape(x, {tokens_of(x), last_size(x)}); }

// z = m ⊙ h, [tokens, rows]
template <class H, class T>
__global__ void __launch_bounds__(kPlainBlock.threads) mask_kernel(const MaskedInput<H> h, T* z) {
  for_each(h.tokens * h.rows, [&](int64_t i) { z[i] = T(h.value(int(i / h.rows), i % h.rows)); });
}

template <class H, class T>
Tensor masked(const Device& device, const Tensor& h, const Mask& mask, ScalarType dtype) {
  const Packed<H> input(h);
  const int64_t tokens = h.size(0), rows = h.size(1);
  Tensor z = torch::stable::new_empty(h, {tokens, rows}, dtype);
  if (rows > 0)
    device.launch(mask_kernel<H, T>, blocks_for_each(device, tokens * rows), kPlainBlock, false,
                  MaskedInput<H>{input.data, int(tokens), rows, mask}, static_cast<T*>(z.mutable_data_ptr()));
  return z;
}

}  // namespace
