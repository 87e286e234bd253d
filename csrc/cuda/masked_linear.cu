#include "launch.cuh"
#include "products.cuh"

namespace {

template <class T>
struct Linear {
  Expansion<T, T> expansion;
  Output<T> output;
  int tokens;
};

// The counters are cleared behind a grid barrier that no block waits at before its first tile is summed.
template <class T, int kTokens>
__global__ void __launch_bounds__(kThreads<kTokens>, 1) masked_linear_kernel(const __grid_constant__ Linear<T> op) {
  const int tokens = kTokens == 1 ? 1 : op.tokens;
  const auto grid = cooperative_groups::this_grid();
  clear(op.output.arrived, op.expansion.tiles);
  auto cleared = grid.barrier_arrive();
  bool waited = false;
  for (int item = blockIdx.x; item < op.expansion.items(); item += gridDim.x) {
    expand<kTokens>(op.expansion, tokens, item);
    if (!waited) grid.barrier_wait(std::move(cleared)), waited = true;
    finish(op.expansion, op.output, tokens, item % op.expansion.tiles);
  }
  if (!waited) grid.barrier_wait(std::move(cleared));
}

template <class T>
void decode(const Device& device, const Tensor& input, Linear<T> op) {
  for_tokens(op.tokens, [&](auto tokens) {
    const Kernel kernel(device, masked_linear_kernel<T, tokens()>, kBlock<T, tokens()>);
    cut(op.expansion, kernel.blocks(), device.tuning());
    Workspace workspace;
    add_sums(workspace, op.expansion, op.tokens);
    workspace.add(op.output.arrived, op.expansion.tiles);
    const Tensor memory = workspace.allocate(input);
    kernel.launch(items(op.expansion), op);
  });
}

Tensor masked_linear(const Tensor& h, const Tensor& rows, const Tensor& threshold, const OptionalTensor& scale,
                     const OptionalTensor& bias) {
  rana::check_masked_linear(h, rows, threshold, scale, bias);
  const int64_t tokens = tokens_of(h);
  Tensor y = empty_output(h, rows.size(1));
  if (y.numel() == 0) return y;
  const Device device("masked_linear", h);
  const Packed<float> t(threshold);
  const auto s = packed<float>(scale);
  const Mask mask{t.data, int(threshold.dim()), data_of(s)};
  for_dtype(h.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (tokens > kDecodeTokens) {
      const Tensor z = masked<T, T>(device, tokens_in_rows(h), mask, h.scalar_type());
      y = last_product(z, rows, bias, h);
    } else {
      const Packed<T> input(h);
      const auto b = packed<T>(bias);
      const Values<T> values{input.data, rows.size(0), rows.size(0), mask};
      decode<T>(device, h, {expansion(values, matrix<T>(rows)), output(b, y), int(tokens)});
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rana, CUDA, m) { m.impl("masked_linear", TORCH_BOX(&masked_linear)); }
