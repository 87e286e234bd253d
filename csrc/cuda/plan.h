// How a problem is cut up: functions of its shape, its dtype and the card.
#pragma once

#include <algorithm>

#include "device.cuh"

namespace {

// Up to this many tokens h stays in float32 and the weights are streamed; above it, dense products.
constexpr int64_t kDecodeTokens = 16;

// The token counts that kernels are compiled for.
inline int tokens_compiled(int64_t tokens) { return tokens == 1 ? 1 : tokens <= 8 ? 8 : 16; }

// How many warps read one row of B together: so many that each has `slice` bytes of it at a time.
inline int warps_a_row(int64_t row_bytes, int64_t slice, int most) {
  int warps = 1;
  while (warps < most && row_bytes >= 2 * warps * slice) warps *= 2;
  return warps;
}

// Packets of a tile of columns, `most` at the most: such that every block has one tile, or as many as any other;
// rounded up to 128 bytes, a line, if most blocks still have one, and to half a line otherwise (bench/NOTES.md). That
// tiles are narrow costs little, for blocks that have neighbouring columns of a row read them at about the same time;
// dealing out the rows of wider ones would need sums in global memory, and a second meeting of the blocks.
inline int packets_a_tile(int64_t packets, int64_t blocks, int64_t most) {
  const int64_t rounds = std::max<int64_t>(1, ceil_div(packets, blocks * most));
  const auto rounded_up = [&](int64_t to) {
    return std::clamp<int64_t>(to * ceil_div(packets, to * blocks * rounds), 1, most);
  };
  const bool most_are_busy = 5 * ceil_div(packets, rounded_up(8)) >= 3 * blocks;
  return int(rounded_up(most_are_busy ? 8 : 4));
}

}  // namespace
