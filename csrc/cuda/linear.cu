#include "dequantize.cuh"
#include "launch.cuh"

namespace {

template <class T>
struct Linear {
  Projection<Plain<T>> projection;
  Output<T> output;
};

template <class T, int kTokens>
__global__ void __launch_bounds__(kThreads, 1) linear_kernel(const __grid_constant__ Linear<T> op) {
  project<kTokens>(op.projection, [&](int m, int64_t n, float sum) { op.output.store(m, n, sum); });
}

template <class T>
void decode(const Device& device, Linear<T> op) {
  for_tokens(op.projection.x.count, [&](auto tokens) {
    constexpr Block block{kThreads, sizeof(Partials<tokens()>)};
    const Kernel kernel(device, linear_kernel<T, tokens()>, block);
    cut<tokens()>(op.projection);
    kernel.launch(items<tokens()>(op.projection), op, /*together=*/false);
  });
}

// Computes the op with float weights. y is not empty.
Tensor compute(const Device& device, const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const int64_t tokens = tokens_of(x);
  if (tokens > kDecodeTokens) return rana::torch_linear(x, weight, bias);
  Tensor y = empty_output(x, weight.size(0));
  for_dtype(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Packed<T> input(x);
    const auto b = packed<T>(bias);
    decode<T>(device, {projection(input, tokens, plain<T>(weight)), output(b, y)});
  });
  return y;
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& weight_scale) {
  rana::check_linear(x, weight, bias, weight_scale);
  if (tokens_of(x) * weight.size(0) == 0) return empty_output(x, weight.size(0));
  const Device device("linear", x);
  return compute(device, x, InType(device, x.scalar_type())(weight, weight_scale, last_size(x)), bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rana, CUDA, m) { m.impl("linear", TORCH_BOX(&linear)); }
