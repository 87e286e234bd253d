#include "activation.h"
#include "launch.h"

namespace {

template <class T>
struct Mlp {
  std::optional<Weight> B;
  Weight up_rows;
  std::optional<Weight> gate_rows;
  int64_t first_gate_rank;
  Mask mask;  // of the ranks, or of x without B
  const T *up_bias, *gate_bias;
  Weight down_rows;
  Mask down_mask;
  const T* down_bias;
  Activation activation;

  int64_t neurons() const { return up_rows.columns; }
  Mask gate_mask() const {
    return {mask.threshold + first_gate_rank * mask.threshold_step, mask.threshold_step, mask.norms};
  }
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

// What up and gate keep of h [tokens, ranks].
template <class Kept>
struct GatedRanks {
  Kept up;
  std::optional<Kept> own;  // of gate, unless both read the same values

  template <class T>
  GatedRanks(const Mlp<T>& mlp, const std::vector<float>& h, int64_t ldh, int64_t tokens)
      : up(h.data(), ldh, tokens, mlp.up_rows.rows(), mlp.mask) {
    const int64_t first = mlp.first_gate_rank, gate_ranks = mlp.gate_rows->rows();
    if (first > 0 || gate_ranks != mlp.up_rows.rows())
      own.emplace(h.data() + first, ldh, tokens, gate_ranks, mlp.gate_mask());
  }
  const Kept& gate() const { return own ? *own : up; }
};

// Computes g from h [tokens, ranks] where up and gate are stored alike: one parallel region reads both.
template <class W, class T>
void gated_neurons(const Mlp<T>& mlp, const std::vector<float>& h, int64_t ldh, int64_t tokens, const W& up_rows,
                   const W& gate_rows, const Neurons<T>& neurons) {
  const auto keep_up = in_lanes_of<T, W>(neurons.keep_up(mlp.up_bias));
  const auto gate_up = in_lanes_of<T, W>(neurons.gate_up(mlp.gate_bias));
  if (tokens == 1) {
    const GatedRanks<OneToken<W>> ranks(mlp, h, ldh, tokens);
    return sum_shares<2, W>({{&ranks.up, &up_rows}, {&ranks.gate(), &gate_rows}},
                            [=](int64_t n, const Chunk(&sums)[2]) { keep_up(0, n, sums[0]), gate_up(0, n, sums[1]); });
  }
  for_method<W>(tokens, [&](auto method) {
    const GatedRanks<Masked<decltype(method)>> ranks(mlp, h, ldh, tokens);
    for_column_slices<W>(mlp.neurons(), (up_rows.rows + gate_rows.rows) * tokens, [&](int64_t begin, int64_t end) {
      sum_rows(ranks.up, up_rows, begin, end, keep_up);
      sum_rows(ranks.gate(), gate_rows, begin, end, gate_up);
    });
  });
}

template <class T>
void compute_neurons(const Mlp<T>& mlp, const std::vector<float>& h, int64_t ldh, int64_t tokens,
                     const Neurons<T>& neurons) {
  if (!mlp.gate_rows) {
    expand<T>(h.data(), ldh, tokens, mlp.up_rows, mlp.mask, neurons.activate_up(mlp.up_bias));
  } else if (mlp.up_rows.stored_as(*mlp.gate_rows)) {
    for_rows<T>(mlp.up_rows, tokens, [&](const auto& up_rows) {
      for_rows<T>(*mlp.gate_rows, tokens, [&](const auto& gate_rows) {
        if constexpr (std::is_same_v<decltype(up_rows), decltype(gate_rows)>)
          gated_neurons(mlp, h, ldh, tokens, up_rows, gate_rows, neurons);
      });
    });
  } else {
    expand<T>(h.data(), ldh, tokens, mlp.up_rows, mlp.mask, neurons.keep_up(mlp.up_bias));
    expand<T>(h.data() + mlp.first_gate_rank, ldh, tokens, *mlp.gate_rows, mlp.gate_mask(),
              neurons.gate_up(mlp.gate_bias));
  }
}

// Computes one block of tokens in parallel regions: h = B x (or x itself), then the neurons g, then y over the live
// neurons. Nothing is rounded between them.
template <class T>
void mlp_block(const Mlp<T>& mlp, const T* x, int64_t size, int64_t tokens, T* y) {
  const std::vector<float> h = mlp.B ? project<T>(x, tokens, {*mlp.B}) : widened(x, tokens * size);
  const int64_t ldg = chunks_of(mlp.neurons()) * kChunk;
  std::vector<float> g(tokens * ldg);
  compute_neurons(mlp, h, mlp.B ? mlp.B->rows() : size, tokens,
                  Neurons<T>{g.data(), ldg, mlp.neurons(), mlp.activation});
  expand<T>(g.data(), ldg, tokens, mlp.down_rows, mlp.down_mask, Output<T>{y, mlp.down_rows.columns, mlp.down_bias});
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
                         function != nullptr);
  const int64_t size = last_size(x), ranks = B ? B->size(0) : size;
  const Weight down(down_rows, down_scale);
  Tensor y = empty_output(x, down.columns);
  const Packed<float> t(threshold), down_t(down_threshold), down_n(down_norms);
  const auto n = packed<float>(norms);
  for_dtype(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Packed<T> input(x);
    const auto up_b = packed<T>(up_bias), gate_b = packed<T>(gate_bias), down_b = packed<T>(down_bias);
    const Mlp<T> mlp{B ? std::optional<Weight>(std::in_place, *B, B_scale, size) : std::nullopt,
                     Weight(up_rows, up_scale),
                     gate_rows ? std::optional<Weight>(std::in_place, *gate_rows, gate_scale) : std::nullopt,
                     first_gate_rank(ranks, gate_rows),
                     {t.data, threshold.dim(), data_of(n)},
                     data_of(up_b),
                     data_of(gate_b),
                     down,
                     {down_t.data, down_threshold.dim(), down_n.data},
                     data_of(down_b),
                     function};
    for_blocks(tokens_of(x), [&](int64_t first, int64_t tokens) {
      mlp_block<T>(mlp, input.data + first * size, size, tokens,
                   static_cast<T*>(y.mutable_data_ptr()) + first * down.columns);
    });
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rana, CPU, m) { m.impl("masked_mlp", TORCH_BOX(&masked_mlp)); }
