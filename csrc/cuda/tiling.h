// How the work is cut up, as functions of the shape, the dtype and the card.
#pragma once

#include <algorithm>

#include "device.cuh"

namespace {

// Up to this many tokens h stays in float32 and the weights are streamed; more tokens take dense products.
constexpr int64_t kDecodeTokens = 16;

// Returns how many warps read one row of B together: so many that each has at least `slice` bytes of it.
inline int warps_a_row(int64_t row_bytes, int64_t slice, int most) {
  int warps = 1;
  while (warps < most && row_bytes >= 2 * warps * slice) warps *= 2;
  return warps;
}

// Packets that are a line of 128 bytes, and the least to which the packets of a tile are rounded up.
struct Rounding {
  int64_t line, least;
};

// Returns the packets of a tile of columns, at most `most`, such that all blocks have one tile, or equally many. The
// number is rounded up to a line if most blocks still have a tile then, else to half a line and so on
// (bench/NOTES.md). Narrow tiles cost little, because blocks with neighbouring columns of a row read them at about the
// same time. Splitting the rows of wider tiles would need sums in global memory and a second barrier.
inline int packets_a_tile(int64_t packets, int64_t blocks, int64_t most, Rounding rounding) {
  const int64_t rounds = std::max<int64_t>(1, ceil_div(packets, blocks * most));
  const auto rounded_up = [&](int64_t to) {
    return std::clamp<int64_t>(to * ceil_div(packets, to * blocks * rounds), 1, most);
  };
  const auto most_are_busy = [&](int64_t width) { return 5 * ceil_div(packets, width) >= 3 * blocks; };
  int64_t to = rounding.line;
  while (to > rounding.least && !most_are_busy(rounded_up(to))) to /= 2;
  return int(rounded_up(to));
}

}  // namespace
