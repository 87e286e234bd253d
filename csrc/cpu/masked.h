// The mask, and the rank values that are left of h after it.
#pragma once

#include <vector>

#include "simd.h"

namespace {

// Keep unless |h|·scale < threshold, decided in float32; a NaN is kept. `scale` may be null, and the
// threshold is one value (step 0) or one a row (step 1).
struct Mask {
  const float* threshold;
  int64_t threshold_step;
  const float* scale;

  bool keeps(float h, int64_t row) const {
    const float magnitude = __builtin_fabsf(h);
    const float score = scale ? magnitude * scale[row] : magnitude;
    return !(score < threshold[row * threshold_step]);
  }
};

// How rows are multiplied: one by one, in float32 ...
template <class T>
struct Single {
  using Element = T;
  using Value = float;  // what a token contributes to a step
  static constexpr int kRows = 1;

  static Value pack(const float* h) { return h[0]; }
  static Chunk rows(const T* const* row, int64_t n) { return load(row[0] + n); }
  static Chunk rows(const T* const* row, int64_t n, int64_t count) { return load_first(row[0] + n, count); }
  static void multiply_add(Chunk& sums, Value h, Chunk w) {
    const Vec c = splat(h);
    sums.lo += c * w.lo;
    sums.hi += c * w.hi;
  }
};

// ... or two by two, where the machine multiplies pairs of bfloat16 into float32 sums: twice the work in
// an instruction, for which the masked h is rounded to bfloat16.
template <class T>
struct Fastest {
  using Step = Single<T>;
};

#if defined(__AVX512BF16__)
struct Pair {
  using Element = bfloat16;
  using Value = int32_t;
  static constexpr int kRows = 2;

  static Value pack(const float* h) {
    const bfloat16 pair[2] = {h[0], h[1]};
    return load_bytes<Value>(pair);
  }
  static Chunk interleave(Bits a, Bits b) {
    return {(Vec)((a & 0xffffu) | (b << 16)), (Vec)((a >> 16) | (b & 0xffff0000u))};
  }
  static Chunk rows(const bfloat16* const* row, int64_t n) {
    return interleave(load_bytes<Bits>(row[0] + n), load_bytes<Bits>(row[1] + n));
  }
  static Chunk rows(const bfloat16* const* row, int64_t n, int64_t count) {
    if (count >= kChunk) return rows(row, n);
    bfloat16 a[kChunk] = {}, b[kChunk] = {};
    std::memcpy(a, row[0] + n, count * sizeof(bfloat16));
    std::memcpy(b, row[1] + n, count * sizeof(bfloat16));
    return interleave(load_bytes<Bits>(a), load_bytes<Bits>(b));
  }
  static void multiply_add(Chunk& sums, Value h, Chunk w) {
    const __m512bh pair = (__m512bh)_mm512_set1_epi32(h);
    sums.lo = (Vec)_mm512_dpbf16_ps((__m512)sums.lo, pair, (__m512bh)(__m512i)w.lo);
    sums.hi = (Vec)_mm512_dpbf16_ps((__m512)sums.hi, pair, (__m512bh)(__m512i)w.hi);
  }
};

template <>
struct Fastest<bfloat16> {
  using Step = Pair;
};
#endif

// The steps that at least one token keeps, in order, and every token's values there: 0 where it does not
// keep the row. A step is always the same rows, whatever the tokens, so that a token's sums have the same
// bits in any company.
template <class Step>
struct Masked {
  static constexpr int kRows = Step::kRows;
  int64_t tokens, ranks;
  std::vector<int64_t> first;                // [steps], the first row of each
  std::vector<typename Step::Value> values;  // [steps, tokens]

  Masked(const float* h, int64_t ldh, int64_t tokens, int64_t ranks, Mask mask) : tokens(tokens), ranks(ranks) {
    const int64_t most = (ranks + kRows - 1) / kRows;
    first.resize(most), values.resize(most * tokens);
    int64_t steps = 0;
    for (int64_t r = 0; r < ranks; r += kRows) {
      bool live = false;
      for (int64_t m = 0; m < tokens; m++) {
        float kept[kRows] = {};
        for (int64_t i = 0; i < kRows && r + i < ranks; i++) {
          const float value = h[m * ldh + r + i];
          const bool keep = mask.keeps(value, r + i);
          kept[i] = keep ? value : 0.0f;
          live |= keep;
        }
        values[steps * tokens + m] = Step::pack(kept);
      }
      first[steps] = r;
      steps += live;
    }
    first.resize(steps);
  }

  int64_t steps() const { return first.size(); }
  // Row i of step s. Where an odd last row has no partner it is its own, times zero.
  int64_t row(int64_t s, int i) const { return first[s] + i < ranks ? first[s] + i : first[s]; }
};

}  // namespace
