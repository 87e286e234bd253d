// y = (m ⊙ h) rows on matrix tiles: lines are tokens; columns are those of the rows, the even ones in one tile, the odd
// in another.
#pragma once

#include <algorithm>
#include <vector>

#include "masked.h"
#include "tiles.h"

#if defined(__AMX_BF16__)

namespace {

// The kept values of a line, [kBlock], as sums of `parts` bfloat16, each in a tile of its own. All but the last are
// truncated: three hold every bit of a float32. What is not finite has one part, or others would make it NaN.
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

template <>
struct Masked<Tiles> {
  int64_t tokens, parts;
  std::vector<int64_t> blocks;  // those of which a token keeps a row
  std::vector<int64_t> row;     // [all blocks, kBlock]; in place of one that no token keeps another, times zero
  std::vector<Tile> values;     // [all blocks, tiles of tokens, parts]

  Masked(const float* h, int64_t ldh, int64_t tokens, int64_t ranks, Mask mask, int64_t parts)
      : tokens(tokens), parts(parts) {
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

// Two tiles: the even and the odd columns of a chunk, of a block of rows or of sums.
struct ColumnTiles {
  Tile even, odd;
};

// The sums of a slab of columns, worked off in pieces of kDepth blocks of rows and kWidth chunks. While tiles of tokens
// meet one piece the next is gathered, a share of it with each two.
template <int kDepth, int kWidth>
class Slab {
 public:
  // `rows`: those of the blocks that are wanted, and as many more as fill the last piece.
  Slab(const Masked<Tiles>& h, const bfloat16* const* rows, int64_t begin, int64_t end, ColumnTiles* sums)
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
  // After the last one comes the first.
  Place after(Place place) const {
    if (place.column + kWidth * kChunk < end_) return {place.block, place.column + kWidth * kChunk};
    return {place.block + kDepth < blocks() ? place.block + kDepth : 0, begin_};
  }

  // The pairs [from, to) of the rows of a piece; asks for those of a later one.
  void gather(Place here, Place later, int64_t from, int64_t to, Piece& piece) const {
    for (int64_t i = from; i < to; i++) {
      const bfloat16* const* row = rows_ + here.block * kBlock + 2 * i;
      const bfloat16* const* asked = rows_ + later.block * kBlock + 2 * i;
      for (int64_t c = 0; c < kWidth; c++) {
        __builtin_prefetch(asked[0] + later.column + c * kChunk);
        __builtin_prefetch(asked[1] + later.column + c * kChunk);
      }
      const bfloat16* const pair[2] = {row[0] + here.column, row[1] + here.column};
      for (int64_t c = 0; c < kWidth && here.column + c * kChunk < end_; c++) {
        const Chunk chunk = Pair::rows(pair, c * kChunk, end_ - here.column - c * kChunk);
        ColumnTiles& to = piece.tiles[c][i / kSide];
        std::memcpy(to.even.lines[i % kSide], &chunk.lo, sizeof chunk.lo);
        std::memcpy(to.odd.lines[i % kSide], &chunk.hi, sizeof chunk.hi);
      }
    }
  }

  // What one or two tiles of tokens get of a piece.
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

  const Masked<Tiles>& h_;
  const bfloat16* const* rows_;
  int64_t begin_, end_, tiles_;
  ColumnTiles* sums_;
};

// Σ h[r] · row_r for every token. Calls done(token, column, sums in lane order) for the columns [begin, end).
template <class Done>
void multiply_tiles(const Masked<Tiles>& h, const bfloat16* data, int64_t ld, int64_t begin, int64_t end, Done done) {
  constexpr int64_t kSumBytes = 512 * 1024;  // of the second-level cache
  constexpr int kDepth = 4;
  const int64_t tiles = tiles_of(h.tokens), lines = std::min(h.tokens, kSide);
  amx::Shapes shapes;
  for (int tokens : {0, 1, 2, 3, 6, 7}) shapes.set(tokens, lines, amx::kRowBytes);
  for (int rows : {4, 5}) shapes.set(rows, kSide, amx::kRowBytes);
  const amx::Shapes::InUse in_use(shapes);
  std::vector<const bfloat16*> rows;
  for (int64_t block : h.blocks)
    for (int64_t i = 0; i < kBlock; i++) rows.push_back(data + h.row[block * kBlock + i] * ld);
  rows.resize((h.blocks.size() + kDepth - 1) / kDepth * kDepth * kBlock, data);
  const int64_t width = std::max<int64_t>(1, kSumBytes / sizeof(ColumnTiles) / tiles) * kChunk;
  std::vector<ColumnTiles> sums;
  for (int64_t n = begin; n < end; n += width) {
    const int64_t last = std::min(n + width, end);
    sums.assign(chunks_of(last - n) * tiles, {});
    // more than two tiles of tokens take longer than their rows from memory: a deep piece spares them loads of their
    // sums
    if (tiles > 2) Slab<kDepth, 8>(h, rows.data(), n, last, sums.data()).add_all();
    else Slab<1, 1>(h, rows.data(), n, last, sums.data()).add_all();
    for (int64_t i = n; i < last; i += kChunk)
      for (int64_t m = 0; m < h.tokens; m++) {
        const ColumnTiles& both = sums[(i - n) / kChunk * tiles + m / kSide];
        done(m, i, {load_bytes<Vec>(both.even.lines[m % kSide]), load_bytes<Vec>(both.odd.lines[m % kSide])});
      }
  }
}

}  // namespace

#endif
