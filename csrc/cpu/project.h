// Decode: h = B x for a few tokens, dot products with the rows of B in float32.
//
// A sum runs in one fixed order, whatever the split over threads, so that results have the same bits at
// every thread count, and a token's do not depend on the other tokens.
#pragma once

#include <type_traits>

#include "simd.h"

namespace {

#if defined(__AVX512F__)
constexpr int kTileSums = 20;  // of 32 registers
#else
constexpr int kTileSums = 8;  // of 16
#endif
constexpr int kTileTokens = 4;
constexpr int kFarRows = 4;

// h[m][r] = B[r] · x[m] for a tile of kRows rows and kTokens tokens. Loads are plain: they leave the hardware
// prefetcher in charge, and software prefetch halved the speed on Zen 4.
template <int kRows, int kTokens, class T>
void dot_tile(const T* B, int64_t ldb, const T* x, int64_t ldx, int64_t size, float* h, int64_t ldh) {
  Vec sums[kTokens][kRows] = {};
  const auto step = [&](int64_t k, auto load_at) {
    typename Operand<T>::type v[kTokens];
    for (int m = 0; m < kTokens; m++) v[m] = load_at(x + m * ldx + k);
    for (int r = 0; r < kRows; r++) {
      const auto w = load_at(B + r * ldb + k);
      for (int m = 0; m < kTokens; m++) sums[m][r] = multiply_add(sums[m][r], v[m], w);
    }
  };
  int64_t k = 0;
  for (; k + kChunk <= size; k += kChunk) step(k, [](const T* p) { return load_operand(p); });
  if (k < size) step(k, [count = size - k](const T* p) { return load_operand_first(p, count); });
  for (int m = 0; m < kTokens; m++)
    for (int r = 0; r < kRows; r++) h[m * ldh + r] = sum(sums[m][r]);
}

// One token. The rows are read as four streams, each a quarter of them: far apart, so that the hardware
// prefetcher follows all four, where neighbouring rows would share its attention. They also share x.
template <class T>
void dot_token(const T* B, int64_t ldb, const T* x, int64_t size, int64_t begin, int64_t end, float* h) {
  const int64_t quarter = (end - begin) / kFarRows, rest = begin + kFarRows * quarter;
  for (int64_t r = begin; r < begin + quarter; r++) {
    float sums[kFarRows];
    dot_tile<kFarRows, 1>(B + r * ldb, quarter * ldb, x, 0, size, sums, 0);
    for (int i = 0; i < kFarRows; i++) h[r + i * quarter] = sums[i];
  }
  for (int64_t r = rest; r < end; r++) dot_tile<1, 1>(B + r * ldb, 0, x, 0, size, h + r, 0);
}

template <int kRows, class T>
void dot_tokens(const T* B, int64_t ldb, const T* x, int64_t ldx, int64_t tokens, int64_t size, float* h, int64_t ldh) {
  int64_t m = 0;
  const auto tile = [&](auto count) {
    dot_tile<kRows, count()>(B, ldb, x + m * ldx, ldx, size, h + m * ldh, ldh);
    m += count();
  };
  while (m + kTileTokens <= tokens) tile(std::integral_constant<int, kTileTokens>{});
  if (m + 2 <= tokens) tile(std::integral_constant<int, 2>{});
  if (m < tokens) tile(std::integral_constant<int, 1>{});
}

template <int kRows, class T>
void dot_block(const T* B, int64_t ldb, const T* x, int64_t ldx, int64_t tokens, int64_t size, int64_t begin,
               int64_t end, float* h, int64_t ldh) {
  int64_t r = begin;
  for (; r + kRows <= end; r += kRows) dot_tokens<kRows>(B + r * ldb, ldb, x, ldx, tokens, size, h + r, ldh);
  for (; r < end; r++) dot_tokens<1>(B + r * ldb, ldb, x, ldx, tokens, size, h + r, ldh);
}

// h[m][r] = B[r] · x[m] for r in [begin, end) and all tokens; h is [tokens, ldh].
template <class T>
void project_rows(const T* B, int64_t ldb, const T* x, int64_t ldx, int64_t tokens, int64_t size, int64_t begin,
                  int64_t end, float* h, int64_t ldh) {
  if (tokens == 1) dot_token(B, ldb, x, size, begin, end, h);
  else if (tokens == 2) dot_block<kTileSums / 2>(B, ldb, x, ldx, tokens, size, begin, end, h, ldh);
  else dot_block<kTileSums / kTileTokens>(B, ldb, x, ldx, tokens, size, begin, end, h, ldh);
}

}  // namespace
