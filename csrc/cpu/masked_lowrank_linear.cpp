#include "launch.h"

namespace {

Tensor masked_lowrank_linear(const Tensor& x, const Tensor& B, const Tensor& rows, const Tensor& threshold,
                             const OptionalTensor& bias, const OptionalTensor& B_scale,
                             const OptionalTensor& rows_scale) {
  rana::check_masked_lowrank_linear(x, B, rows, threshold, bias, B_scale, rows_scale);
  const int64_t size = last_size(x), ranks = B.size(0);
  const Weight first_weight(B, B_scale, size), weight(rows, rows_scale);
  Tensor y = empty_output(x, weight.columns);
  const Packed<float> t(threshold);
  const Mask mask{t.data, threshold.dim(), nullptr};
  for_dtype(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Packed<T> input(x);
    const auto b = packed<T>(bias);
    for_blocks(tokens_of(x), [&](int64_t first, int64_t tokens) {
      const std::vector<float> h = project<T>(input.data + first * size, tokens, {first_weight});
      T* out = static_cast<T*>(y.mutable_data_ptr()) + first * weight.columns;
      expand<T>(h.data(), ranks, tokens, weight, mask, Output<T>{out, weight.columns, data_of(b)});
    });
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rana, CPU, m) { m.impl("masked_lowrank_linear", TORCH_BOX(&masked_lowrank_linear)); }
