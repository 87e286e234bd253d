#include "launch.h"

namespace {

Tensor masked_linear(const Tensor& h, const Tensor& rows, const Tensor& threshold, const OptionalTensor& norms,
                     const OptionalTensor& bias, const OptionalTensor& rows_scale) {
  rana::check_masked_linear(h, rows, threshold, norms, bias, rows_scale);
  const Weight weight(rows, rows_scale);
  const int64_t ranks = last_size(h), columns = weight.columns;
  Tensor y = empty_output(h, columns);
  const Packed<float> t(threshold);
  const auto n = packed<float>(norms);
  const Mask mask{t.data, threshold.dim(), data_of(n)};
  for_dtype(h.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Packed<T> input(h);
    const auto b = packed<T>(bias);
    for_blocks(tokens_of(h), [&](int64_t first, int64_t tokens) {
      const std::vector<float> wide = widened(input.data + first * ranks, tokens * ranks);
      T* out = static_cast<T*>(y.mutable_data_ptr()) + first * columns;
      expand<T>(wide.data(), ranks, tokens, weight, mask, Output<T>{out, columns, data_of(b)});
    });
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rana, CPU, m) { m.impl("masked_linear", TORCH_BOX(&masked_linear)); }
