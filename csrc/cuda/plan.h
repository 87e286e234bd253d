// How a problem is cut up: one function of its shape, its dtype and the card.
#pragma once

#include <algorithm>
#include <cstdint>

namespace {

// Up to this many tokens h stays in float32 and the weights are streamed; above it, dense products.
constexpr int64_t kDecodeTokens = 16;

struct Card {
  int capability;  // 90 for 9.0
  int processors;
};

// What is worth choosing for a generation of cards. No row was measured: they are what arithmetic suggests
// (bench/NOTES.md), and a card takes the last row that is not newer than itself.
struct Tuning {
  int capability;
  int blocks;         // on a multiprocessor, at most
  int64_t part_rows;  // the rows that a split should have before there are more splits
};
constexpr Tuning kTunings[] = {{80, 1, 64}, {90, 1, 64}, {100, 1, 64}};

inline Tuning tuning_of(Card card) {
  Tuning found = kTunings[0];
  for (const Tuning& tuning : kTunings)
    if (tuning.capability <= card.capability) found = tuning;
  return found;
}

// The token counts that kernels are compiled for. More than 8 tokens take turns in groups of 8.
inline int tokens_compiled(int64_t tokens) { return tokens == 1 ? 1 : tokens <= 4 ? 4 : 8; }

// How many warps read one row of B together: so many that each of their threads reads 16 bytes at least.
inline int warps_a_row(int64_t row_bytes, int most) {
  int warps = 1;
  while (warps < most && row_bytes >= 2 * warps * 32 * 16) warps *= 2;
  return warps;
}

// Splits of `rows` rows, such that tiles times splits keep `blocks` blocks busy; few, because each one writes
// sums that the last to finish reads again.
inline int splits_of(int64_t rows, int64_t tiles, int64_t blocks, int64_t part_rows) {
  constexpr int64_t kMost = 32;
  constexpr double kCost = 0.004;  // of a split, as a share of the whole
  int best = 1;
  double best_use = 0;
  for (int64_t splits = 1; splits <= std::clamp<int64_t>(rows / part_rows, 1, kMost); splits++) {
    const int64_t items = std::max<int64_t>(tiles, 1) * splits, rounds = (items + blocks - 1) / blocks;
    const double use = double(items) / double(rounds * blocks) - kCost * double(splits);
    if (use > best_use) best = int(splits), best_use = use;
  }
  return best;
}

}  // namespace
