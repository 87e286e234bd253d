// y = (m ⊙ h) rows on matrix tiles: tokens are lines; the even columns of the rows are in one tile, the odd columns in
// another.
#pragma once

#include <algorithm>
#include <vector>

#include "amx.h"
#include "mask.h"

#if defined(__AMX_BF16__)

namespace {

// Splits the kept values of a line, [kBlock], into `parts` bfloat16 that add up to them, each part in its own tile. All
// parts but the last are truncated, so kParts parts hold every bit of a float32. Values that are not finite get one
// part, because more would make an infinity NaN.
inline void split(const float* kept, int64_t parts, Tile* tiles, int64_t line) {
  for (int64_t half = 0; half < 2; half++) {
    Vec rest = load_bytes<Vec>(kept + half * kLanes);
    for (int64_t p = 0; p < parts; p++) {
      const Bits part = p + 1 < parts ? (Bits)rest & 0xffff0000u : round_to_bfloat16(rest);
      const __m256i values = _mm512_cvtepi32_epi16((__m512i)(part >> 16));
      std::memcpy(tiles[p].lines[line] + half * kLanes / 2, &values, sizeof values);
      rest -= (Vec)part;
      rest = rest == rest ? rest : Vec{};
    }
  }
}

// Up to kExactTokens tokens h keeps all of its bits; with more tokens it is rounded to one bfloat16.
template <class W>
struct Masked<ByAmx<W>> {
  int64_t tokens, parts;
  std::vector<int64_t> blocks;  // the blocks with a row that some token keeps
  std::vector<int64_t> row;     // [all blocks, kBlock]; a row that no token keeps is replaced by a kept one, times zero
  std::vector<Tile> values;     // [all blocks, tiles of tokens, parts]

  Masked(const float* h, int64_t ldh, int64_t tokens, int64_t ranks, Mask mask)
      : tokens(tokens), parts(tokens <= kExactTokens ? kParts : 1) {
    const int64_t all = blocks_of(ranks), tiles = tiles_of(tokens);
    std::vector<uint32_t> live(all * kBlock);
    std::vector<float> kept(all * kBlock);
    values.resize(all * tiles * parts);
    for (int64_t m = 0; m < tokens; m++) {
      mask.apply(h + m * ldh, ranks, kept.data(), live.data());
      for (int64_t b = 0; b < all; b++)
        split(kept.data() + b * kBlock, parts, &values[(b * tiles + m / kSide) * parts], m % kSide);
    }
    row.resize(all * kBlock);
    for (int64_t b = 0; b < all; b++) list(live.data() + b * kBlock, b);
  }

 private:
  void list(const uint32_t* live, int64_t block) {
    const int64_t any = std::find(live, live + kBlock, 1u) - live;
    if (any == kBlock) return;
    blocks.push_back(block);
    for (int64_t i = 0; i < kBlock; i++) row[block * kBlock + i] = block * kBlock + (live[i] ? i : any);
  }
};

// The even and the odd columns of a chunk, for a block of rows or for sums.
struct ColumnTiles {
  Tile even, odd;
};

// The sums of a slab of columns. They are computed in pieces of kDepth blocks of rows and kWidth chunks: while the
// tiles of tokens are multiplied with one piece, two at a time, the next piece is gathered.
template <class W, int kDepth, int kWidth>
class Slab {
 public:
  using Row = typename W::Row;

  // `rows` holds the rows of the live blocks, and enough others to fill the last piece.
  Slab(const Masked<ByAmx<W>>& h, const Row* rows, int64_t begin, int64_t end, ColumnTiles* sums)
      : h_(h), rows_(rows), begin_(begin), end_(end), tiles_(tiles_of(h.tokens)), sums_(sums) {}

  void add_all() const {
    if (!blocks()) return;
    std::vector<Piece> pieces(2);
    const int64_t wide = (chunks_of(end_ - begin_) + kWidth - 1) / kWidth, deep = (blocks() + kDepth - 1) / kDepth;
    Place here{0, begin_}, next = after(here), later = here;
    for (int64_t n = 0; n < kBlocksAhead; n += kWidth) later = after(later);
    gather(here, later, 0, kPairs, pieces[0]);
    for (int64_t i = 0; i < wide * deep; i++, here = next, next = after(next)) {
      later = after(later);
      for (int64_t tile = 0; tile < tiles_; tile += 2) {
        const int64_t following = std::min(tile + 2, tiles_);
        if (i + 1 < wide * deep)
          gather(next, later, kPairs * tile / tiles_, kPairs * following / tiles_, pieces[(i + 1) % 2]);
        if (following - tile == 2) add<true>(here, tile, pieces[i % 2]);
        else add<false>(here, tile, pieces[i % 2]);
      }
    }
  }

 private:
  static constexpr int64_t kPairs = kDepth * kSide;
  struct Place {
    int64_t block, column;
  };
  struct Piece {
    ColumnTiles tiles[kWidth][kDepth];
  };

  int64_t blocks() const { return h_.blocks.size(); }
  // Returns the place after this one. After the last place comes the first.
  Place after(Place place) const {
    if (place.column + kWidth * kChunk < end_) return {place.block, place.column + kWidth * kChunk};
    return {place.block + kDepth < blocks() ? place.block + kDepth : 0, begin_};
  }

  // Gathers the pairs [from, to) of the rows of a piece, and prefetches those of a later piece.
  void gather(Place here, Place later, int64_t from, int64_t to, Piece& piece) const {
    for (int64_t i = from; i < to; i++) {
      const Row* row = rows_ + here.block * kBlock + 2 * i;
      const Row* asked = rows_ + later.block * kBlock + 2 * i;
      for (int64_t c = 0; c < kWidth; c++) {
        ask_for<W>(asked[0], later.column + c * kChunk);
        ask_for<W>(asked[1], later.column + c * kChunk);
      }
      const int64_t size = std::min<int64_t>(kWidth * kChunk, end_ - here.column);
      float room[2][W::room(kWidth * kChunk) + 1];
      const typename W::Term terms[2] = {W::term(W::skip(row[0], here.column), 1.0f, size, room[0]),
                                         W::term(W::skip(row[1], here.column), 1.0f, size, room[1])};
      for (int64_t c = 0; c * kChunk < size; c++) {
        const Chunk chunk = Pair<W>::rows(terms, c * kChunk, size - c * kChunk);
        ColumnTiles& to = piece.tiles[c][i / kSide];
        std::memcpy(to.even.lines[i % kSide], &chunk.lo, sizeof chunk.lo);
        std::memcpy(to.odd.lines[i % kSide], &chunk.hi, sizeof chunk.hi);
      }
    }
  }

  // Adds the products of one or two tiles of tokens with a piece.
  template <bool kTwo>
  void add(Place here, int64_t tile, const Piece& piece) const {
    const int64_t depth = std::min<int64_t>(kDepth, blocks() - here.block), parts = h_.parts;
    for (int64_t c = 0; c < kWidth && here.column + c * kChunk < end_; c++) {
      ColumnTiles* sums = sums_ + ((here.column - begin_) / kChunk + c) * tiles_ + tile;
      amx::load<0>(&sums[0].even), amx::load<1>(&sums[0].odd);
      if constexpr (kTwo) amx::load<2>(&sums[1].even), amx::load<3>(&sums[1].odd);
      for (int64_t d = 0; d < depth; d++) {
        const Tile* values = &h_.values[(h_.blocks[here.block + d] * tiles_ + tile) * parts];
        amx::load<4>(&piece.tiles[c][d].even), amx::load<5>(&piece.tiles[c][d].odd);
        for (int64_t p = 0; p < parts; p++) {
          amx::load<6>(values + p);
          amx::multiply_add<0, 6, 4>(), amx::multiply_add<1, 6, 5>();
          if constexpr (kTwo) {
            amx::load<7>(values + parts + p);
            amx::multiply_add<2, 7, 4>(), amx::multiply_add<3, 7, 5>();
          }
        }
      }
      amx::store<0>(&sums[0].even), amx::store<1>(&sums[0].odd);
      if constexpr (kTwo) amx::store<2>(&sums[1].even), amx::store<3>(&sums[1].odd);
    }
  }

  const Masked<ByAmx<W>>& h_;
  const Row* rows_;
  int64_t begin_, end_, tiles_;
  ColumnTiles* sums_;
};

// Computes Σ h[r] · row_r for every token. Calls done(token, column, sums in lane order) for the columns [begin, end).
template <class W, class Done>
void sum_rows(const Masked<ByAmx<W>>& h, const W& weights, int64_t begin, int64_t end, Done done) {
  constexpr int64_t kSumBytes = 512 * 1024;  // of the second-level cache
  constexpr int kDepth = 4;
  const int64_t tiles = tiles_of(h.tokens), lines = std::min(h.tokens, kSide);
  amx::Shapes shapes;
  for (int tokens : {0, 1, 2, 3, 6, 7}) shapes.set(tokens, lines, amx::kRowBytes);
  for (int rows : {4, 5}) shapes.set(rows, kSide, amx::kRowBytes);
  const amx::Shapes::InUse in_use(shapes);
  std::vector<typename W::Row> rows;
  for (int64_t block : h.blocks)
    for (int64_t i = 0; i < kBlock; i++) rows.push_back(weights.at(h.row[block * kBlock + i], 0));
  rows.resize((h.blocks.size() + kDepth - 1) / kDepth * kDepth * kBlock, weights.at(0, 0));
  const int64_t width = std::max<int64_t>(1, kSumBytes / sizeof(ColumnTiles) / tiles) * kChunk;
  std::vector<ColumnTiles> sums;
  for (int64_t n = begin; n < end; n += width) {
    const int64_t last = std::min(n + width, end);
    sums.assign(chunks_of(last - n) * tiles, {});
    // With more than two tiles of tokens, multiplying takes longer than reading the rows. A deep piece then saves loads
    // of sums.
    if (tiles > 2) Slab<W, kDepth, 8>(h, rows.data(), n, last, sums.data()).add_all();
    else Slab<W, 1, 1>(h, rows.data(), n, last, sums.data()).add_all();
    for (int64_t i = n; i < last; i += kChunk)
      for (int64_t m = 0; m < h.tokens; m++) {
        const ColumnTiles& both = sums[(i - n) / kChunk * tiles + m / kSide];
        done(m, i, {load_bytes<Vec>(both.even.lines[m % kSide]), load_bytes<Vec>(both.odd.lines[m % kSide])});
      }
  }
}

}  // namespace

#endif
