#include "launch.h"

namespace {

// y = h + bias, [tokens, columns]. `bias` may be null.
template <class T>
void finish(const std::vector<float>& h, int64_t tokens, int64_t columns, const T* bias, T* y) {
  parallel(columns, tokens, [&](int64_t begin, int64_t end) {
    for (int64_t m = 0; m < tokens; m++)
      for (int64_t n = begin; n < end; n++) y[m * columns + n] = T(h[m * columns + n] + (bias ? float(bias[n]) : 0.0f));
  });
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& weight_scale) {
  rana::check_linear(x, weight, bias, weight_scale);
  const int64_t tokens = tokens_of(x), size = last_size(x), columns = weight.size(0);
  Tensor y = empty_output(x, columns);
  for_dtype(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Packed<T> input(x);
    const auto b = packed<T>(bias);
    T* out = static_cast<T*>(y.mutable_data_ptr());
    for_blocks(tokens, [&](int64_t first, int64_t count) {
      const auto h = project<T>(input.data + first * size, count, Weight(weight, weight_scale, size));
      finish<T>(h, count, columns, data_of(b), out + first * columns);
    });
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rana, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }
