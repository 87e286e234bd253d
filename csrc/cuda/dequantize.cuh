// This file turns quantised weights into float weights in temporary memory, which the kernels of the ops then read.
#pragma once

#include "launch.cuh"

namespace {

// A quantised weight [rows, columns]. Its rows, and those of its scale, are `ld` and `scale_ld` elements apart.
template <class Q>
struct Quantized {
  const Q* data;
  const half* scale;
  int64_t rows, ld, scale_ld;
  int columns, group;
};

// Returns the value in a column of a row.
__device__ inline int value_of(const int8_t* row, int column, int) { return row[column]; }
__device__ inline int value_of(const uint8_t* row, int column, int columns) {
  constexpr int kBlock = rana::kNibbleBlock, kHalf = kBlock / 2;
  const int first = column / kBlock * kBlock, i = column - first;
  const bool whole = first + kBlock <= columns;
  const int byte = row[first / 2 + (whole ? i % kHalf : i / 2)];
  const bool high = whole ? i >= kHalf : i % 2;
  return ((high ? byte >> 4 : byte & 15) ^ 8) - 8;
}

// Blocks take turns at the rows. The product is exact in float32, and rounded once to T.
template <class Q, class T>
__global__ void __launch_bounds__(kPlainBlock.threads)
    dequantize_kernel(const __grid_constant__ Quantized<Q> q, T* weight) {
  for (int64_t row = blockIdx.x; row < q.rows; row += gridDim.x)
    for (int column = threadIdx.x; column < q.columns; column += blockDim.x) {
      const float step = float(q.scale[row * q.scale_ld + column / q.group]);
      weight[row * q.columns + column] = T(float(value_of(q.data + row * q.ld, column, q.columns)) * step);
    }
}

template <class Q, class T>
void dequantize(const Device& device, const Tensor& weight, const Tensor& scale, Tensor& made) {
  const int64_t rows = made.size(0), columns = made.size(1);
  const Quantized<Q> q{static_cast<const Q*>(weight.const_data_ptr()),
                       static_cast<const half*>(scale.const_data_ptr()),
                       rows,
                       weight.stride(0),
                       scale.stride(0),
                       int(columns),
                       int(rana::group_size(columns, scale.size(1)))};
  device.launch(dequantize_kernel<Q, T>, std::min<int64_t>(rows, 8 * device.processors()), kPlainBlock, false, q,
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
        using T = decltype(element);
        if (rana::is_packed(weight)) dequantize<uint8_t, T>(device_, weight, *scale, made);
        else dequantize<int8_t, T>(device_, weight, *scale, made);
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
