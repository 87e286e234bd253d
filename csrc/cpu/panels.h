// Many tokens, where the speed is bound by arithmetic: what both halves of an adapter share.
//
// A panel is kChunk columns of one factor: of the rows, or the tokens of x. A piece of a panel stays in the caches
// while tiles of kTile lines of the other factor are multiplied with it. Their sums stay in registers, and the order of
// a sum is that of the steps.
#pragma once

#include "steps.h"

namespace {

#if defined(__AVX512F__)
constexpr int kTile = 12;  // 24 sums, a chunk and a value in 32 registers
#else
constexpr int kTile = 6;
#endif
constexpr int64_t kDepth = 64;  // steps of a piece, 8 KB of a panel

// A method: panels.
template <class S>
struct ByPanels {
  using Step = S;
  static int64_t width(int64_t /*tokens*/) { return kTile; }
};

// sums[i] += Σ value_at(s, i) · panel[s] for a tile of kCount lines. Sums are added step by step: the masks of other
// tokens move the ends of the pieces, and must not change the bits. The pragmas are those of add_tile, for the same
// reasons.
template <class Step, int kCount, class ValueAt>
inline void add_piece(const Chunk* panel, int64_t steps, ValueAt value_at, Chunk* sums) {
  Chunk tile[kCount];
#pragma GCC unroll 16
  for (int i = 0; i < kCount; i++) tile[i] = sums[i];
#pragma GCC unroll 1
  for (int64_t s = 0; s < steps; s++)
#pragma GCC unroll 16
    for (int i = 0; i < kCount; i++) Step::multiply_add(tile[i], value_at(s, i), panel[s]);
#pragma GCC unroll 16
  for (int i = 0; i < kCount; i++) sums[i] = tile[i];
}

// The same for the first `count` lines: half a tile if that is enough.
template <class Step, class ValueAt>
inline void add_piece(const Chunk* panel, int64_t steps, ValueAt value_at, int64_t count, Chunk* sums) {
  if (count > kTile / 2) add_piece<Step, kTile>(panel, steps, value_at, sums);
  else add_piece<Step, kTile / 2>(panel, steps, value_at, sums);
}

}  // namespace
