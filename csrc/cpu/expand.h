// y = (m ⊙ h) rows, for whichever of the two regimes the number of tokens calls for.
#pragma once

#include "prefill.h"

namespace {

// Calls done(token, column, chunk of sums in T's lane order) for every token and every chunk of the
// columns [begin, end), which starts at a multiple of kChunk.
template <class T, class Done>
void sum_rows(const Live& live, const T* rows, int64_t ld, int64_t begin, int64_t end, Done done) {
  const int64_t stride = chunks_of(end - begin) * kChunk;
  std::vector<float> sums(live.tokens * stride);
  sum_live_rows(rows + begin, ld, live, end - begin, sums.data(), stride);
  for (int64_t m = 0; m < live.tokens; m++)
    for (int64_t n = begin; n < end; n += kChunk) done(m, n, load(sums.data() + m * stride + n - begin));
}

template <class T, class Done>
void sum_rows(const Masked<T>& z, const T* rows, int64_t ld, int64_t begin, int64_t end, Done done) {
  std::vector<Chunk> panel(z.steps);
  for (int64_t n = begin; n < end; n += kChunk) {
    for (int64_t s = 0; s < z.steps; s++) {
      const int64_t r = s * Step<T>::kRanks;
      panel[s] = Step<T>::pack_rows(rows + r * ld + n, ld, end - n, r + 1 == z.ranks);
    }
    const auto done_here = [&](int64_t m, Chunk sums) { done(m, n, sums); };
    int64_t m = 0;
    for (; m + kPanelTokens <= z.tokens; m += kPanelTokens) panel_tile<kPanelTokens>(z, panel.data(), m, done_here);
    for (; m + 4 <= z.tokens; m += 4) panel_tile<4>(z, panel.data(), m, done_here);
    for (; m < z.tokens; m++) panel_tile<1>(z, panel.data(), m, done_here);
  }
}

}  // namespace
