#include "dequantize.cuh"
#include "launch.cuh"
#include "prefill.cuh"

namespace {

template <class T, int kTokens>
struct Lowrank {
  Projection<Plain<T>> ranks;
  Mask mask;
  Expansion<Computed<Plain<T>, kTokens>, Plain<T>> expansion;
  Output<T> output;
};

template <class T, int kTokens>
__global__ void __launch_bounds__(kThreads, 1)
    masked_lowrank_linear_kernel(const __grid_constant__ Lowrank<T, kTokens> op) {
  project<kTokens>(op.ranks, [&](int m, int64_t r, float h) { op.expansion.z.store(m, r, op.mask.apply(h, r)); });
  fetch_ahead(op.expansion);
  cooperative_groups::this_grid().sync();
  for_tiles(op.expansion, [&](int tile) {
    expand<kTokens>(op.expansion, tile, [&](int m, int64_t n, float sum) { op.output.store(m, n, sum); });
  });
}

template <class T>
void decode(const Device& device, const Tensor& input, Projection<Plain<T>> ranks, const Mask& mask,
            const Plain<T>& rows, const Output<T>& output) {
  for_tokens(ranks.x.count, [&](auto tokens) {
    const Kernel kernel(device, masked_lowrank_linear_kernel<T, tokens()>, kBlock<Plain<T>, tokens()>);
    Lowrank<T, tokens()> op{ranks, mask, {{nullptr, ranks.x.count, rows.rows}, rows}, output};
    cut<tokens()>(op.ranks);
    cut<tokens()>(op.expansion, kernel.blocks());
    Workspace workspace;
    workspace.add(op.expansion.z);
    const Tensor memory = workspace.allocate(input);
    kernel.launch(std::max<int64_t>(items<tokens()>(op.ranks), op.expansion.tiles), op);
  });
}

// Computes the op with float weights. y is not empty.
Tensor compute(const Device& device, const Tensor& x, const Tensor& B, const Tensor& rows, const Tensor& threshold,
               const OptionalTensor& bias) {
  const int64_t tokens = tokens_of(x);
  Tensor y = empty_output(x, rows.size(1));
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
      decode<T>(device, x, projection(input, tokens, plain<T>(B)), mask, plain<T>(rows), output(b, y));
    }
  });
  return y;
}

Tensor masked_lowrank_linear(const Tensor& x, const Tensor& B, const Tensor& rows, const Tensor& threshold,
                             const OptionalTensor& bias, const OptionalTensor& B_scale,
                             const OptionalTensor& rows_scale) {
  rana::check_masked_lowrank_linear(x, B, rows, threshold, bias, B_scale, rows_scale);
  const int64_t columns = rana::columns_of(rows);
  if (tokens_of(x) * columns == 0) return empty_output(x, columns);
  const Device device("masked_lowrank_linear", x);
  const InType in(device, working_type(x, B_scale.has_value()));
  const Tensor y = compute(device, in(x), in(B, B_scale, last_size(x)), in.rows(rows, rows_scale), threshold, in(bias));
  return in_type_of(x, y);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rana, CUDA, m) { m.impl("masked_lowrank_linear", TORCH_BOX(&masked_lowrank_linear)); }
