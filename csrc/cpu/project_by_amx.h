// h = B x on matrix tiles: rows of B are lines, read where they lie in memory; tokens are columns, two tiles a panel.
#pragma once

#include "amx.h"
#include "project_by_panels.h"

#if defined(__AMX_BF16__)

namespace {

// Returns x [tokens, size] as panels of pairs, in whole blocks.
template <class W>
std::vector<Chunk> arrange(ByAmx<W>, const bfloat16* x, int64_t tokens, int64_t size) {
  return token_panels<Pair<W>>(x, tokens, size, blocks_of(size) * kSide);
}

// The sums of kTiles tiles of rows with kTiles tiles of tokens.
template <int kTiles>
struct Square {
  static constexpr int64_t kRows = kTiles * kSide;
  static constexpr bool kTwo = kTiles == 2;
  Tile sums[kTiles][kTiles];

  static amx::Shapes shapes(int64_t tokens) {
    const int64_t width = std::min(tokens, kSide) * sizeof(float);
    amx::Shapes found;
    for (int sums : {0, 1, 2, 3}) found.set(sums, kSide, width);
    for (int rows : {4, 5}) found.set(rows, kSide, amx::kRowBytes);
    for (int columns : {6, 7}) found.set(columns, kSide, width);
    return found;
  }

  // The prefetches: for the rows [first, last), the block that comes `ahead` blocks later; after the last block, those
  // at `next`.
  struct Ask {
    const bfloat16* next;
    int64_t ahead, first, last;
  };

  // Adds `blocks` blocks of kRows rows, which lie `ld` elements apart.
  void add(const bfloat16* rows, int64_t ld, const Chunk* x, int64_t blocks, Ask ask) {
    const int64_t stride = ld * sizeof(bfloat16);
    load_sums();
    for (int64_t b = 0; b < blocks; b++) {
      const bfloat16* lines = rows + b * kBlock;
      const char* columns = reinterpret_cast<const char*>(x + b * kSide);
      const int64_t later = b + ask.ahead;
      const bfloat16* asked = later < blocks ? rows + later * kBlock : ask.next + (later - blocks) * kBlock;
      for (int64_t i = ask.first; i < ask.last; i++) __builtin_prefetch(asked + i * ld);
      amx::load<4>(lines, stride), amx::load<6>(columns, sizeof(Chunk));
      amx::multiply_add<0, 4, 6>();
      if constexpr (kTwo) {
        amx::load<7>(columns + sizeof(Vec), sizeof(Chunk)), amx::load<5>(lines + kSide * ld, stride);
        amx::multiply_add<1, 4, 7>(), amx::multiply_add<2, 5, 6>(), amx::multiply_add<3, 5, 7>();
      }
    }
    store_sums();
  }

  // Returns the sums of a token with the rows [row, row + kSide).
  Vec of(int64_t token, int64_t row) const {
    const __m512i lines = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i places = _mm512_mullo_epi32(lines, _mm512_set1_epi32(kSide));
    return (Vec)_mm512_i32gather_ps(places, sums[row / kSide][token / kSide].lines[0] + token % kSide, sizeof(float));
  }

 private:
  void load_sums() const {
    amx::load<0>(&sums[0][0]);
    if constexpr (kTwo) amx::load<1>(&sums[0][1]), amx::load<2>(&sums[1][0]), amx::load<3>(&sums[1][1]);
  }
  void store_sums() {
    amx::store<0>(&sums[0][0]);
    if constexpr (kTwo) amx::store<1>(&sums[0][1]), amx::store<2>(&sums[1][0]), amx::store<3>(&sums[1][1]);
  }
};

// The rows [first, first + wanted) of B as whole lines of whole blocks. Rows that do not lie in memory like that are
// copied and filled up with zeros; there are only `count` rows.
struct WholeRows {
  const bfloat16* data;
  int64_t ld;

  WholeRows(const Plain<bfloat16>& B, int64_t first, int64_t count, int64_t wanted, std::vector<bfloat16>& copy)
      : data(B.at(first, 0)), ld(B.ld) {
    if (count == wanted && B.columns % kBlock == 0) return;
    ld = blocks_of(B.columns) * kBlock;
    copy.assign(wanted * ld, 0.0f);
    data = copy.data();
    for (int64_t i = 0; i < count; i++) std::copy_n(B.at(first + i, 0), B.columns, copy.data() + i * ld);
  }
};

template <int kTiles, class W>
void project_squares(const W& B, const std::vector<Chunk>& x, int64_t tokens, int64_t begin, int64_t end, float* h,
                     int64_t ldh) {
  constexpr int64_t kRows = Square<kTiles>::kRows;
  const int64_t blocks = blocks_of(B.columns), panels = chunks_of(tokens);
  // With several panels, the depth is such that x stays in the second-level cache while several squares of rows use it.
  const int64_t most = panels == 1 ? 1 : 4, depth = panels == 1 ? blocks : 16;
  const amx::Shapes shapes = Square<kTiles>::shapes(tokens);
  const amx::Shapes::InUse in_use(shapes);
  std::vector<Square<kTiles>> all;
  std::vector<bfloat16> copy;
  for (int64_t r = begin; r < end; r += most * kRows) {
    const int64_t count = std::min(most * kRows, end - r), squares = (count + kRows - 1) / kRows;
    const WholeRows rows(B, r, count, squares * kRows, copy);
    all.assign(squares * panels, {});
    for (int64_t first = 0; first < blocks; first += depth)
      for (int64_t s = 0; s < squares; s++) {
        const int64_t deep = std::min(depth, blocks - first), ahead = panels == 1 ? kBlocksAhead : deep;
        const bfloat16* here = rows.data + s * kRows * rows.ld + first * kBlock;
        const bool down = s + 1 < squares || first + depth >= blocks;
        const bfloat16* next = down ? here + kRows * rows.ld : rows.data + (first + depth) * kBlock;
        for (int64_t p = 0; p < panels; p++)
          all[s * panels + p].add(here, rows.ld, x.data() + (p * blocks + first) * kSide, deep,
                                  {next, ahead, kRows * p / panels, kRows * (p + 1) / panels});
      }
    for (int64_t m = 0; m < tokens; m++)
      for (int64_t i = 0; i < count; i += kSide) {
        const Vec sums = all[i / kRows * panels + m / kChunk].of(m % kChunk, i % kRows);
        std::memcpy(h + m * ldh + r + i, &sums, std::min(kSide, count - i) * sizeof(float));
      }
  }
}

// h[m][r] = B[r] · x[m] for r in [begin, end); h is [tokens, ldh].
template <class W>
void project_rows(ByAmx<W>, const W& B, const std::vector<Chunk>& x, int64_t tokens, int64_t begin, int64_t end,
                  float* h, int64_t ldh) {
  if (tokens <= kSide) project_squares<1>(B, x, tokens, begin, end, h, ldh);
  else project_squares<2>(B, x, tokens, begin, end, h, ldh);
}

}  // namespace

#endif
