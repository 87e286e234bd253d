#include "activation.cuh"
#include "launch.cuh"
#include "prefill.cuh"

namespace {

// The step between the sums over ranks and the sums over neurons.
template <class T>
struct Neurons {
  const T *up_bias, *gate_bias;
  bool gated;
  Activation activation;
  Mask mask;

  // Returns m ⊙ g of a neuron, where g = act(gate) · up, or act(up) without a gate. The sums come without their biases.
  __device__ float operator()(int64_t n, float up, float gate) const {
    if (up_bias) up += float(up_bias[n]);
    if (gate_bias) gate += float(gate_bias[n]);
    return mask.apply(gated ? activate(activation, gate) * up : activate(activation, up), n);
  }
};

template <class T, int kTokens>
struct Mlp {
  using W = Plain<T>;
  using Z = Computed<W, kTokens>;
  Projection<W> ranks;
  Mask mask;
  int64_t first_gate_rank;
  Expansion<Z, W> up, gate;  // with the same tiles
  Neurons<T> neurons;
  Expansion<Z, W> down;
  Output<T> output;

  // Each rank of B belongs to up, to gate, or to both.
  __device__ void store_rank(int m, int64_t r, float h) const {
    const float z = mask.apply(h, r);
    if (r < up.rows.rows) up.z.store(m, r, z);
    if (neurons.gated && r >= first_gate_rank) gate.z.store(m, r - first_gate_rank, z);
  }
};

// The sums of up and gate for the neurons of a tile, in shared memory behind that of an expansion.
template <class W, int kTokens>
struct NeuronSums {
  float up[kTokens][kMostColumns<W, kTokens>], gate[kTokens][kMostColumns<W, kTokens>];
};
template <class W, int kTokens>
constexpr Block kMlpBlock{kThreads, kBlock<W, kTokens>.shared_bytes + sizeof(NeuronSums<W, kTokens>)};

template <class T, int kTokens>
__device__ void compute_neurons(const Mlp<T, kTokens>& op, int tile) {
  using W = Plain<T>;
  auto& sums = shared_as<NeuronSums<W, kTokens>>(kBlock<W, kTokens>.shared_bytes);
  const int columns = op.up.width * kPacket<W>;
  const int64_t first = int64_t(tile) * columns, left = op.down.z.rows - first;
  expand<kTokens>(op.up, tile, [&](int m, int64_t n, float sum) { sums.up[m][n - first] = sum; });
  if (op.neurons.gated)
    expand<kTokens>(op.gate, tile, [&](int m, int64_t n, float sum) { sums.gate[m][n - first] = sum; });
  __syncthreads();
  for (int i = threadIdx.x; i < op.down.z.tokens * columns; i += kThreads)
    if (const int m = i / columns, c = i % columns; c < left)
      op.down.z.store(m, first + c, op.neurons(first + c, sums.up[m][c], sums.gate[m][c]));
  __syncthreads();
}

template <class T, int kTokens>
__global__ void __launch_bounds__(kThreads, 1) masked_mlp_kernel(const __grid_constant__ Mlp<T, kTokens> op) {
  project<kTokens>(op.ranks, [&](int m, int64_t r, float h) { op.store_rank(m, r, h); });
  fetch_ahead(op.up, kAheadBytes / (op.neurons.gated ? 2 : 1));
  if (op.neurons.gated) fetch_ahead(op.gate, kAheadBytes / 2);
  cooperative_groups::this_grid().sync();
  for_tiles(op.up, [&](int tile) { compute_neurons(op, tile); });
  cooperative_groups::this_grid().sync();
  for_tiles(op.down, [&](int tile) {
    expand<kTokens>(op.down, tile, [&](int m, int64_t n, float sum) { op.output.store(m, n, sum); });
  });
}

// The rows of an MLP. Without a gate, `gate` is a copy of `up` that no kernel reads.
template <class T>
struct Weights {
  Plain<T> up, gate, down;
};

template <class T>
void decode(const Device& device, const Tensor& input, const Projection<Plain<T>>& ranks, const Mask& mask,
            int64_t first_gate_rank, const Weights<T>& weights, const Neurons<T>& neurons, const Output<T>& output) {
  const int M = ranks.x.count;
  for_tokens(M, [&](auto tokens) {
    const Kernel kernel(device, masked_mlp_kernel<T, tokens()>, kMlpBlock<Plain<T>, tokens()>);
    const auto& [up, gate, down] = weights;
    Mlp<T, tokens()> op{ranks,
                        mask,
                        first_gate_rank,
                        {{nullptr, M, up.rows}, up},
                        {{nullptr, M, gate.rows}, gate},
                        neurons,
                        {{nullptr, M, down.rows}, down},
                        output};
    cut<tokens()>(op.ranks);
    for (auto* expansion : {&op.up, &op.gate, &op.down}) cut<tokens()>(*expansion, kernel.blocks());
    Workspace workspace;
    for (auto* expansion : {&op.up, &op.gate, &op.down}) workspace.add(expansion->z);
    const Tensor memory = workspace.allocate(input);
    kernel.launch(std::max<int64_t>(items<tokens()>(op.ranks), std::max(op.up.tiles, op.down.tiles)), op);
  });
}

// Computes z = m ⊙ g for many tokens, [tokens, neurons], from the products of up and gate without their biases.
template <class T>
__global__ void __launch_bounds__(kPlainBlock.threads)
    neurons_kernel(const __grid_constant__ Neurons<T> neurons, const float* up, const float* gate, int64_t tokens,
                   int64_t size, T* z) {
  for_each(tokens * size, [&](int64_t i) { z[i] = T(neurons(i % size, up[i], gate[i])); });
}

template <class T>
Tensor prefill(const Device& device, const Tensor& x, const Tensor& B, const Mask& mask, const Tensor& up_rows,
               const OptionalTensor& gate_rows, const Neurons<T>& neurons, const Tensor& down_rows,
               const OptionalTensor& down_bias) {
  const int64_t tokens = tokens_of(x), size = down_rows.size(0);
  const Tensor h = wide_product(tokens_in_rows(x), torch::stable::transpose(B, 0, 1));
  Tensor kept = masked<float, T>(device, h, mask, x.scalar_type());
  const Tensor up = wide_product(torch::stable::narrow(kept, 1, 0, up_rows.size(0)), up_rows);
  Tensor gate = up;
  if (gate_rows)
    gate = wide_product(torch::stable::narrow(kept, 1, first_gate_rank(B, gate_rows), gate_rows->size(0)), *gate_rows);
  Tensor z = torch::stable::new_empty(x, {tokens, size});
  if (size > 0)
    device.launch(neurons_kernel<T>, blocks_for_each(device, tokens * size), kPlainBlock, false, neurons,
                  static_cast<const float*>(up.const_data_ptr()), static_cast<const float*>(gate.const_data_ptr()),
                  tokens, size, static_cast<T*>(z.mutable_data_ptr()));
  return last_product(z, down_rows, down_bias, x);
}

Tensor masked_mlp(const Tensor& x, const Tensor& B, const Tensor& up_rows, const OptionalTensor& gate_rows,
                  const Tensor& threshold, const OptionalTensor& up_bias, const OptionalTensor& gate_bias,
                  const Tensor& down_rows, const Tensor& down_norms, const Tensor& down_threshold,
                  const OptionalTensor& down_bias, std::string activation) {
  const Activation function = find_activation(activation);
  rana::check_masked_mlp(x, B, up_rows, gate_rows, threshold, up_bias, gate_bias, down_rows, down_norms, down_threshold,
                         down_bias, activation, function != Activation::unknown);
  const int64_t tokens = tokens_of(x);
  Tensor y = empty_output(x, down_rows.size(1));
  if (y.numel() == 0) return y;
  const Device device("masked_mlp", x);
  const Packed<float> t(threshold), down_t(down_threshold), down_n(down_norms);
  for_dtype(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Packed<T> input(x);
    const auto up_b = packed<T>(up_bias), gate_b = packed<T>(gate_bias), down_b = packed<T>(down_bias);
    const Mask rank_mask{t.data, 1, nullptr};
    const Neurons<T> neurons{data_of(up_b),
                             data_of(gate_b),
                             gate_rows.has_value(),
                             function,
                             {down_t.data, int(down_threshold.dim()), down_n.data}};
    if (tokens > kDecodeTokens) {
      y = prefill<T>(device, x, B, rank_mask, up_rows, gate_rows, neurons, down_rows, down_bias);
    } else {
      const Plain<T> up = plain<T>(up_rows), gate = gate_rows ? plain<T>(*gate_rows) : up;
      decode<T>(device, x, projection(input, tokens, plain<T>(B)), rank_mask, first_gate_rank(B, gate_rows),
                {up, gate, plain<T>(down_rows)}, neurons, output(down_b, y));
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rana, CUDA, m) { m.impl("masked_mlp", TORCH_BOX(&masked_mlp)); }
