#include "activation.h"
#include "launch.h"

namespace {

template <class T>
struct Mlp {
  Plain<T> B, up_rows;
  std::optional<Plain<T>> gate_rows;
  int64_t first_gate_rank;
  const float* threshold;
  const T *up_bias, *gate_bias;
  Plain<T> down_rows;
  Mask down_mask;
  const T* down_bias;
  Activation activation;

  int64_t neurons() const { return up_rows.columns; }
  Mask rank_mask(int64_t first) const { return {threshold + first, 1, nullptr}; }
};

// The neurons g of a block of tokens. With a gate, g first holds the sums of up in lane order, until those of gate are
// known.
template <class T>
struct Neurons {
  float* g;  // [tokens, ldg], ldg a whole number of chunks
  int64_t ldg, neurons;
  Activation activation;

  Chunk activate(Chunk c) const { return {activation(c.lo), activation(c.hi)}; }

  auto keep_up(const T* bias) const {
    return
        [=, *this](int64_t m, int64_t n, Chunk sums) { store(g + m * ldg + n, add_bias(sums, bias, n, neurons - n)); };
  }
  auto activate_up(const T* bias) const {
    return [=, *this](int64_t m, int64_t n, Chunk sums) {
      store_natural<T>(g + m * ldg + n, activate(add_bias(sums, bias, n, neurons - n)), kChunk);
    };
  }
  auto gate_up(const T* bias) const {
    return [=, *this](int64_t m, int64_t n, Chunk sums) {
      const Chunk up = load(g + m * ldg + n), gate = activate(add_bias(sums, bias, n, neurons - n));
      store_natural<T>(g + m * ldg + n, {up.lo * gate.lo, up.hi * gate.hi}, kChunk);
    };
  }
};

// Computes one block of tokens in three parallel regions: h = B x, then the neurons g, then y over the live neurons.
// Nothing is rounded between them.
template <class T>
void mlp_block(const Mlp<T>& mlp, const T* x, int64_t tokens, T* y) {
  const std::vector<float> h = project(x, tokens, mlp.B);
  const int64_t ldg = chunks_of(mlp.neurons()) * kChunk;
  std::vector<float> g(tokens * ldg);
  const Neurons<T> neurons{g.data(), ldg, mlp.neurons(), mlp.activation};
  for_method<Plain<T>>(tokens, [&](auto method) {
    using Kept = Masked<decltype(method)>;
    const int64_t ldh = mlp.B.rows, first = mlp.first_gate_rank, gate_ranks = mlp.gate_rows ? mlp.gate_rows->rows : 0;
    const Kept up(h.data(), ldh, tokens, mlp.up_rows.rows, mlp.rank_mask(0));
    const Kept gate(h.data() + first, ldh, tokens, gate_ranks, mlp.rank_mask(first));
    for_column_slices(mlp.neurons(), (mlp.up_rows.rows + gate_ranks) * tokens, [&](int64_t begin, int64_t end) {
      if (!mlp.gate_rows) return sum_rows(up, mlp.up_rows, begin, end, neurons.activate_up(mlp.up_bias));
      sum_rows(up, mlp.up_rows, begin, end, neurons.keep_up(mlp.up_bias));
      sum_rows(gate, *mlp.gate_rows, begin, end, neurons.gate_up(mlp.gate_bias));
    });
  });
  expand(g.data(), ldg, tokens, mlp.down_rows, mlp.down_mask, {y, mlp.down_rows.columns, mlp.down_bias});
}

Tensor masked_mlp(const Tensor& x, const Tensor& B, const Tensor& up_rows, const OptionalTensor& gate_rows,
                  const Tensor& threshold, const OptionalTensor& up_bias, const OptionalTensor& gate_bias,
                  const Tensor& down_rows, const Tensor& down_norms, const Tensor& down_threshold,
                  const OptionalTensor& down_bias, std::string activation) {
  const Activation function = find_activation(activation);
  rana::check_masked_mlp(x, B, up_rows, gate_rows, threshold, up_bias, gate_bias, down_rows, down_norms, down_threshold,
                         down_bias, activation, function != nullptr);
  const int64_t size = last_size(x), columns = down_rows.size(1);
  Tensor y = empty_output(x, columns);
  const Packed<float> t(threshold), down_t(down_threshold), down_n(down_norms);
  for_dtype(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Packed<T> input(x);
    const auto up_b = packed<T>(up_bias), gate_b = packed<T>(gate_bias), down_b = packed<T>(down_bias);
    const Mlp<T> mlp{plain<T>(B),
                     plain<T>(up_rows),
                     gate_rows ? std::optional(plain<T>(*gate_rows)) : std::nullopt,
                     first_gate_rank(B, gate_rows),
                     t.data,
                     data_of(up_b),
                     data_of(gate_b),
                     plain<T>(down_rows),
                     {down_t.data, down_threshold.dim(), down_n.data},
                     data_of(down_b),
                     function};
    for_blocks(tokens_of(x), [&](int64_t first, int64_t tokens) {
      mlp_block<T>(mlp, input.data + first * size, tokens, static_cast<T*>(y.mutable_data_ptr()) + first * columns);
    });
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rana, CPU, m) { m.impl("masked_mlp", TORCH_BOX(&masked_mlp)); }
