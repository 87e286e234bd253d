// h = B x for a few tokens and 4-bit weights, in whole numbers.
//
// x becomes fixed point: 15 bits and a sign, with one step for every 32 columns of a token. The sums over 32 columns
// are exact; then they become float32 and meet the scales.
#pragma once

#include <vector>

#include "integers.h"
#include "project_by_vectors.h"

#if defined(__SSE2__)

namespace {

// x [tokens, size] in fixed point, in the order in which nibbles are multiplied. Columns after the last whole span
// stay float32.
class FixedInputs {
 public:
  static constexpr int kWidth = 4;
  static constexpr int kSpan = integers::kSpan<kWidth>, kBlocks = integers::kSpanBlocks<kWidth>;
  static constexpr int kShifts = integers::kShifts<kWidth>;

  FixedInputs(const float* x, int64_t tokens, int64_t size)
      : spans_(size / kSpan),
        words_(tokens * spans_ * kShifts),
        zero_(tokens * spans_),
        step_(tokens * spans_),
        finite_(tokens) {
    for (int64_t m = 0; m < tokens; m++) {
      finite_[m] = true;
      for (int64_t s = 0; s < spans_; s++) set(x + m * size + s * kSpan, m, s);
    }
  }

  int64_t spans() const { return spans_; }
  bool finite(int64_t m) const { return finite_[m]; }
  Bits words(int64_t m, int64_t span, int shift) const { return words_[(m * spans_ + span) * kShifts + shift]; }
  Ints zero(int64_t m, int64_t span) const { return zero_[m * spans_ + span]; }  // what the sums start from
  Vec step(int64_t m, int64_t span) const { return step_[m * spans_ + span]; }

 private:
  void set(const float* x, int64_t m, int64_t span) {
    using namespace integers;
    constexpr int kOfBlock = kScaleColumns / kLanes, kBlockLanes = kLanes / kBlocks;
    int16_t fixed[kShifts][kSpan / kShifts];
    int32_t zero[kLanes];
    float steps[kLanes];
    for (int block = 0; block < kBlocks; block++) {
      const float* const first = x + block * kScaleColumns;
      Ints largest = {};
      for (int i = 0; i < kOfBlock; i++) largest = larger(largest, magnitude(load_bytes<Vec>(first + i * kLanes)));
      const int32_t of_block = largest_lane(largest);
      finite_[m] = finite_[m] && integers::finite(of_block);
      const Step step(of_block - Ints{});
      int32_t values[kScaleColumns], sum = 0;
      for (int i = 0; i < kOfBlock; i++) {
        const Ints v = step(load_bytes<Vec>(first + i * kLanes));
        std::memcpy(values + i * kLanes, &v, sizeof v);
      }
      for (int32_t v : values) sum += v;
      for (int word = block * 8; word < block * 8 + 8; word++)
        for (int shift = 0; shift < kShifts; shift++)
          fixed[shift][word] = values[column_of<kWidth>(word, shift) - block * kScaleColumns];
      for (int lane = block * kBlockLanes; lane < (block + 1) * kBlockLanes; lane++) {
        zero[lane] = -kOffset<kWidth> / kBlockLanes * sum;  // all lanes of a block are added in the end
        steps[lane] = step.step[0];
      }
    }
    for (int shift = 0; shift < kShifts; shift++)
      words_[(m * spans_ + span) * kShifts + shift] = load_bytes<Bits>(fixed[shift]);
    zero_[m * spans_ + span] = load_bytes<Ints>(zero);
    step_[m * spans_ + span] = load_bytes<Vec>(steps);
  }
  int64_t spans_;
  std::vector<Bits> words_;
  std::vector<Ints> zero_;
  std::vector<Vec> step_;
  std::vector<char> finite_;
};

// Some tokens of x, from `token` on: as whole numbers, and [.., size] in float32.
struct FixedTokens {
  const FixedInputs* fixed;
  const float* floats;
  int64_t token;
};

inline FixedTokens skip_tokens(FixedTokens x, int64_t count, int64_t size) {
  return {x.fixed, x.floats + count * size, x.token + count};
}

// The same as for float32, span by span.
template <int kRows, int kTokens, class W>
void dot_tile(const W& B, int64_t first, int64_t apart, FixedTokens x, float* room, float* h, int64_t ldh) {
  using namespace integers;
  constexpr int kSpan = FixedInputs::kSpan, kShifts = FixedInputs::kShifts, kBlocks = FixedInputs::kBlocks;
  const int64_t size = B.columns, spans = x.fixed->spans();
  typename W::Row row[kRows];
  typename W::Term term[kRows];
  for (int r = 0; r < kRows; r++) {
    row[r] = B.at(first + r * apart, 0);
    term[r] = W::term(row[r], 1.0f, size, room + r * W::room(size));
  }
  Vec sums[kTokens][kRows] = {};
  for (int64_t s = 0; s < spans; s++)
    for (int r = 0; r < kRows; r++) {
      if (kRowAheadBytes) ask_for<W>(row[r], s * kSpan + columns_in<W>(kRowAheadBytes), kSpan);
      const Bits words = load_bytes<Bits>(row[r].steps + s * kVectorBytes);
      const Bits q[kShifts] = {lowest<4>(words), lowest<4>(words >> 4), lowest<4>(words >> 8), lowest<4>(words >> 12)};
      const Vec scale = spread<kBlocks, Vec>(term[r].factor + s * kBlocks);
      for (int m = 0; m < kTokens; m++) {
        Ints sum = x.fixed->zero(x.token + m, s);
#pragma GCC unroll 4
        for (int i = 0; i < kShifts; i++) sum = multiply_add(sum, q[i], x.fixed->words(x.token + m, s, i));
        sums[m][r] += x.fixed->step(x.token + m, s) * scale * to_floats(sum);
      }
    }
  for (int64_t k = spans * kSpan; k < size; k += kChunk)
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

struct FixedAndFloats {
  FixedInputs fixed;
  const float* floats;
};

template <class W>
FixedAndFloats arrange(ByIntegers<W>, const float* x, int64_t tokens, int64_t size) {
  return {FixedInputs(x, tokens, size), x};
}

// h[m][r] = B[r] · x[m] for r in [begin, end) and all tokens; h is [tokens, ldh]. A token that is not finite takes
// float32, so that Inf and NaN reach h.
template <class W>
void project_rows(ByIntegers<W>, const W& B, const FixedAndFloats& x, int64_t tokens, int64_t begin, int64_t end,
                  float* h, int64_t ldh) {
  dot_streams<kRowsOfFew>(B, FixedTokens{&x.fixed, x.floats, 0}, tokens, begin, end, h, ldh);
  for (int64_t m = 0; m < tokens; m++)
    if (!x.fixed.finite(m)) dot_streams<kRowsOfFew>(B, x.floats + m * B.columns, 1, begin, end, h + m * ldh, ldh);
}

}  // namespace

#endif
