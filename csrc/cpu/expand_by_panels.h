// y = (m ⊙ h) rows for many tokens by panels: columns of the live rows are panels, tokens are lines.
#pragma once

#include <algorithm>
#include <vector>

#include "mask.h"
#include "panels.h"

namespace {

constexpr int64_t kSlabChunks = 4;  // panels that are gathered together, a few cache lines of each row
constexpr int64_t kSlab = kSlabChunks * kChunk;

template <class Step>
struct LiveRows {
  using W = typename Step::Weights;
  const Masked<ByPanels<Step>>& h;
  const W& weights;
  int64_t end;  // of the columns

  // Gathers the steps [begin, begin + steps) of the panels from column n on.
  void gather(int64_t begin, int64_t steps, int64_t n, Chunk* panels) const {
    const int64_t size = std::min(kSlab, end - n);
    for (int64_t s = 0; s < steps; s++) {
      float room[Step::kRows][W::room(kSlab) + 1];
      typename W::Term row[Step::kRows];
      for (int i = 0; i < Step::kRows; i++) row[i] = W::term(weights.at(h.row(begin + s, i), n), 1.0f, size, room[i]);
      for (int64_t c = 0; c * kChunk < size; c++)
        panels[c * kDepth + s] = Step::rows(row, c * kChunk, size - c * kChunk);
    }
  }

  // Prefetches a share of what gather reads after step `begin`, column n. Rows are far apart, so the hardware cannot
  // know which row comes next. It must be inlined: to the compiler, a function that only prefetches has no effect.
  __attribute__((always_inline)) void ask_ahead(int64_t begin, int64_t n, int64_t share, int64_t shares) const {
    int64_t next = begin + kDepth;
    if (next >= h.steps()) next = 0, n += kSlab;
    if (n >= end) return;
    const int64_t steps = std::min(kDepth, h.steps() - next), size = std::min(kSlab, end - n);
    for (int64_t s = next + steps * share / shares; s < next + steps * (share + 1) / shares; s++)
      for (int i = 0; i < Step::kRows; i++) ask_for<W>(weights.at(h.row(s, i), n), 0, size);
  }
};

// Computes Σ h[r] · row_r for every token. Calls done(token, column, sums in lane order) for the columns [begin, end).
template <class Step, class W, class Done>
void sum_rows(const Masked<ByPanels<Step>>& h, const W& weights, int64_t begin, int64_t end, Done done) {
  const LiveRows<Step> rows{h, weights, end};
  const int64_t tiles = (h.tokens + kTile - 1) / kTile;
  std::vector<Chunk> panels(kSlabChunks * kDepth), sums(kSlabChunks * tiles * kTile);
  for (int64_t n = begin; n < end; n += kSlab) {
    const int64_t chunks = std::min(kSlabChunks, chunks_of(end - n));
    std::fill(sums.begin(), sums.end(), Chunk{});
    for (int64_t first = 0; first < h.steps(); first += kDepth) {
      const int64_t steps = std::min(kDepth, h.steps() - first);
      rows.gather(first, steps, n, panels.data());
      for (int64_t i = 0; i < chunks * tiles; i++) {
        const int64_t chunk = i / tiles, tile = i % tiles;
        const auto* values = h.values.data() + (tile * h.steps() + first) * kTile;
        const auto value_at = [=](int64_t s, int m) { return values[s * kTile + m]; };
        add_piece<Step>(panels.data() + chunk * kDepth, steps, value_at, h.tokens - tile * kTile, &sums[i * kTile]);
        rows.ask_ahead(first, n, i, chunks * tiles);
      }
    }
    for (int64_t c = 0; c < chunks; c++)
      for (int64_t m = 0; m < h.tokens; m++) done(m, n + c * kChunk, sums[c * tiles * kTile + m]);
  }
}

}  // namespace
