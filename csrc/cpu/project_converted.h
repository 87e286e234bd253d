// h = B x for quantised weights and more than a few tokens: a piece of B becomes Elements, and every token reads it
// from the caches.
#pragma once

#include <vector>

#include "project_by_amx.h"
#include "project_by_panels.h"
#include "project_by_vectors.h"

namespace {

// Writes the columns [n, n + size) of a row as Elements.
template <class W>
void convert(const typename W::Term& row, int64_t n, int64_t size, typename W::Element* elements) {
  const int64_t end = n + size;
  for (; n + kChunk <= end; n += kChunk, elements += kChunk) store(elements, row.chunk(n));
  if (n < end) store_first(elements, row.chunk(n, end - n), end - n);
}

// Panels and tiles cut up many rows themselves, so whole rows are converted.
template <class Method, class W, class Arranged>
void project_converted(Method method, const W& B, const Arranged& x, int64_t tokens, int64_t begin, int64_t end,
                       float* h, int64_t ldh) {
  using T = typename W::Element;
  constexpr int64_t kBufferBytes = 512 * 1024;
  const int64_t row_bytes = std::max<int64_t>(1, B.columns * sizeof(T));
  const int64_t most = std::max<int64_t>(1, kBufferBytes / row_bytes / kTile) * kTile;
  std::vector<T> buffer(std::min(most, end - begin) * B.columns);
  LineVector<float> room(W::room(B.columns));
  for (int64_t r = begin; r < end; r += most) {
    const int64_t count = std::min(most, end - r);
    for (int64_t i = 0; i < count; i++)
      convert<W>(W::term(B.at(r + i, 0), 1.0f, B.columns, room.data()), 0, B.columns, buffer.data() + i * B.columns);
    const Plain<T> converted{buffer.data(), count, B.columns, B.columns};
    project_rows(method, converted, x, tokens, 0, count, h + r, ldh);
  }
}

constexpr int64_t kPiece = 512;  // columns: with a piece of x for 16 tokens it fits the first-level cache

// sums[m][i] += rows[i] · x[m] over `size` columns, for a tile of rows kPiece apart and of tokens `ldx` apart.
template <int kTokens, class T>
void add_dots(const T* rows, const T* x, int64_t ldx, int64_t size, Vec* sums) {
  // A copy of all sums at once would keep the tile in memory.
  Vec tile[kTokens][kTileRows];
#pragma GCC unroll 16
  for (int m = 0; m < kTokens; m++)
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; i++) tile[m][i] = sums[m * kTileRows + i];
#pragma GCC unroll 1
  for (int64_t k = 0; k < size; k += kChunk) {
    typename Operand<T>::type v[kTokens];
    for (int m = 0; m < kTokens; m++) v[m] = load_operand_first(x + m * ldx + k, size - k);
    for (int i = 0; i < kTileRows; i++) {
      const auto w = load_operand(rows + i * kPiece + k);
      for (int m = 0; m < kTokens; m++) tile[m][i] = multiply_add(tile[m][i], v[m], w);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kTokens; m++)
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; i++) sums[m * kTileRows + i] = tile[m][i];
}

// Vectors read a tile of rows piece by piece.
template <class Step, class W>
void project_converted(ByVectors<Step>, const W& B, const typename W::Element* x, int64_t tokens, int64_t begin,
                       int64_t end, float* h, int64_t ldh) {
  using T = typename W::Element;
  const int64_t size = B.columns;
  LineVector<float> room(kTileRows * W::room(size));
  LineVector<Vec> sums(tokens * kTileRows);
  alignas(kLineBytes) T rows[kTileRows * kPiece] = {};
  for (int64_t r = begin; r < end; r += kTileRows) {
    const int count = static_cast<int>(std::min<int64_t>(kTileRows, end - r));
    typename W::Term term[kTileRows];
    for (int i = 0; i < count; i++) term[i] = W::term(B.at(r + i, 0), 1.0f, size, room.data() + i * W::room(size));
    auto ahead = rows_after(B, r, kTileRows, end);
    std::fill(sums.begin(), sums.end(), Vec{});
    for (int64_t k = 0; k < size; k += kPiece) {
      const int64_t columns = std::min(kPiece, size - k);
      ahead.ask(lines_of<W>(kTileRows * columns));
      for (int i = 0; i < count; i++) convert<W>(term[i], k, columns, rows + i * kPiece);
      // An incomplete chunk is multiplied whole: behind it are zeros.
      for (int i = 0; i < count && columns % kChunk; i++)
        std::fill_n(rows + i * kPiece + columns, kChunk - columns % kChunk, T(0));
      int64_t m = 0;
      for (; m + kTileTokens <= tokens; m += kTileTokens)
        add_dots<kTileTokens>(rows, x + m * size + k, size, columns, &sums[m * kTileRows]);
      for (; m < tokens; m++) add_dots<1>(rows, x + m * size + k, size, columns, &sums[m * kTileRows]);
    }
    for (int64_t m = 0; m < tokens; m++)
      for (int i = 0; i < count; i++) h[m * ldh + r + i] = sum(sums[m * kTileRows + i]);
  }
}

}  // namespace
