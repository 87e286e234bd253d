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
        blocks_(size / kScaleColumns),
        step_ld_((blocks_ + 2 * kLanes) / kLanes * kLanes),
        words_(tokens * count_ * kShifts),
        zero_(tokens * count_),
        step_(tokens * count_),
        steps_(tokens * step_ld_, 1.0f),
        finite_(tokens, true) {
    for (int64_t m = 0; m < tokens; m++) {
      for (int64_t b = 0; b < blocks_; b++) set(x + m * size + b * kScaleColumns, m, b);
      for (int64_t s = 0; s < count_; s++)
        step_[m * count_ + s] = integers::spread<kBlocks, Vec>(steps(m) + s * kSpan / kScaleColumns);
    }
  }

  const integers::Spans<kWidth>& spans() const { return spans_; }
  bool finite(int64_t m) const { return finite_[m]; }
  Bits words(int64_t m, int64_t span, int shift) const { return words_[(m * count_ + span) * kShifts + shift]; }
  // What the sums of a span start from. With 512 bits, a load costs less than a copy of a register.
  Ints zero(int64_t m, int64_t span) const {
    const Ints* const zero = zero_.data() + m * count_ + span;
    if constexpr (kVectorBytes == 64) return *static_cast<const volatile Ints*>(zero);
    return *zero;
  }
  Vec step(int64_t m, int64_t span) const { return step_[m * count_ + span]; }
  // The step of each block, and at least a vector of ones.
  const float* steps(int64_t m) const { return steps_.data() + m * step_ld_; }

 private:
  static constexpr int kPartColumns = kSpan / kBlocks;  // of a block: those that lie in one span

  // Takes a block of a token.
  void set(const float* x, int64_t m, int64_t block) {
    int32_t values[kScaleColumns];
    steps_[m * step_ld_ + block] = round(x, m, values);
    for (int64_t n = 0; n < kScaleColumns; n += kPartColumns) {
      const int64_t column = block * kScaleColumns + n;
      set_part(values + n, m * count_ + column / kSpan, column % kSpan);
    }
  }
  // Takes the columns of a span from `first` on.
  void set_part(const int32_t* values, int64_t span, int first) {
    using namespace integers;
    constexpr int kWords = kPartColumns / kShifts, kPartLanes = kLanes / kBlocks;
    int32_t with_offset = 0;
    for_shifts<kWidth>([&](auto shift) {
      int16_t fixed[kWords];
      for (int word = 0; word < kWords; word++) {
        const int32_t value = values[column_of<kWidth>(word, shift())];
        fixed[word] = value;
        with_offset += offset_of<kWidth, shift()> ? value : 0;
      }
      std::memcpy(reinterpret_cast<int16_t*>(&words_[span * kShifts + shift()]) + first / kShifts, fixed, sizeof fixed);
    });
    int32_t zero[kPartLanes];  // all lanes of a part are added in the end
    std::fill_n(zero, kPartLanes, -kOffset<kWidth> / kPartLanes * with_offset);
    std::memcpy(reinterpret_cast<int32_t*>(&zero_[span]) + first / kPartColumns * kPartLanes, zero, sizeof zero);
  }
  // Returns the step of a block, in which `values` are whole numbers.
  float round(const float* x, int64_t m, int32_t* values) {
    using namespace integers;
    Ints largest = {};
    for (int i = 0; i < kScaleColumns; i += kLanes) largest = larger(largest, magnitude(load_bytes<Vec>(x + i)));
    const int32_t of_block = largest_lane(largest);
    finite_[m] = finite_[m] && integers::finite(of_block);
    const Step step(of_block - Ints{});
    for (int i = 0; i < kScaleColumns; i += kLanes) {
      const Ints v = step(load_bytes<Vec>(x + i));
      std::memcpy(values + i, &v, sizeof v);
    }
    return step.step[0];
  }

  integers::Spans<kWidth> spans_;
  int64_t count_, blocks_, step_ld_;
  LineVector<Bits> words_;
  LineVector<Ints> zero_;
  LineVector<Vec> step_;
  LineVector<float> steps_;
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

// The same as for float32, span by span. For one token its steps are part of the factors of a row.
template <int kRows, int kTokens, class W, int kWidth, class Ahead>
void dot_tile(const W& B, int64_t first, int64_t apart, FixedTokens<kWidth> x, Ahead& ahead, float* room, float* h,
              int64_t ldh) {
  using Inputs = FixedInputs<kWidth>;
  constexpr int kSpan = Inputs::kSpan, kShifts = Inputs::kShifts, kBlocks = Inputs::kBlocks;
  const int64_t size = B.columns;
  typename W::Term term[kRows];
  for (int r = 0; r < kRows; r++) {
    const auto row = B.at(first + r * apart, 0);
    float* const into = room + r * W::room(size);
    if constexpr (kTokens == 1) term[r] = W::term(row, x.fixed->steps(x.token), size, into);
    else term[r] = W::term(row, 1.0f, size, into);
  }
  Vec sums[kTokens][kRows];
#pragma GCC unroll 4
  for (int m = 0; m < kTokens; m++)
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) sums[m][r] = Vec{};
  integers::for_spans(x.fixed->spans(), [&](int64_t n, auto load) {
    const int64_t s = n / kSpan, block = n / kScaleColumns;
    ahead.ask(lines_of<W>(kRows * kSpan));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      const Bits words = integers::words_of_weights<kWidth>(load(term[r].steps + n * kWidth / 8));
      Bits q[kShifts];
      integers::for_shifts<kWidth>([&](auto i) { q[i()] = integers::weights<kWidth, i()>(words); });
      const Vec scale = integers::spread<kBlocks, Vec>(term[r].factor + block);
      for (int m = 0; m < kTokens; m++) {
        Ints sum = x.fixed->zero(x.token + m, s);
        // The last shift comes first, so that the first one may overwrite the words.
#pragma GCC unroll 4
        for (int i = kShifts - 1; i >= 0; i--)
          sum = integers::multiply_add(sum, q[i], x.fixed->words(x.token + m, s, i));
        if constexpr (kTokens == 1) sums[m][r] += scale * to_floats(sum);
        else sums[m][r] += x.fixed->step(x.token + m, s) * scale * to_floats(sum);
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
