// Decode: h = B x for a few tokens, dot products with the rows of B in float32.
//
// A sum runs in one fixed order, whatever the split over threads, so that results have the same bits at
// every thread count, and a token's do not depend on the other tokens.
#pragma once

#include <type_traits>

#include "simd.h"

namespace {

constexpr int kTileTokens = 4;
#if defined(__AVX512F__)
constexpr int kTileRows = 5;  // 20 sums in 32 registers
#else
constexpr int kTileRows = 2;  // 8 in 16
#endif
constexpr int kFewTokens = 2;
constexpr int kRowsOfFew = 4;  // bound by memory alone, which likes four streams best
// How far ahead the rows are asked for. On Intel's processors that makes one token's 12 GB/s 14; on AMD's, for which
// AVX-512 with bfloat16 but without tiles is, loads are left to the hardware's prefetcher: asking halved them on Zen 4.
#if defined(__AMX_BF16__) || (defined(__AVX512F__) && !defined(__AVX512BF16__))
constexpr int64_t kRowAheadBytes = 1024;
#else
constexpr int64_t kRowAheadBytes = 0;
#endif

// h[m][r · step] = B[r] · x[m] for a tile of kRows rows and kTokens tokens.
template <int kRows, int kTokens, class T>
void dot_tile(const T* B, int64_t ldb, const T* x, int64_t ldx, int64_t size, float* h, int64_t ldh, int64_t step) {
  Vec sums[kTokens][kRows] = {};
  const auto add = [&](int64_t k, auto load_at) {
    typename Operand<T>::type v[kTokens];
    for (int m = 0; m < kTokens; m++) v[m] = load_at(x + m * ldx + k);
    for (int r = 0; r < kRows; r++) {
      if (kRowAheadBytes) ask_for(B + r * ldb + k + kRowAheadBytes / sizeof(T));
      const auto w = load_at(B + r * ldb + k);
      for (int m = 0; m < kTokens; m++) sums[m][r] = multiply_add(sums[m][r], v[m], w);
    }
  };
  int64_t k = 0;
  for (; k + kChunk <= size; k += kChunk) add(k, [](const T* p) { return load_operand(p); });
  if (k < size) add(k, [count = size - k](const T* p) { return load_operand_first(p, count); });
  for (int m = 0; m < kTokens; m++)
    for (int r = 0; r < kRows; r++) h[m * ldh + r * step] = sum(sums[m][r]);
}

template <int kRows, class T>
void dot_tokens(const T* B, int64_t ldb, const T* x, int64_t ldx, int64_t tokens, int64_t size, float* h, int64_t ldh,
                int64_t step) {
  int64_t m = 0;
  const auto tile = [&](auto count) {
    dot_tile<kRows, count()>(B, ldb, x + m * ldx, ldx, size, h + m * ldh, ldh, step);
    m += count();
  };
  while (m + kTileTokens <= tokens) tile(std::integral_constant<int, kTileTokens>{});
  if (m + 2 <= tokens) tile(std::integral_constant<int, 2>{});
  if (m < tokens) tile(std::integral_constant<int, 1>{});
}

// The rows are read as kRows streams, each a share of them: far apart, so that the hardware prefetcher follows all,
// where neighbouring rows would share its attention. They also share x.
template <int kRows, class T>
void dot_streams(const T* B, int64_t ldb, const T* x, int64_t ldx, int64_t tokens, int64_t size, int64_t begin,
                 int64_t end, float* h, int64_t ldh) {
  const int64_t share = (end - begin) / kRows;
  for (int64_t r = begin; r < begin + share; r++)
    dot_tokens<kRows>(B + r * ldb, share * ldb, x, ldx, tokens, size, h + r, ldh, share);
  for (int64_t r = begin + kRows * share; r < end; r++)
    dot_tokens<1>(B + r * ldb, ldb, x, ldx, tokens, size, h + r, ldh, 1);
}

// h[m][r] = B[r] · x[m] for r in [begin, end) and all tokens; h is [tokens, ldh].
template <class T>
void project_rows(const T* B, int64_t ldb, const T* x, int64_t ldx, int64_t tokens, int64_t size, int64_t begin,
                  int64_t end, float* h, int64_t ldh) {
  if (tokens <= kFewTokens) dot_streams<kRowsOfFew>(B, ldb, x, ldx, tokens, size, begin, end, h, ldh);
  else dot_streams<kTileRows>(B, ldb, x, ldx, tokens, size, begin, end, h, ldh);
}

}  // namespace
