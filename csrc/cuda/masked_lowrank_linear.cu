#include "dequantize.cuh"
#include "launch.cuh"
#include "prefill.cuh"

namespace {

template <class W, int kTokens>
struct Lowrank {
  Projection<W> ranks;
  Mask mask;
  Expansion<Computed<W, kTokens>, W> expansion;
  Output<typename W::Element> output;
};

template <class W, int kTokens>
__global__ void __launch_bounds__(kThreads, 1)
    masked_lowrank_linear_kernel(const __grid_constant__ Lowrank<W, kTokens> op) {
  project<kTokens>(op.ranks, [&](int m, int64_t r, float h) { op.expansion.z.store(m, r, op.mask.apply(h, r)); });
  fetch_ahead(op.expansion);
  cooperative_groups::this_grid().sync();
  for_tiles(op.expansion, [&](int tile) {
    expand<kTokens>(op.expansion, tile, [&](int m, int64_t n, float sum) { op.output.store(m, n, sum); });
  });
}

template <class W>
void decode(const Device& device, const Tensor& input, const Projection<W>& ranks, const Mask& mask, const W& rows,
            const Output<typename W::Element>& output) {
  for_tokens<W>(ranks.x.count, [&](auto tokens) {
    const Kernel kernel(device, masked_lowrank_linear_kernel<W, tokens()>, kBlock<W, tokens()>);
    Lowrank<W, tokens()> op{ranks, mask, {{nullptr, ranks.x.count, rows.rows}, rows}, output};
    cut<tokens()>(op.ranks);
    cut<tokens()>(op.expansion, kernel.blocks());
    Workspace workspace;
    workspace.add(op.expansion.z);
    const Tensor memory = workspace.allocate(input);
    kernel.launch(std::max<int64_t>(items<tokens()>(op.ranks), op.expansion.tiles), op);
  });
}

// Computes the op for many tokens. B and rows are floats.
Tensor prefill(const Device& device, const Tensor& x, const Tensor& B, const Tensor& rows, const Mask& mask,
               const OptionalTensor& bias) {
  Tensor z = x;
  for_dtype(x.scalar_type(), [&](auto element) {
    const Tensor h = wide_product(tokens_in_rows(x), torch::stable::transpose(B, 0, 1));
    z = masked<float, decltype(element)>(device, h, mask, x.scalar_type());
  });
  return last_product(z, rows, bias, x);
}

Tensor masked_lowrank_linear(const Tensor& x, const Tensor& B, const Tensor& rows, const Tensor& threshold,
                             const OptionalTensor& bias, const OptionalTensor& B_scale,
                             const OptionalTensor& rows_scale) {
  rana::check_masked_lowrank_linear(x, B, rows, threshold, bias, B_scale, rows_scale);
  const int64_t tokens = tokens_of(x), size = last_size(x), columns = rana::columns_of(rows);
  if (tokens * columns == 0) return empty_output(x, columns);
  const Device device("masked_lowrank_linear", x);
  const Packed<float> t(threshold);
  const Mask mask{t.data, int(threshold.dim()), nullptr};
  if (tokens > kDecodeTokens) {
    const InType in(device, working_type(x, B_scale.has_value()));
    const Tensor y = prefill(device, in(x), in(B, B_scale, size), in.rows(rows, rows_scale), mask, in(bias));
    return in_type_of(x, y);
  }
  Tensor y = empty_output(x, columns);
  for_dtype(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Packed<T> input(x);
    const auto b = packed<T>(bias);
    const bool plain = is_plain<T>(B, B_scale) && on_16_bytes(input.data) && is_plain<T>(rows, rows_scale);
    for_storage<T>(plain, [&](auto storage) {
      using W = typename decltype(storage)::Type;
      decode<W>(device, x, projection(input, tokens, stored<W>(B, B_scale, size)), mask,
                stored_rows<W>(rows, rows_scale), output(b, y));
    });
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rana, CUDA, m) { m.impl("masked_lowrank_linear", TORCH_BOX(&masked_lowrank_linear)); }
