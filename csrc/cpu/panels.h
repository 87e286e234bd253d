// Products of many tokens, bound by arithmetic: both halves of an adapter in prefill.
//
// A panel is kChunk columns of one factor: of the rows, or the tokens of x. Piece by piece it stays in the caches,
// where tiles of kTile lines of the other factor meet it with their sums in registers, in the order of the steps.
#pragma once

#include <algorithm>
#include <vector>

#include "masked.h"

namespace {

#if defined(__AVX512F__)
constexpr int kTile = 12;  // 24 sums, a chunk and a value in 32 registers
#else
constexpr int kTile = 6;
#endif
constexpr int64_t kDepth = 64;      // steps of a piece, 8 KB of a panel
constexpr int64_t kSlabChunks = 4;  // panels that are gathered together, a few lines of each row
constexpr int64_t kSlab = kSlabChunks * kChunk;

// sums[i] += Σ value_at(s, i) · panel[s] for a tile of kCount lines, step by step: what other tokens keep moves the
// ends of the pieces, and must not change the bits. The pragmas are those of add_tile, for its reasons.
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

// The same for the first `count` lines, where half a tile may do.
template <class Step, class ValueAt>
inline void add_piece(const Chunk* panel, int64_t steps, ValueAt value_at, int64_t count, Chunk* sums) {
  if (count > kTile / 2) add_piece<Step, kTile>(panel, steps, value_at, sums);
  else add_piece<Step, kTile / 2>(panel, steps, value_at, sums);
}

// ---- y = (m ⊙ h) rows: panels are columns of the live rows, lines are tokens ----

template <class Step>
struct LiveRows {
  using T = typename Step::Element;
  const Masked<Step>& h;
  const T* data;
  int64_t ld, end;  // columns end here

  // The steps [begin, begin + steps) of the panels from column n on.
  void gather(int64_t begin, int64_t steps, int64_t n, Chunk* panels) const {
    const int64_t size = std::min(kSlab, end - n);
    for (int64_t s = 0; s < steps; s++) {
      const T* row[Step::kRows];
      for (int i = 0; i < Step::kRows; i++) row[i] = data + h.row(begin + s, i) * ld + n;
      for (int64_t c = 0; c * kChunk < size; c++)
        panels[c * kDepth + s] = Step::rows(row, c * kChunk, std::min<int64_t>(kChunk, size - c * kChunk));
    }
  }

  // Asks for a share of what gather reads after step `begin`, column n: rows are far apart, and the hardware does not
  // know which comes next. Inlined, because a function that does nothing else has no effect in the compiler's eyes.
  __attribute__((always_inline)) void ask_ahead(int64_t begin, int64_t n, int64_t share, int64_t shares) const {
    int64_t next = begin + kDepth;
    if (next >= h.steps()) next = 0, n += kSlab;
    if (n >= end) return;
    const int64_t steps = std::min(kDepth, h.steps() - next), bytes = std::min(kSlab, end - n) * sizeof(T);
    for (int64_t s = next + steps * share / shares; s < next + steps * (share + 1) / shares; s++)
      for (int i = 0; i < Step::kRows; i++)
        for (int64_t b = 0; b < bytes; b += kLineBytes)
          __builtin_prefetch(reinterpret_cast<const char*>(data + h.row(s, i) * ld + n) + b);
  }
};

// Σ h[r] · row_r for every token. Calls done(token, column, sums in lane order) for the columns [begin, end).
template <class Step, class Done>
void multiply_panels(const Masked<Step>& h, const typename Step::Element* data, int64_t ld, int64_t begin, int64_t end,
                     Done done) {
  const LiveRows<Step> rows{h, data, ld, end};
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

// ---- h = B x: panels are tokens, lines are rows of B ----

// x [tokens, size] as panels of kChunk tokens, [panels, steps]: a token is one lane. Zeros in the lanes and steps that
// are left over.
template <class Step>
std::vector<Chunk> token_panels(const typename Step::Element* x, int64_t tokens, int64_t size, int64_t steps) {
  using Value = typename Step::Value;
  std::vector<Chunk> panels(chunks_of(tokens) * steps);
  Value values[kDepth];
  for (int64_t first = 0; first < steps_of<Step>(size); first += kDepth)
    for (int64_t m = 0; m < tokens; m++) {
      const int64_t k = first * Step::kRows, count = std::min(kDepth, steps_of<Step>(size) - first);
      Step::widen(x + m * size + k, std::min(size - k, count * Step::kRows), values);
      char* lane = reinterpret_cast<char*>(&panels[m / kChunk * steps + first]) + m % kChunk * sizeof(Value);
      for (int64_t s = 0; s < count; s++) std::memcpy(lane + s * sizeof(Chunk), values + s, sizeof(Value));
    }
  return panels;
}

// `size` elements of each of `count` lines, as values: where they lie if memory holds them as values already, else in
// `wide`. A whole tile is read in the first case.
template <class Step>
struct Lines {
  using T = typename Step::Element;
  using Value = typename Step::Value;
  const char* data;
  int64_t stride;  // bytes

  Lines(const T* lines, int64_t ld, int64_t count, int64_t size, std::vector<Value>& wide) {
    constexpr bool kValues = sizeof(Value) == Step::kRows * sizeof(T);
    const bool there = kValues && count == kTile && size % Step::kRows == 0;
    data = there ? reinterpret_cast<const char*>(lines) : reinterpret_cast<const char*>(wide.data());
    stride = there ? ld * sizeof(T) : kDepth * sizeof(Value);
    for (int64_t i = 0; i < count && !there; i++) Step::widen(lines + i * ld, size, wide.data() + i * kDepth);
  }
  Value operator()(int64_t s, int i) const { return load_bytes<Value>(data + i * stride + s * sizeof(Value)); }
};

// h[m][r] = B[r] · x[m] for r in [begin, end); x is token_panels, h is [tokens, ldh]. The pieces are the same for every
// token, so that they can be summed one by one first, which keeps two more bits than one long sum.
template <class Step>
void project_panels(const typename Step::Element* B, int64_t ldb, const Chunk* x, int64_t tokens, int64_t size,
                    int64_t begin, int64_t end, float* h, int64_t ldh) {
  constexpr int64_t kPanelBytes = 1024 * 1024;  // of the second-level cache
  const int64_t all = steps_of<Step>(size), panels = chunks_of(tokens);
  // an x that is larger would come from further away for every tile of rows: several meet a piece of it in turn
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
        const Lines<Step> lines(B + row * ldb + k, ldb, count, std::min(size - k, steps * Step::kRows), wide);
        for (int64_t p = 0; p < panels; p++, tile += kTile) {
          Chunk piece[kTile] = {};
          add_piece<Step>(x + p * all + first, steps, lines, count, piece);
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
