#include "dequantize.cuh"
#include "launch.cuh"
#include "prefill.cuh"

namespace {

template <class W>
struct Linear {
  using T = typename W::Element;
  Expansion<MaskedInput<T>, W> expansion;
  Output<T> output;
};

template <class W, int kTokens>
__global__ void __launch_bounds__(kThreads, 1) masked_linear_kernel(const __grid_constant__ Linear<W> op) {
  for_tiles(op.expansion, [&](int tile) {
    expand<kTokens>(op.expansion, tile, [&](int m, int64_t n, float sum) { op.output.store(m, n, sum); });
  });
}

// Returns up to how many tokens rows are skipped. With float weights in 16 bits z is as exact for a dense product as it
// is here, and skipping rows for two tokens takes longer than a dense product for 64 (bench/NOTES.md).
template <class T>
constexpr int64_t streamed_tokens(bool quantized) {
  return !quantized && sizeof(T) == 2 ? 1 : kDecodeTokens;
}

template <class W>
void decode(const Device& device, Linear<W> op) {
  const auto run = [&](auto tokens) {
    const Kernel kernel(device, masked_linear_kernel<W, tokens()>, kBlock<W, tokens()>);
    cut<tokens()>(op.expansion, kernel.blocks());
    kernel.launch(op.expansion.tiles, op, /*together=*/false);
  };
  if constexpr (streamed_tokens<typename W::Element>(W::kQuantized) == 1) run(std::integral_constant<int, 1>{});
  else for_tokens<W>(op.expansion.z.tokens, run);
}

// Computes the op. y is not empty.
Tensor compute(const Device& device, const Tensor& h, const Tensor& rows, const Tensor& threshold,
               const OptionalTensor& norms, const OptionalTensor& bias, const OptionalTensor& rows_scale) {
  const int64_t tokens = tokens_of(h);
  Tensor y = empty_output(h, rana::columns_of(rows));
  const Packed<float> t(threshold);
  const auto n = packed<float>(norms);
  const Mask mask{t.data, int(threshold.dim()), data_of(n)};
  for_dtype(h.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (tokens > streamed_tokens<T>(rows_scale.has_value())) {
      const Tensor z = masked<T, T>(device, tokens_in_rows(h), mask, h.scalar_type());
      y = last_product(z, InType(device, h.scalar_type()).rows(rows, rows_scale), bias, h);
      return;
    }
    const Packed<T> input(h);
    const auto b = packed<T>(bias);
    const MaskedInput<T> z{input.data, int(tokens), rows.size(0), mask};
    for_storage<T>(is_plain<T>(rows, rows_scale), [&](auto storage) {
      using W = typename decltype(storage)::Type;
      decode<W>(device, {{z, stored_rows<W>(rows, rows_scale)}, output(b, y)});
    });
  });
  return y;
}

Tensor masked_linear(const Tensor& h, const Tensor& rows, const Tensor& threshold, const OptionalTensor& norms,
                     const OptionalTensor& bias, const OptionalTensor& rows_scale) {
  rana::check_masked_linear(h, rows, threshold, norms, bias, rows_scale);
  const int64_t columns = rana::columns_of(rows);
  if (tokens_of(h) * columns == 0) return empty_output(h, columns);
  const Device device("masked_linear", h);
  return compute(device, h, rows, threshold, norms, bias, rows_scale);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rana, CUDA, m) { m.impl("masked_linear", TORCH_BOX(&masked_linear)); }
