#include "activation.cuh"
#include "launch.cuh"
#include "products.cuh"

namespace {

template <class T>
struct Mlp {
  Projection<T> ranks;
  Expansion<float, T> halves[2];  // up and gate, cut up alike
  int gates;                      // 1, or 0 for an MLP without a gate
  const T *up_bias, *gate_bias;
  Activation activation;
  float* g;           // [tokens, neurons]
  unsigned* arrived;  // [tiles of the halves]
  Expansion<float, T> down;
  Output<T> output;
};

// g = act(gate) ⊙ up, or act(up), of a neuron; the sums come without their biases
template <class T>
__device__ float neuron(const Mlp<T>& op, int64_t n, float up, float gate) {
  if (op.up_bias) up += float(op.up_bias[n]);
  if (!op.gates) return activate(op.activation, up);
  if (op.gate_bias) gate += float(op.gate_bias[n]);
  return activate(op.activation, gate) * up;
}

// The neurons of a tile, by the last block to finish a part of their sums.
template <class T>
__device__ void finish_neurons(const Mlp<T>& op, int tokens, int tile) {
  const auto &up = op.halves[0], &gate = op.halves[1];
  if (!last_to_arrive(op.arrived + tile, up.splits * (1 + op.gates))) return;
  for_tile<T>(tile, tokens, up.rows.columns, [&](int m, int64_t n) {
    const float of_gate = op.gates ? sum_of_splits(gate, tokens, m, n) : 0.0f;
    op.g[m * up.rows.columns + n] = neuron(op, n, sum_of_splits(up, tokens, m, n), of_gate);
  });
}

template <class T, int kTokens>
__global__ void __launch_bounds__(kThreads<kTokens>, 1) masked_mlp_kernel(const __grid_constant__ Mlp<T> op) {
  const int tokens = kTokens == 1 ? 1 : op.ranks.x.count, items = op.halves[0].items();
  clear(op.arrived, op.halves[0].tiles);
  clear(op.output.arrived, op.down.tiles);
  project<kTokens>(op.ranks);
  cooperative_groups::this_grid().sync();
  for (int item = blockIdx.x; item < items * (1 + op.gates); item += gridDim.x) {
    expand<kTokens>(op.halves[item / items], tokens, item % items);
    finish_neurons(op, tokens, item % op.halves[0].tiles);
  }
  cooperative_groups::this_grid().sync();
  for (int item = blockIdx.x; item < op.down.items(); item += gridDim.x) {
    expand<kTokens>(op.down, tokens, item);
    finish(op.down, op.output, tokens, item % op.down.tiles);
  }
}

// The ranks of gate are the last ones: those after up's, or the same.
template <class T>
int64_t first_gate_rank(const Mlp<T>& op) {
  return op.ranks.B.rows - op.halves[1].rows.rows;
}

template <class T>
void decode(const Device& device, const Tensor& input, Mlp<T> op) {
  const int M = op.ranks.x.count;
  auto &up = op.halves[0], &gate = op.halves[1];
  for_tokens(M, [&](auto tokens) {
    const Kernel kernel(device, masked_mlp_kernel<T, tokens()>, kBlock<T, tokens()>);
    op.ranks.warps_a_row = warps_a_row(op.ranks.B.columns * sizeof(T), kWarps<tokens()>);
    for (auto& half : op.halves) cut(half, ceil_div(kernel.blocks(), 1 + op.gates), device.tuning());
    up.splits = gate.splits = std::max(up.splits, gate.splits);
    cut(op.down, kernel.blocks(), device.tuning());
    Workspace workspace;
    workspace.add(op.ranks.h, M * op.ranks.B.rows);
    workspace.add(op.g, M * op.down.rows.rows);
    add_sums(workspace, up, M);
    if (op.gates) add_sums(workspace, gate, M);
    add_sums(workspace, op.down, M);
    workspace.add(op.arrived, up.tiles);
    workspace.add(op.output.arrived, op.down.tiles);
    const Tensor memory = workspace.allocate(input);
    up.h.h = op.ranks.h, gate.h.h = op.ranks.h + first_gate_rank(op);
    op.down.h.h = op.g;
    kernel.launch(std::max({items<tokens()>(op.ranks), items(up) * (1 + op.gates), items(op.down)}), op);
  });
}

// z = m ⊙ g for many tokens, [tokens, neurons], from the products of up and gate without their biases
template <class T>
__global__ void __launch_bounds__(kPlainBlock.threads)
    neurons_kernel(const __grid_constant__ Mlp<T> op, const float* up, const float* gate, int64_t tokens, T* z) {
  const int64_t size = op.down.rows.rows;
  for_each(tokens * size, [&](int64_t i) {
    const float g = neuron(op, i % size, up[i], op.gates ? gate[i] : 0.0f);
    z[i] = T(op.down.h.mask.keeps(g, i % size) ? g : 0.0f);
  });
}

template <class T>
Tensor prefill(const Device& device, const Tensor& x, const Tensor& B, const Tensor& up_rows,
               const OptionalTensor& gate_rows, const Tensor& down_rows, const OptionalTensor& down_bias,
               const Mlp<T>& op) {
  const int64_t tokens = tokens_of(x), size = down_rows.size(0);
  const Tensor h = wide_product(tokens_in_rows(x), torch::stable::transpose(B, 0, 1));
  Tensor kept = masked<float, T>(device, h, op.halves[0].h.mask, x.scalar_type());
  const Tensor up = wide_product(torch::stable::narrow(kept, 1, 0, up_rows.size(0)), up_rows);
  Tensor gate = up;
  if (gate_rows)
    gate = wide_product(torch::stable::narrow(kept, 1, first_gate_rank(op), gate_rows->size(0)), *gate_rows);
  Tensor z = torch::stable::new_empty(x, {tokens, size});
  if (size > 0)
    device.launch(neurons_kernel<T>, blocks_for_each(device, tokens * size), kPlainBlock, false, op,
                  static_cast<const float*>(up.const_data_ptr()), static_cast<const float*>(gate.const_data_ptr()),
                  tokens, static_cast<T*>(z.mutable_data_ptr()));
  return last_product(z, down_rows, down_bias, x);
}

Tensor masked_mlp(const Tensor& x, const Tensor& B, const Tensor& up_rows, const OptionalTensor& gate_rows,
                  const Tensor& threshold, const OptionalTensor& up_bias, const OptionalTensor& gate_bias,
                  const Tensor& down_rows, const Tensor& down_scale, const Tensor& down_threshold,
                  const OptionalTensor& down_bias, std::string activation) {
  const Activation function = find_activation(activation);
  rana::check_masked_mlp(x, B, up_rows, gate_rows, threshold, up_bias, gate_bias, down_rows, down_scale, down_threshold,
                         down_bias, activation, function != Activation::unknown);
  const int64_t tokens = tokens_of(x), ranks = B.size(0);
  Tensor y = empty_output(x, down_rows.size(1));
  if (y.numel() == 0) return y;
  const Device device("masked_mlp", x);
  const Packed<float> t(threshold), down_t(down_threshold), down_s(down_scale);
  for_dtype(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Packed<T> input(x);
    const auto up_b = packed<T>(up_bias), gate_b = packed<T>(gate_bias), down_b = packed<T>(down_bias);
    const Matrix<T> up = matrix<T>(up_rows), gate = gate_rows ? matrix<T>(*gate_rows) : up, down = matrix<T>(down_rows);
    const Values<float> up_h{nullptr, ranks, up.rows, {t.data, 1, nullptr}};
    const Values<float> gate_h{nullptr, ranks, gate.rows, {t.data + ranks - gate.rows, 1, nullptr}};
    const Values<float> g{nullptr, down.rows, down.rows, {down_t.data, int(down_threshold.dim()), down_s.data}};
    const Mlp<T> op{projection(input, tokens, B),
                    {expansion(up_h, up), expansion(gate_h, gate)},
                    gate_rows.has_value(),
                    data_of(up_b),
                    data_of(gate_b),
                    function,
                    nullptr,
                    nullptr,
                    expansion(g, down),
                    output(down_b, y)};
    if (tokens > kDecodeTokens) y = prefill<T>(device, x, B, up_rows, gate_rows, down_rows, down_bias, op);
    else decode<T>(device, x, op);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rana, CUDA, m) { m.impl("masked_mlp", TORCH_BOX(&masked_mlp)); }
