// h = B x for many tokens by panels: tokens are panels, rows of B are lines.
#pragma once

#include <algorithm>
#include <vector>

#include "panels.h"

namespace {

// Returns x [tokens, size] as panels of kChunk tokens, [panels, steps]: each token is one lane. Lanes and steps that
// are left over are zero.
template <class Step>
std::vector<Chunk> token_panels(const Element<Step>* x, int64_t tokens, int64_t size, int64_t steps) {
  using Value = typename Step::Value;
  std::vector<Chunk> panels(chunks_of(tokens) * steps);
  Value values[kDepth];
  for (int64_t first = 0; first < steps_of<Step>(size); first += kDepth)
    for (int64_t m = 0; m < tokens; m++) {
      const int64_t k = first * Step::kRows, count = std::min(kDepth, steps_of<Step>(size) - first);
      Step::pack_elements(x + m * size + k, std::min(size - k, count * Step::kRows), values);
      char* lane = reinterpret_cast<char*>(&panels[m / kChunk * steps + first]) + m % kChunk * sizeof(Value);
      for (int64_t s = 0; s < count; s++) std::memcpy(lane + s * sizeof(Chunk), values + s, sizeof(Value));
    }
  return panels;
}

template <class Step>
std::vector<Chunk> arrange(ByPanels<Step>, const Element<Step>* x, int64_t tokens, int64_t size) {
  return token_panels<Step>(x, tokens, size, steps_of<Step>(size));
}

// The columns [k, k + size) of `count` rows from `row` on, as values. A whole tile is read in place if memory already
// holds it as values; else the values are packed into `wide`.
template <class Step>
struct Lines {
  using W = typename Step::Weights;
  using Value = typename Step::Value;
  const char* data;
  int64_t stride;  // bytes

  Lines(const W& weights, int64_t row, int64_t k, int64_t count, int64_t size, std::vector<Value>& wide)
      : data(reinterpret_cast<const char*>(wide.data())), stride(kDepth * sizeof(Value)) {
    if constexpr (sizeof(Value) == Step::kRows * sizeof(Element<Step>))
      if (count == kTile && size % Step::kRows == 0) {
        data = reinterpret_cast<const char*>(weights.at(row, k));
        stride = weights.ld * sizeof(Element<Step>);
        return;
      }
    for (int64_t i = 0; i < count; i++) Step::pack_elements(weights.at(row + i, k), size, wide.data() + i * kDepth);
  }
  Value operator()(int64_t s, int i) const { return load_bytes<Value>(data + i * stride + s * sizeof(Value)); }
};

// h[m][r] = B[r] · x[m] for r in [begin, end); h is [tokens, ldh]. The pieces are the same for every token, so each
// piece may have its own sum before it is added: that keeps two more bits than one long sum.
template <class Step, class W>
void project_rows(ByPanels<Step>, const W& B, const std::vector<Chunk>& x, int64_t tokens, int64_t begin, int64_t end,
                  float* h, int64_t ldh) {
  constexpr int64_t kPanelBytes = 1024 * 1024;  // of the second-level cache
  const int64_t size = B.columns, all = steps_of<Step>(size), panels = chunks_of(tokens);
  // A larger x does not stay in that cache from one tile of rows to the next, so several tiles share each piece of x.
  const int64_t tiles = panels * all * static_cast<int64_t>(sizeof(Chunk)) > kPanelBytes ? 8 : 1;
  std::vector<typename Step::Value> wide(kTile * kDepth);
  std::vector<Chunk> sums(tiles * panels * kTile);
  for (int64_t r = begin; r < end; r += tiles * kTile) {
    const int64_t last = std::min(end, r + tiles * kTile);
    std::fill(sums.begin(), sums.end(), Chunk{});
    for (int64_t first = 0; first < all; first += kDepth) {
      const int64_t k = first * Step::kRows, steps = std::min(kDepth, all - first);
      Chunk* tile = sums.data();
      for (int64_t row = r; row < last; row += kTile) {
        const int64_t count = std::min<int64_t>(kTile, last - row);
        const Lines<Step> lines(B, row, k, count, std::min(size - k, steps * Step::kRows), wide);
        for (int64_t p = 0; p < panels; p++, tile += kTile) {
          Chunk piece[kTile] = {};
          add_piece<Step>(x.data() + p * all + first, steps, lines, count, piece);
          for (int i = 0; i < kTile; i++) tile[i].lo += piece[i].lo, tile[i].hi += piece[i].hi;
        }
      }
    }
    for (int64_t p = 0; p < panels; p++)
      for (int64_t row = r; row < last; row++) {
        float lanes[kChunk];
        store(lanes, sums[((row - r) / kTile * panels + p) * kTile + (row - r) % kTile]);
        const int64_t ends = std::min(tokens, (p + 1) * kChunk);
        for (int64_t m = p * kChunk; m < ends; m++) h[m * ldh + row] = lanes[m % kChunk];
      }
  }
}

}  // namespace
