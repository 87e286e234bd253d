// The mask, and the rank values that are left of h after it.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

namespace {

// Keep unless |h|·scale < threshold, decided in float32; a NaN is kept. `scale` may be null, and the
// threshold is one value (step 0) or one a row (step 1).
struct Mask {
  const float* threshold;
  int64_t threshold_step;
  const float* scale;

  // kept[r] = h[r] if it is kept, else 0; live[r] becomes true if it is. One loop for each form of the mask, because
  // a loop that asks which one it is for every row takes 4 ns for it, where these take 0.2.
  void apply(const float* h, int64_t ranks, float* kept, uint32_t* live) const {
    const auto decide = [=](auto score_of, auto threshold_of) {
      for (int64_t r = 0; r < ranks; r++) {
        const bool keep = !(score_of(__builtin_fabsf(h[r]), r) < threshold_of(r));
        kept[r] = keep ? h[r] : 0.0f;
        live[r] |= keep;
      }
    };
    const auto with = [=](auto score_of) {
      if (threshold_step) decide(score_of, [=](int64_t r) { return threshold[r]; });
      else decide(score_of, [t = threshold[0]](int64_t) { return t; });
    };
    if (scale) with([=](float magnitude, int64_t r) { return magnitude * scale[r]; });
    else with([](float magnitude, int64_t) { return magnitude; });
  }
};

// How rows are multiplied: one by one, in float32 ...
template <class T>
struct Single {
  using Element = T;
  using Value = float;  // what a token contributes to a step
  static constexpr int kRows = 1;

  static void pack(const float* kept, int64_t steps, Value* values) { std::copy_n(kept, steps, values); }
  static void widen(const T* p, int64_t count, Value* values) {
    for (int64_t i = 0; i < count; i++) values[i] = p[i];
  }
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

  static void pack(const float* kept, int64_t steps, Value* values) {
    for (int64_t s = 0; s < steps; s++) {
      const bfloat16 pair[2] = {kept[2 * s], kept[2 * s + 1]};
      values[s] = load_bytes<Value>(pair);
    }
  }
  static void widen(const bfloat16* p, int64_t count, Value* values) {
    std::memcpy(values, p, count * sizeof(bfloat16));
    if (count % 2) reinterpret_cast<bfloat16*>(values)[count] = bfloat16(0.0f);
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

// How many steps `rows` rows are, the last one perhaps incomplete.
template <class Step>
int64_t steps_of(int64_t rows) {
  return (rows + Step::kRows - 1) / Step::kRows;
}

// The steps that at least one token keeps, in order, and every token's values there: 0 where it does not
// keep the row. A step is always the same rows, whatever the tokens, so that a token's sums have the same
// bits in any company. The tokens come in tiles of `width`, the last one filled up with zeros.
template <class Step>
struct Masked {
  static constexpr int kRows = Step::kRows;
  int64_t tokens, ranks, width;
  std::vector<int64_t> first;                // [steps], the first row of each
  std::vector<typename Step::Value> values;  // [tiles, steps, width]

  Masked(const float* h, int64_t ldh, int64_t tokens, int64_t ranks, Mask mask, int64_t width)
      : tokens(tokens), ranks(ranks), width(width) {
    const int64_t most = steps_of<Step>(ranks);
    std::vector<typename Step::Value> packed(tokens * most);
    std::vector<uint32_t> live(most * kRows);
    std::vector<float> kept(most * kRows);
    for (int64_t m = 0; m < tokens; m++) {
      mask.apply(h + m * ldh, ranks, kept.data(), live.data());
      Step::pack(kept.data(), most, packed.data() + m * most);
    }
    list(live.data(), most);
    values.resize((tokens + width - 1) / width * steps() * width);
    for (int64_t m = 0; m < tokens; m += width)
      fill(packed.data() + m * most, most, std::min(width, tokens - m), values.data() + m * steps());
  }

  int64_t steps() const { return first.size(); }
  // Row i of step s. Where an odd last row has no partner it is its own, times zero.
  int64_t row(int64_t s, int i) const { return first[s] + i < ranks ? first[s] + i : first[s]; }

 private:
  void fill(const typename Step::Value* packed, int64_t most, int64_t count, typename Step::Value* tile) const {
    for (int64_t s = 0; s < steps(); s++)
      for (int64_t m = 0; m < count; m++) tile[s * width + m] = packed[m * most + first[s] / kRows];
  }
  void list(const uint32_t* live, int64_t most) {
    first.resize(most);
    int64_t steps = 0;
    for (int64_t s = 0; s < most; s++) {
      first[steps] = s * kRows;
      steps += std::any_of(live + s * kRows, live + (s + 1) * kRows, [](uint32_t flag) { return flag; });
    }
    first.resize(steps);
  }
};

}  // namespace
