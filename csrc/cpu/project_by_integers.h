// h = B x for a few tokens and quantised weights, in whole numbers.
//
// x becomes fixed point: 15 bits and a sign, with one step for every 32 columns of a token. The sums over 32 columns
// are exact; then they become float32 and meet the scales.
#pragma once

#include <vector>

#include "integers.h"
#include "project_by_vectors.h"

#if defined(__SSE2__)

namespace {

// x [tokens, size] in fixed point, in the order in which weights of kWidth bits are multiplied. Columns after the last
// whole block stay float32. Zeros complete the last span.
template <int kWidth>
class FixedInputs {
 public:
  static constexpr int kSpan = integers::kSpan<kWidth>, kBlocks = integers::kSpanBlocks<kWidth>;
  static constexpr int kShifts = integers::kShifts<kWidth>;

  FixedInputs(const float* x, int64_t tokens, int64_t size)
      : spans_(size),
        count_(spans_.count()),
        words_(tokens * count_ * kShifts),
        zero_(tokens * count_),
        step_(tokens * count_),
        finite_(tokens) {
    for (int64_t m = 0; m < tokens; m++) {
      finite_[m] = true;
      for (int64_t s = 0; s < count_; s++) set(x + m * size + s * kSpan, spans_.columns - s * kSpan, m, s);
    }
  }

  const integers::Spans<kWidth>& spans() const { return spans_; }
  bool finite(int64_t m) const { return finite_[m]; }
  Bits words(int64_t m, int64_t span, int shift) const { return words_[(m * count_ + span) * kShifts + shift]; }
  Ints zero(int64_t m, int64_t span) const { return zero_[m * count_ + span]; }  // what the sums start from
  Vec step(int64_t m, int64_t span) const { return step_[m * count_ + span]; }

 private:
  static constexpr int kBlockColumns = kSpan / kBlocks, kBlockLanes = kLanes / kBlocks;

  // Takes a span of a token, of which `columns` are left.
  void set(const float* x, int64_t columns, int64_t m, int64_t span) {
    using namespace integers;
    int16_t fixed[kShifts][kSpan / kShifts];
    int32_t zero[kLanes];
    float steps[kLanes];
    for (int block = 0; block < kBlocks; block++) {
      int32_t values[kBlockColumns] = {}, with_offset = 0;
      const float step = block * kBlockColumns < columns ? set_block(x + block * kBlockColumns, m, values) : 0.0f;
      constexpr int kWords = kBlockColumns / kShifts;
      for (int word = block * kWords; word < (block + 1) * kWords; word++)
        for_shifts<kWidth>([&](auto shift) {
          const int32_t value = values[column_of<kWidth>(word, shift()) - block * kBlockColumns];
          fixed[shift()][word] = value;
          with_offset += offset_of<kWidth, shift()> ? value : 0;
        });
      for (int lane = block * kBlockLanes; lane < (block + 1) * kBlockLanes; lane++) {
        zero[lane] = -kOffset<kWidth> / kBlockLanes * with_offset;  // all lanes of a block are added in the end
        steps[lane] = step;
      }
    }
    for (int shift = 0; shift < kShifts; shift++)
      words_[(m * count_ + span) * kShifts + shift] = load_bytes<Bits>(fixed[shift]);
    zero_[m * count_ + span] = load_bytes<Ints>(zero);
    step_[m * count_ + span] = load_bytes<Vec>(steps);
  }
  // Returns the step of a block, in which `values` are whole numbers.
  float set_block(const float* x, int64_t m, int32_t* values) {
    using namespace integers;
    Ints largest = {};
    for (int i = 0; i < kBlockColumns; i += kLanes) largest = larger(largest, magnitude(load_bytes<Vec>(x + i)));
    const int32_t of_block = largest_lane(largest);
    finite_[m] = finite_[m] && integers::finite(of_block);
    const Step step(of_block - Ints{});
    for (int i = 0; i < kBlockColumns; i += kLanes) {
      const Ints v = step(load_bytes<Vec>(x + i));
      std::memcpy(values + i, &v, sizeof v);
    }
    return step.step[0];
  }

  integers::Spans<kWidth> spans_;
  int64_t count_;
  std::vector<Bits> words_;
  std::vector<Ints> zero_;
  std::vector<Vec> step_;
  std::vector<char> finite_;
};

// Some tokens of x, from `token` on: as whole numbers, and [.., size] in float32.
template <int kWidth>
struct FixedTokens {
  const FixedInputs<kWidth>* fixed;
  const float* floats;
  int64_t token;
};

template <int kWidth>
FixedTokens<kWidth> skip_tokens(FixedTokens<kWidth> x, int64_t count, int64_t size) {
  return {x.fixed, x.floats + count * size, x.token + count};
}

// The same as for float32, span by span.
template <int kRows, int kTokens, class W, int kWidth, class Ahead>
void dot_tile(const W& B, int64_t first, int64_t apart, FixedTokens<kWidth> x, Ahead& ahead, float* room, float* h,
              int64_t ldh) {
  using Inputs = FixedInputs<kWidth>;
  constexpr int kSpan = Inputs::kSpan, kShifts = Inputs::kShifts, kBlocks = Inputs::kBlocks;
  const int64_t size = B.columns;
  typename W::Term term[kRows];
  for (int r = 0; r < kRows; r++) term[r] = W::term(B.at(first + r * apart, 0), 1.0f, size, room + r * W::room(size));
  Vec sums[kTokens][kRows] = {};
  integers::for_spans(x.fixed->spans(), [&](int64_t n, auto load) {
    const int64_t s = n / kSpan;
    ahead.ask(lines_of<W>(kRows * kSpan));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      const Bits words = integers::without_signs<kWidth>(load(term[r].steps + n * kWidth / 8));
      Bits q[kShifts];
      integers::for_shifts<kWidth>([&](auto i) { q[i()] = integers::weights<kWidth, i()>(words); });
      const Vec scale = integers::spread<kBlocks, Vec>(term[r].factor + n / kScaleColumns);
      for (int m = 0; m < kTokens; m++) {
        Ints sum = x.fixed->zero(x.token + m, s);
#pragma GCC unroll 4
        for (int i = 0; i < kShifts; i++) sum = integers::multiply_add(sum, q[i], x.fixed->words(x.token + m, s, i));
        sums[m][r] += x.fixed->step(x.token + m, s) * scale * to_floats(sum);
      }
    }
  });
  for (int64_t k = x.fixed->spans().columns; k < size; k += kChunk)
    for (int r = 0; r < kRows; r++) {
      const auto w = term[r].operand(k, size - k);
      for (int m = 0; m < kTokens; m++)
        sums[m][r] = multiply_add(sums[m][r], load_first(x.floats + m * size + k, size - k), w);
    }
  for (int m = 0; m < kTokens; m++)
    for (int r = 0; r < kRows; r++) h[m * ldh + r * apart] = sum(sums[m][r]);
}

// A method: whole numbers, for a few tokens.
template <class W>
struct ByIntegers {};

template <int kWidth>
struct FixedAndFloats {
  FixedInputs<kWidth> fixed;
  const float* floats;
};

template <class W>
FixedAndFloats<W::kBits> arrange(ByIntegers<W>, const float* x, int64_t tokens, int64_t size) {
  return {FixedInputs<W::kBits>(x, tokens, size), x};
}

// h[m][r] = B[r] · x[m] for r in [begin, end) and all tokens; h is [tokens, ldh]. A token that is not finite takes
// float32, so that Inf and NaN reach h.
template <class W>
void project_rows(ByIntegers<W>, const W& B, const FixedAndFloats<W::kBits>& x, int64_t tokens, int64_t begin,
                  int64_t end, float* h, int64_t ldh) {
  dot_rows_of_few(B, FixedTokens<W::kBits>{&x.fixed, x.floats, 0}, tokens, begin, end, h, ldh);
  for (int64_t m = 0; m < tokens; m++)
    if (!x.fixed.finite(m)) dot_rows_of_few(B, x.floats + m * B.columns, 1, begin, end, h + m * ldh, ldh);
}

}  // namespace

#endif
