#include "launch.h"

namespace {

Tensor masked_lowrank_linear(const Tensor& x, const Tensor& B, const Tensor& rows, const Tensor& threshold,
                             const OptionalTensor& bias) {
  rana::check_masked_lowrank_linear(x, B, rows, threshold, bias);
  const int64_t size = last_size(x), ranks = B.size(0), columns = rows.size(1);
  Tensor y = empty_output(x, columns);
  const Packed<float> t(threshold);
  const Mask mask{t.data, threshold.dim(), nullptr};
  for_dtype(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Packed<T> input(x);
    const auto b = packed<T>(bias);
    for_blocks(tokens_of(x), [&](int64_t first, int64_t tokens) {
      const std::vector<float> h = project(input.data + first * size, tokens, plain<T>(B));
      T* out = static_cast<T*>(y.mutable_data_ptr()) + first * columns;
      expand(h.data(), ranks, tokens, plain<T>(rows), mask, {out, columns, data_of(b)});
    });
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rana, CPU, m) { m.impl("masked_lowrank_linear", TORCH_BOX(&masked_lowrank_linear)); }
