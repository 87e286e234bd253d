// Several tokens in bfloat16 on matrix tiles (AMX): what both halves of an adapter share.
//
// A sum runs over blocks of kBlock steps that keep their places, whoever wants them, because the processor adds up a
// block before it adds to a sum: so a token's bits do not depend on its company.
#pragma once

#include <type_traits>

#include "amx.h"
#include "simd.h"

namespace {

// How rows are multiplied: by blocks.
struct Tiles {
  using Element = bfloat16;
};

#if defined(__AMX_BF16__)
template <class T>
constexpr bool kHasTiles = std::is_same_v<T, bfloat16>;

constexpr int64_t kSide = amx::kRows;  // lines of a tile; in a line: float32 sums, or pairs of bfloat16
constexpr int64_t kBlock = 2 * kSide;  // bfloat16 in a line
constexpr int64_t kBlocksAhead = 8;    // how far ahead of their use lines of weights are asked for

struct alignas(amx::kRowBytes) Tile {
  float lines[kSide][kSide];
};

inline int64_t blocks_of(int64_t elements) { return (elements + kBlock - 1) / kBlock; }
inline int64_t tiles_of(int64_t tokens) { return (tokens + kSide - 1) / kSide; }
#else
template <class T>
constexpr bool kHasTiles = false;
#endif

}  // namespace
