#include "launch.cuh"
#include "products.cuh"

namespace {

template <class T>
struct Lowrank {
  Projection<T> ranks;
  Expansion<float, T> expansion;
  Output<T> output;
};

template <class T, int kTokens>
__global__ void __launch_bounds__(kThreads<kTokens>, 1)
    masked_lowrank_linear_kernel(const __grid_constant__ Lowrank<T> op) {
  const int tokens = kTokens == 1 ? 1 : op.ranks.x.count;
  clear(op.output.arrived, op.expansion.tiles);
  project<kTokens>(op.ranks);
  cooperative_groups::this_grid().sync();
  for (int item = blockIdx.x; item < op.expansion.items(); item += gridDim.x) {
    expand<kTokens>(op.expansion, tokens, item);
    finish(op.expansion, op.output, tokens, item % op.expansion.tiles);
  }
}

template <class T>
void decode(const Device& device, const Tensor& input, Lowrank<T> op) {
  const int M = op.ranks.x.count;
  for_tokens(M, [&](auto tokens) {
    const Kernel kernel(device, masked_lowrank_linear_kernel<T, tokens()>, kBlock<T, tokens()>);
    op.ranks.warps_a_row = warps_a_row(op.ranks.B.columns * sizeof(T), kWarps<tokens()>);
    cut(op.expansion, kernel.blocks(), device.tuning());
    Workspace workspace;
    workspace.add(op.ranks.h, M * op.ranks.B.rows);
    add_sums(workspace, op.expansion, M);
    workspace.add(op.output.arrived, op.expansion.tiles);
    const Tensor memory = workspace.allocate(input);
    op.expansion.h.h = op.ranks.h;
    kernel.launch(std::max(items<tokens()>(op.ranks), items(op.expansion)), op);
  });
}

Tensor masked_lowrank_linear(const Tensor& x, const Tensor& B, const Tensor& rows, const Tensor& threshold,
                             const OptionalTensor& bias) {
  rana::check_masked_lowrank_linear(x, B, rows, threshold, bias);
  const int64_t tokens = tokens_of(x);
  Tensor y = empty_output(x, rows.size(1));
  if (y.numel() == 0) return y;
  const Device device("masked_lowrank_linear", x);
  const Packed<float> t(threshold);
  const Mask mask{t.data, int(threshold.dim()), nullptr};
  for_dtype(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (tokens > kDecodeTokens) {
      const Tensor h = wide_product(tokens_in_rows(x), torch::stable::transpose(B, 0, 1));
      y = last_product(masked<float, T>(device, h, mask, x.scalar_type()), rows, bias, x);
    } else {
      const Packed<T> input(x);
      const auto b = packed<T>(bias);
      const Values<float> h{nullptr, B.size(0), B.size(0), mask};
      decode<T>(device, x, {projection(input, tokens, B), expansion(h, matrix<T>(rows)), output(b, y)});
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rana, CUDA, m) { m.impl("masked_lowrank_linear", TORCH_BOX(&masked_lowrank_linear)); }
