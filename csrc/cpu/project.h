// The first half of an adapter, h = B x, split over threads.
#pragma once

#include <vector>

#include "project_by_amx.h"
#include "project_by_integers.h"
#include "project_by_panels.h"
#include "project_by_vectors.h"
#include "tiling.h"

namespace {

// Writes the first `size` columns of a row as Elements.
template <class W>
void convert(const typename W::Term& row, int64_t size, typename W::Element* elements) {
  int64_t n = 0;
  for (; n + kChunk <= size; n += kChunk) store(elements + n, row.chunk(n));
  if (n < size) store_first(elements + n, row.chunk(n, size - n), size - n);
}

// Rows that a method reads together.
template <class Method>
constexpr int64_t kLinesAtOnce = kTile;
template <class Step>
constexpr int64_t kLinesAtOnce<ByVectors<Step>> = kTileRows;

// Converts rows of B block by block, because every token multiplies them, and then proceeds as with plain rows.
template <class Method, class W, class Arranged>
void project_converted(Method method, const W& B, const Arranged& x, int64_t tokens, int64_t begin, int64_t end,
                       float* h) {
  using T = typename W::Element;
  constexpr int64_t kBufferBytes = 512 * 1024, kTiles = kLinesAtOnce<Method>;
  const int64_t row_bytes = std::max<int64_t>(1, B.columns * sizeof(T));
  const int64_t most = std::max<int64_t>(1, kBufferBytes / row_bytes / kTiles) * kTiles;
  std::vector<T> buffer(std::min(most, end - begin) * B.columns);
  std::vector<float> room(W::room(B.columns));
  for (int64_t r = begin; r < end; r += most) {
    const int64_t count = std::min(most, end - r);
    for (int64_t i = 0; i < count; i++)
      convert<W>(W::term(B.at(r + i, 0), 1.0f, B.columns, room.data()), B.columns, buffer.data() + i * B.columns);
    const Plain<T> converted{buffer.data(), count, B.columns, B.columns};
    project_rows(method, converted, x, tokens, 0, count, h + r, B.rows);
  }
}

// The method for quantised weights and a few tokens.
template <class W>
struct MethodOfFewTokens {
  using type = ByVectors<Single<W>>;
};
#if defined(__SSE2__)
template <>
struct MethodOfFewTokens<Quantized<float, 4>> {
  using type = ByIntegers<Quantized<float, 4>>;
};
#endif
template <class W>
using MethodOfFew = typename MethodOfFewTokens<W>::type;

// h = x Bᵀ in float32, [tokens, B.rows].
template <class W>
void project(const typename W::Element* x, int64_t tokens, const W& B, float* h) {
  using T = typename W::Element;
  if constexpr (!W::kAddressable && std::is_same_v<T, float>)
    if (tokens <= kTileTokens) {
      const MethodOfFew<W> method;
      const auto arranged = arrange(method, x, tokens, B.columns);
      return parallel(B.rows, B.columns * tokens, [&](int64_t begin, int64_t end) {
        project_rows(method, B, arranged, tokens, begin, end, h, B.rows);
      });
    }
  for_method<Plain<T>>(tokens, [&](auto method) {
    const auto arranged = arrange(method, x, tokens, B.columns);
    parallel(B.rows, B.columns * tokens, [&](int64_t begin, int64_t end) {
      if constexpr (W::kAddressable) project_rows(method, B, arranged, tokens, begin, end, h, B.rows);
      else project_converted(method, B, arranged, tokens, begin, end, h);
    });
  });
}

}  // namespace
