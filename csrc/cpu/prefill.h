// Prefill: many tokens, bound by arithmetic. The masked rank values multiply the rows as a dense
// product: a panel of kChunk columns is packed once and then meets every token from the cache.
#pragma once

#include <vector>

#include "decode.h"

namespace {

#if defined(__AVX512F__)
constexpr int kPanelTokens = 12;  // 24 sums, 2 weights and a broadcast value in 32 registers
#else
constexpr int kPanelTokens = 6;
#endif

// A step of the product takes kRanks ranks: one as float, or a pair as bfloat16 where the machine
// multiplies pairs. A token's step is 4 bytes and a panel's step is one Chunk in either case.
template <class T>
struct Step {
  static constexpr int kRanks = 1;
  using Token = float;
  static Token pack_token(const float* z) { return z[0]; }
  static Chunk pack_rows(const T* row, int64_t, int64_t count, bool) { return load_first(row, count); }
  static void multiply_add(Chunk& sum, Token z, Chunk w) {
    const Vec c = splat(z);
    sum.lo += c * w.lo;
    sum.hi += c * w.hi;
  }
};

#if defined(__AVX512BF16__)
template <>
struct Step<bfloat16> {
  static constexpr int kRanks = 2;
  using Token = int32_t;
  static Token pack_token(const float* z) {
    const bfloat16 pair[2] = {z[0], z[1]};
    return load_bytes<Token>(pair);
  }
  static Bits raw(const bfloat16* row, int64_t count) {
    bfloat16 padded[kChunk] = {};
    if (count >= kChunk) return load_bytes<Bits>(row);
    std::memcpy(padded, row, count * sizeof(bfloat16));
    return load_bytes<Bits>(padded);
  }
  static Chunk pack_rows(const bfloat16* row, int64_t ld, int64_t count, bool last_is_odd) {
    const Bits a = raw(row, count), b = last_is_odd ? Bits{} : raw(row + ld, count);
    return {(Vec)((a & 0xffffu) | (b << 16)), (Vec)((a >> 16) | (b & 0xffff0000u))};
  }
  static void multiply_add(Chunk& sum, Token z, Chunk w) {
    const __m512bh pair = (__m512bh)_mm512_set1_epi32(z);
    sum.lo = (Vec)_mm512_dpbf16_ps((__m512)sum.lo, pair, (__m512bh)(__m512i)w.lo);
    sum.hi = (Vec)_mm512_dpbf16_ps((__m512)sum.hi, pair, (__m512bh)(__m512i)w.hi);
  }
};
#endif

// The masked rank values of all tokens, zeros included, packed in steps.
template <class T>
struct Masked {
  int64_t tokens, ranks, steps;
  std::vector<typename Step<T>::Token> packed;  // [tokens, steps]

  Masked(const float* h, int64_t ldh, int64_t tokens, int64_t ranks, Mask mask)
      : tokens(tokens), ranks(ranks), steps((ranks + Step<T>::kRanks - 1) / Step<T>::kRanks), packed(tokens * steps) {
    for (int64_t m = 0; m < tokens; m++)
      for (int64_t s = 0; s < steps; s++) {
        float z[Step<T>::kRanks] = {};
        for (int64_t i = 0, r = s * Step<T>::kRanks; i < Step<T>::kRanks && r < ranks; i++, r++)
          z[i] = mask.apply(h[m * ldh + r], r);
        packed[m * steps + s] = Step<T>::pack_token(z);
      }
  }
};

template <int kTokens, class T, class Done>
void panel_tile(const Masked<T>& z, const Chunk* panel, int64_t m, Done done) {
  Chunk sums[kTokens] = {};
  const auto* token = z.packed.data() + m * z.steps;
  for (int64_t s = 0; s < z.steps; s++) {
    const Chunk w = panel[s];
    for (int i = 0; i < kTokens; i++) Step<T>::multiply_add(sums[i], token[i * z.steps + s], w);
  }
  for (int i = 0; i < kTokens; i++) done(m + i, sums[i]);
}

}  // namespace
