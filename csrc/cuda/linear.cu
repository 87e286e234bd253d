#include "dequantize.cuh"
#include "launch.cuh"

namespace {

template <class W>
struct Linear {
  Projection<W> projection;
  Output<typename W::Element> output;
};

template <class W, int kTokens>
__global__ void __launch_bounds__(kThreads, 1) linear_kernel(const __grid_constant__ Linear<W> op) {
  project<kTokens>(op.projection, [&](int m, int64_t n, float sum) { op.output.store(m, n, sum); });
}

template <class W>
void decode(const Device& device, Linear<W> op) {
  for_tokens<W>(op.projection.x.count, [&](auto tokens) {
    constexpr Block block{kThreads, sizeof(Partials<tokens()>)};
    const Kernel kernel(device, linear_kernel<W, tokens()>, block);
    cut<tokens()>(op.projection);
    kernel.launch(items<tokens()>(op.projection), op, /*together=*/false);
  });
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& weight_scale) {
  rana::check_linear(x, weight, bias, weight_scale);
  if (tokens_of(x) * weight.size(0) == 0) return empty_output(x, weight.size(0));
  const Device device("linear", x);
  const int64_t tokens = tokens_of(x), size = last_size(x);
  if (tokens > kDecodeTokens)
    return rana::torch_linear(x, InType(device, x.scalar_type())(weight, weight_scale, size), bias);
  Tensor y = empty_output(x, weight.size(0));
  for_dtype(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Packed<T> input(x);
    const auto b = packed<T>(bias);
    for_storage<T>(is_plain<T>(weight, weight_scale) && on_16_bytes(input.data), [&](auto storage) {
      using W = typename decltype(storage)::Type;
      decode<W>(device, {projection(input, tokens, stored<W>(weight, weight_scale, size)), output(b, y)});
    });
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rana, CUDA, m) { m.impl("linear", TORCH_BOX(&linear)); }
