#include "launch.h"

namespace {

// A weight [N, K] with its bias and scale.
struct DenseWeight {
  const Tensor& weight;
  const OptionalTensor &bias, &scale;

  bool stored_as(const DenseWeight& other) const { return weight.scalar_type() == other.weight.scalar_type(); }
};

// y = h + bias for some columns of h [tokens, ld]. `bias` may be null.
template <class T>
void finish(const float* h, int64_t tokens, int64_t columns, int64_t ld, const T* bias, T* y) {
  parallel(columns, tokens, [&](int64_t begin, int64_t end) {
    for (int64_t m = 0; m < tokens; m++)
      for (int64_t n = begin; n < end; n++) y[m * ld + n] = T(h[m * ld + n] + (bias ? float(bias[n]) : 0.0f));
  });
}

// The outputs of weights that are stored alike and read the same x, side by side.
Tensor linears(const Tensor& x, const std::vector<DenseWeight>& all) {
  for (const DenseWeight& each : all) rana::check_linear(x, each.weight, each.bias, each.scale);
  const int64_t tokens = tokens_of(x), size = last_size(x);
  std::vector<Weight> weights;
  int64_t columns = 0;
  for (const DenseWeight& each : all) {
    weights.emplace_back(each.weight, each.scale, size);
    columns += each.weight.size(0);
  }
  Tensor y = empty_output(x, columns);
  for_dtype(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Packed<T> input(x);
    T* const out = static_cast<T*>(y.mutable_data_ptr());
    for_blocks(tokens, [&](int64_t first, int64_t count) {
      const auto h = project<T>(input.data + first * size, count, weights);
      int64_t n = 0;
      for (const DenseWeight& each : all) {
        const auto bias = packed<T>(each.bias);
        const int64_t own = each.weight.size(0);
        finish<T>(h.data() + n, count, own, columns, data_of(bias), out + first * columns + n);
        n += own;
      }
    });
  });
  return y;
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& weight_scale) {
  return linears(x, {{weight, bias, weight_scale}});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rana, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }
