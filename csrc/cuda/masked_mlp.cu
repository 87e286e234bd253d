#include "activation.cuh"
#include "dequantize.cuh"
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

// B x, or the inputs themselves without B.
template <class W>
struct Ranks {
  Projection<W> projection;
  bool projected;
};

template <int kTokens, class W, class Done>
__device__ void project(const Ranks<W>& ranks, Done done_with) {
  if (ranks.projected) return project<kTokens>(ranks.projection, done_with);
  const auto& x = ranks.projection.x;
  for (int m = 0; m < x.count; m++)
    for (int r = blockIdx.x * kThreads + threadIdx.x; r < x.size; r += gridDim.x * kThreads)
      done_with(m, r, float(x.data[m * int64_t(x.size) + r]));
}
template <int kTokens, class W>
int64_t items(const Ranks<W>& ranks) {
  return ranks.projected ? items<kTokens>(ranks.projection) : ceil_div(ranks.projection.x.size, kThreads);
}

constexpr int kUp = 0, kGate = 1;

template <class W, int kTokens>
struct Mlp {
  using T = typename W::Element;
  using Z = Computed<W, kTokens>;
  Ranks<W> ranks;
  Mask mask;
  int64_t first_gate_rank;
  Expansion<Z, W> sides[2];  // kUp and kGate, with the same tiles
  Neurons<T> neurons;
  Expansion<Z, W> down;
  Output<T> output;

  // Each rank belongs to up, to gate, or to both.
  __device__ void store_rank(int m, int64_t r, float h) const {
    const float z = mask.apply(h, r);
    if (r < sides[kUp].rows.rows) sides[kUp].z.store(m, r, z);
    if (neurons.gated && r >= first_gate_rank) sides[kGate].z.store(m, r - first_gate_rank, z);
  }
};

// The sums of up and gate for the neurons of a tile, in shared memory behind that of an expansion.
template <class W, int kTokens>
struct NeuronSums {
  float of[2][kTokens][kMostColumns<W, kTokens>];
};
template <class W, int kTokens>
constexpr Block kMlpBlock{kThreads, kBlock<W, kTokens>.shared_bytes + sizeof(NeuronSums<W, kTokens>)};

template <class W, int kTokens>
__device__ void compute_neurons(const Mlp<W, kTokens>& op, int tile) {
  auto& sums = shared_as<NeuronSums<W, kTokens>>(kBlock<W, kTokens>.shared_bytes);
  const int columns = op.sides[kUp].width * kPacket<W>;
  const int64_t first = int64_t(tile) * columns, left = op.down.z.rows - first;
#pragma unroll(W::kQuantized ? 1 : 2)  // the code for any width is long
  for (int side = kUp; side <= kGate; side++) {
    if (side == kGate && !op.neurons.gated) break;
    expand<kTokens>(op.sides[side], tile, [&](int m, int64_t n, float sum) { sums.of[side][m][n - first] = sum; });
  }
  __syncthreads();
  for (int i = threadIdx.x; i < op.down.z.tokens * columns; i += kThreads)
    if (const int m = i / columns, c = i % columns; c < left)
      op.down.z.store(m, first + c, op.neurons(first + c, sums.of[kUp][m][c], sums.of[kGate][m][c]));
  __syncthreads();
}

template <class W, int kTokens>
__global__ void __launch_bounds__(kThreads, 1) masked_mlp_kernel(const __grid_constant__ Mlp<W, kTokens> op) {
  project<kTokens>(op.ranks, [&](int m, int64_t r, float h) { op.store_rank(m, r, h); });
  if (op.ranks.projected) {  // without B, the first rows are kept no more than others
    fetch_ahead(op.sides[kUp], kAheadBytes / (op.neurons.gated ? 2 : 1));
    if (op.neurons.gated) fetch_ahead(op.sides[kGate], kAheadBytes / 2);
  }
  cooperative_groups::this_grid().sync();
  for_tiles(op.sides[kUp], [&](int tile) { compute_neurons(op, tile); });
  cooperative_groups::this_grid().sync();
  for_tiles(op.down, [&](int tile) {
    expand<kTokens>(op.down, tile, [&](int m, int64_t n, float sum) { op.output.store(m, n, sum); });
  });
}

// The rows of an MLP. Without a gate, `gate` is a copy of `up` that no kernel reads.
template <class W>
struct Weights {
  W up, gate, down;
};

template <class W, class T>
void decode(const Device& device, const Tensor& input, const Ranks<W>& ranks, const Mask& mask, int64_t first_gate_rank,
            const Weights<W>& weights, const Neurons<T>& neurons, const Output<T>& output) {
  const int M = ranks.projection.x.count;
  for_tokens<W>(M, [&](auto tokens) {
    const Kernel kernel(device, masked_mlp_kernel<W, tokens()>, kMlpBlock<W, tokens()>);
    const auto& [up, gate, down] = weights;
    Mlp<W, tokens()> op{ranks,           mask,
                        first_gate_rank, {{{nullptr, M, up.rows}, up}, {{nullptr, M, gate.rows}, gate}},
                        neurons,         {{nullptr, M, down.rows}, down},
                        output};
    auto &of_up = op.sides[kUp], &of_gate = op.sides[kGate];
    cut<tokens()>(op.ranks.projection);
    cut<tokens()>(of_up, kernel.blocks());
    cut<tokens()>(op.down, kernel.blocks());
    of_gate.width = of_up.width, of_gate.tiles = of_up.tiles;
    Workspace workspace;
    for (auto* expansion : {&of_up, &of_gate, &op.down}) workspace.add(expansion->z);
    const Tensor memory = workspace.allocate(input);
    kernel.launch(std::max<int64_t>(items<tokens()>(op.ranks), std::max(of_up.tiles, op.down.tiles)), op);
  });
}

// Computes z = m ⊙ g for many tokens, [tokens, neurons], from the products of up and gate without their biases.
template <class T>
__global__ void __launch_bounds__(kPlainBlock.threads)
    neurons_kernel(const __grid_constant__ Neurons<T> neurons, const float* up, const float* gate, int64_t tokens,
                   int64_t size, T* z) {
  for_each(tokens * size, [&](int64_t i) { z[i] = T(neurons(i % size, up[i], gate[i])); });
}

// The arguments of the op that are not small floats of their own. For many tokens all weights are floats.
struct Given {
  Tensor x;
  OptionalTensor B;
  Tensor up_rows;
  OptionalTensor gate_rows, up_bias, gate_bias;
  Tensor down_rows;
  OptionalTensor down_bias;
  OptionalTensor B_scale, up_scale, gate_scale, down_scale;

  // Whether all weights can be Plain<T>.
  template <class T>
  bool plain(const Packed<T>& x) const {
    const bool projected = is_plain<T>(B, B_scale) && (!B || on_16_bytes(x.data));
    return projected && is_plain<T>(up_rows, up_scale) && is_plain<T>(gate_rows, gate_scale) &&
           is_plain<T>(down_rows, down_scale);
  }
  // Returns the same with float weights, for an input of the type of `in`.
  Given floats(const InType& in) const {
    return {in(x),
            in(B, B_scale, last_size(x)),
            in.rows(up_rows, up_scale),
            in.rows(gate_rows, gate_scale),
            in(up_bias),
            in(gate_bias),
            in.rows(down_rows, down_scale),
            in(down_bias)};
  }
  int64_t first_gate_rank() const { return ::first_gate_rank(B ? B->size(0) : last_size(x), gate_rows); }
};

// Returns the kept ranks of many tokens, or their kept inputs without B.
template <class T>
Tensor kept_ranks(const Device& device, const Tensor& x, const OptionalTensor& B, const Mask& mask) {
  if (!B) return masked<T, T>(device, x, mask, x.scalar_type());
  return masked<float, T>(device, wide_product(x, torch::stable::transpose(*B, 0, 1)), mask, x.scalar_type());
}

template <class T>
Tensor prefill(const Device& device, const Given& given, const Mask& mask, const Neurons<T>& neurons) {
  const Tensor &x = given.x, &up_rows = given.up_rows, &down_rows = given.down_rows;
  const OptionalTensor& gate_rows = given.gate_rows;
  const int64_t tokens = tokens_of(x), size = down_rows.size(0);
  Tensor kept = kept_ranks<T>(device, tokens_in_rows(x), given.B, mask);
  const auto product = [&](int64_t first, const Tensor& rows) {
    return wide_product(torch::stable::narrow(kept, 1, first, rows.size(0)), rows);
  };
  const Tensor up = product(0, up_rows), gate = gate_rows ? product(given.first_gate_rank(), *gate_rows) : up;
  Tensor z = torch::stable::new_empty(x, {tokens, size});
  if (size > 0)
    device.launch(neurons_kernel<T>, blocks_for_each(device, tokens * size), kPlainBlock, false, neurons,
                  static_cast<const float*>(up.const_data_ptr()), static_cast<const float*>(gate.const_data_ptr()),
                  tokens, size, static_cast<T*>(z.mutable_data_ptr()));
  return last_product(z, down_rows, given.down_bias, x);
}

template <class W>
void decode(const Device& device, const Given& given, const Packed<typename W::Element>& input, const Mask& mask,
            const Neurons<typename W::Element>& neurons, Tensor& y) {
  using T = typename W::Element;
  const auto down_b = packed<T>(given.down_bias);
  const W up = stored_rows<W>(given.up_rows, given.up_scale);
  const W gate = given.gate_rows ? stored_rows<W>(*given.gate_rows, given.gate_scale) : up;
  const Weights<W> weights{up, gate, stored_rows<W>(given.down_rows, given.down_scale)};
  const int tokens = int(tokens_of(given.x)), size = int(last_size(given.x));
  Ranks<W> ranks{{{input.data, size, tokens}}, given.B.has_value()};
  if (given.B) ranks.projection = projection(input, tokens, stored<W>(*given.B, given.B_scale, size));
  decode(device, given.x, ranks, mask, given.first_gate_rank(), weights, neurons, output(down_b, y));
}

// The masks of the op, and the activation between them.
struct Masks {
  Mask ranks, neurons;
  Activation activation;

  template <class T>
  Neurons<T> between(const std::optional<Packed<T>>& up_bias, const std::optional<Packed<T>>& gate_bias,
                     bool gated) const {
    return {data_of(up_bias), data_of(gate_bias), gated, activation, neurons};
  }
};

// Computes the op. y is not empty.
Tensor compute(const Device& device, const Given& given, const Masks& masks) {
  Tensor y = given.x;
  for_dtype(given.x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const auto up_b = packed<T>(given.up_bias), gate_b = packed<T>(given.gate_bias);
    const Neurons<T> neurons = masks.between(up_b, gate_b, given.gate_rows.has_value());
    if (tokens_of(given.x) > kDecodeTokens) {
      y = prefill<T>(device, given, masks.ranks, neurons);
    } else {
      y = empty_output(given.x, rana::columns_of(given.down_rows));
      const Packed<T> input(given.x);
      for_storage<T>(given.plain(input), [&](auto storage) {
        decode<typename decltype(storage)::Type>(device, given, input, masks.ranks, neurons, y);
      });
    }
  });
  return y;
}

Tensor masked_mlp(const Tensor& x, const OptionalTensor& B, const Tensor& up_rows, const OptionalTensor& gate_rows,
                  const Tensor& threshold, const OptionalTensor& norms, const OptionalTensor& up_bias,
                  const OptionalTensor& gate_bias, const Tensor& down_rows, const Tensor& down_norms,
                  const Tensor& down_threshold, const OptionalTensor& down_bias, const Text& activation,
                  const OptionalTensor& B_scale, const OptionalTensor& up_scale, const OptionalTensor& gate_scale,
                  const OptionalTensor& down_scale) {
  const Activation function = find_activation(activation.value);
  rana::check_masked_mlp(x, B, up_rows, gate_rows, threshold, norms, up_bias, gate_bias, down_rows, down_norms,
                         down_threshold, down_bias, activation.value, B_scale, up_scale, gate_scale, down_scale,
                         function != Activation::unknown);
  const int64_t columns = rana::columns_of(down_rows);
  if (tokens_of(x) * columns == 0) return empty_output(x, columns);
  const Device device("masked_mlp", x);
  const Packed<float> t(threshold), down_t(down_threshold), down_n(down_norms);
  const auto n = packed<float>(norms);
  const Masks masks{
      {t.data, int(threshold.dim()), data_of(n)}, {down_t.data, int(down_threshold.dim()), down_n.data}, function};
  const Given given{x,         B,         up_rows, gate_rows, up_bias,    gate_bias,
                    down_rows, down_bias, B_scale, up_scale,  gate_scale, down_scale};
  if (tokens_of(x) <= kDecodeTokens) return compute(device, given, masks);
  const InType in(device, working_type(x, B_scale || up_scale || gate_scale));
  return in_type_of(x, compute(device, given.floats(in), masks));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rana, CUDA, m) { m.impl("masked_mlp", TORCH_BOX(&masked_mlp)); }
