// Steps: how rows of weights are multiplied by values of tokens and added to sums.
#pragma once

#include <algorithm>
#include <type_traits>

#include "storage.h"

namespace {

// One row a step, in float32.
template <class W>
struct Single {
  using Weights = W;
  using Value = float;  // the factor of one token in a step
  static constexpr int kRows = 1;

  static void pack(const float* kept, int64_t steps, Value* values) { std::copy_n(kept, steps, values); }
  static void pack_elements(const typename W::Element* p, int64_t count, Value* values) { widen(p, count, values); }
  template <class... Count>
  static Chunk rows(const typename W::Term* row, int64_t n, Count... count) {
    return row[0].chunk(n, count...);
  }
  static void multiply_add(Chunk& sums, Value h, Chunk w) {
    const Vec c = splat(h);
    sums.lo += c * w.lo;
    sums.hi += c * w.hi;
  }
};

#if defined(__AVX512BF16__)
// Two rows a step, where the processor multiplies pairs of bfloat16 into float32 sums. An instruction does twice the
// work, but the masked h has to be rounded to bfloat16.
template <class W>
struct Pair {
  using Weights = W;
  using Value = int32_t;
  static constexpr int kRows = 2;

  static void pack(const float* kept, int64_t steps, Value* values) {
    for (int64_t s = 0; s < steps; s++) {
      const bfloat16 pair[2] = {kept[2 * s], kept[2 * s + 1]};
      values[s] = load_bytes<Value>(pair);
    }
  }
  static void pack_elements(const bfloat16* p, int64_t count, Value* values) {
    std::memcpy(values, p, count * sizeof(bfloat16));
    if (count % 2) reinterpret_cast<bfloat16*>(values)[count] = bfloat16(0.0f);
  }
  static Chunk interleave(Bits a, Bits b) {
    return {(Vec)((a & 0xffffu) | (b << 16)), (Vec)((a >> 16) | (b & 0xffff0000u))};
  }
  template <class... Count>
  static Chunk rows(const typename W::Term* row, int64_t n, Count... count) {
    return interleave(row[0].pairs(n, count...), row[1].pairs(n, count...));
  }
  static void multiply_add(Chunk& sums, Value h, Chunk w) {
    const __m512bh pair = (__m512bh)_mm512_set1_epi32(h);
    sums.lo = (Vec)_mm512_dpbf16_ps((__m512)sums.lo, pair, (__m512bh)(__m512i)w.lo);
    sums.hi = (Vec)_mm512_dpbf16_ps((__m512)sums.hi, pair, (__m512bh)(__m512i)w.hi);
  }
};

template <class T>
constexpr bool kMultipliesPairs = std::is_same_v<T, bfloat16>;
template <class W>
using Fastest = std::conditional_t<kMultipliesPairs<typename W::Element>, Pair<W>, Single<W>>;
#else
template <class T>
constexpr bool kMultipliesPairs = false;
template <class W>
using Fastest = Single<W>;
#endif

// Up to this many tokens the masked h stays float32. With more tokens it is rounded to 16 bits where that is faster.
constexpr int64_t kExactTokens = 16;

// The number of steps for `rows` rows; the last step may be incomplete.
template <class Step>
int64_t steps_of(int64_t rows) {
  return (rows + Step::kRows - 1) / Step::kRows;
}

template <class Step>
using Element = typename Step::Weights::Element;

// A method: vectors read weights and multiply them at once.
template <class S>
struct ByVectors {
  using Step = S;
  // How many tokens lie side by side in Masked.
  static int64_t width(int64_t tokens) { return tokens; }
};

}  // namespace
