// More tokens than those of a decode step: quantised weights become float weights in temporary memory, which dense
// products then read.
#pragma once

#include "launch.cuh"

namespace {

// Blocks take turns at the rows. The product is exact in float32, and rounded once to T.
template <class T>
__global__ void __launch_bounds__(kPlainBlock.threads)
    dequantize_kernel(const __grid_constant__ OneByOne<T> q, T* weight) {
  for (int64_t row = blockIdx.x; row < q.rows; row += gridDim.x)
    for (int64_t column = threadIdx.x; column < q.columns; column += blockDim.x)
      weight[row * q.columns + column] = T(q.weight(q.at(row, 0), column));
}

template <class T>
void dequantize(const Device& device, const OneByOne<T>& q, Tensor& made) {
  device.launch(dequantize_kernel<T>, std::min<int64_t>(q.rows, 8 * device.processors()), kPlainBlock, false, q,
                static_cast<T*>(made.mutable_data_ptr()));
}

// Converts the arguments of an op to the float type in which it computes. A tensor of that type is not copied.
class InType {
 public:
  InType(const Device& device, ScalarType dtype) : device_(device), dtype_(dtype) {}

  Tensor operator()(const Tensor& t) const { return t.scalar_type() == dtype_ ? t : torch::stable::to(t, dtype_); }
  OptionalTensor operator()(const OptionalTensor& t) const { return t ? OptionalTensor((*this)(*t)) : t; }

  // A weight with `columns` columns.
  Tensor operator()(const Tensor& weight, const OptionalTensor& scale, int64_t columns) const {
    if (!scale) return (*this)(weight);
    Tensor made = torch::stable::new_empty(weight, {weight.size(0), columns}, dtype_);
    if (made.numel() > 0)
      for_dtype(dtype_, [&](auto element) {
        dequantize(device_, any_width<decltype(element)>(weight, scale, columns).all, made);
      });
    return made;
  }
  OptionalTensor operator()(const OptionalTensor& weight, const OptionalTensor& scale, int64_t columns) const {
    return weight ? OptionalTensor((*this)(*weight, scale, columns)) : weight;
  }
  // Rows, whose number of columns is even in 4 bits.
  Tensor rows(const Tensor& weight, const OptionalTensor& scale) const {
    return (*this)(weight, scale, rana::columns_of(weight));
  }
  OptionalTensor rows(const OptionalTensor& weight, const OptionalTensor& scale) const {
    return weight ? OptionalTensor(rows(*weight, scale)) : weight;
  }

 private:
  const Device& device_;
  ScalarType dtype_;
};

// Returns the type in which an op with the input x computes. If a mask depends on quantised weights, that is float32,
// because q · scale is exact in no smaller type.
inline ScalarType working_type(const Tensor& x, bool masks_depend) {
  return masks_depend ? ScalarType::Float : x.scalar_type();
}

// Returns y in the type of the input x.
inline Tensor in_type_of(const Tensor& x, const Tensor& y) {
  return y.scalar_type() == x.scalar_type() ? y : torch::stable::to(y, x.scalar_type());
}

}  // namespace
