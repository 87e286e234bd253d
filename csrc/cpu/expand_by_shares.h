// Sums over the live rows for one token, shared out to threads by rows.
//
// Threads that split the columns would read short pieces of scattered rows, which memory delivers slowly: 4-bit rows of
// 2048 columns are 1 KB long. So the live rows are cut into shares, and a thread adds whole rows. Each share has sums
// of its own. They are added in order, so no sum depends on the number of threads.
#pragma once

#include <memory>

#include "expand_by_integers.h"
#include "tiling.h"

namespace {

constexpr int64_t kShares = 4;

template <class W>
using OneToken = Masked<ByVectors<Single<W>>>;

// Rows, and which of them the token keeps.
template <class W>
struct Kept {
  const OneToken<W>* const h;
  const W* const rows;

  // Shares have whole tens of steps, which are added fastest. The last one has the rest.
  Share share(int64_t i) const { return {first_step(i), i + 1 < kShares ? first_step(i + 1) : h->steps()}; }

 private:
  int64_t first_step(int64_t i) const { return i * (h->steps() / kTen) / kShares * kTen; }
};

// sums[n] = the sum over a share, for the columns [begin, end).
template <class W>
void sum_share(const Kept<W>& kept, Share share, int64_t begin, int64_t end, Scratch<W>& scratch, float* sums) {
  std::fill(sums + begin, sums + chunks_of(end) * kChunk, 0.0f);
  const int64_t width = columns_at_once<W>(1);
  for (int64_t n = begin; n < end; n += width) {
    const int64_t size = std::min(width, end - n);
    const int64_t s = add_tens(*kept.h, share, *kept.rows, n, size, scratch, sums + n);
    add_all_groups(*kept.h, s, share.end, *kept.rows, n, size, sums + n, width);
  }
}

// Calls done(n, sums) for all columns, a chunk at a time: sums[i], in lane order, is the sum over the rows of kept[i].
template <size_t kCount, class W, class Done>
void sum_shares(const Kept<W> (&kept)[kCount], Done done) {
  constexpr int64_t kPieces = kShares * kCount;
  const int64_t columns = kept[0].rows->columns, units = units_of<W>(columns), width = units * W::kUnit;
  int64_t steps = 0;
  for (const Kept<W>& each : kept) steps += each.h->steps();
  const std::unique_ptr<Chunk[]> memory(new Chunk[kPieces * width / kChunk]);
  float* const sums = reinterpret_cast<float*>(memory.get());
  // The shares of all take turns, so that threads get equally much of each.
  parallel(kPieces * units, steps * W::kUnit / kPieces, [&](int64_t begin, int64_t end) {
    Scratch<W> scratch;
    for (int64_t piece = begin / units; piece * units < end; piece++) {
      const int64_t first = std::max<int64_t>(begin - piece * units, 0), last = std::min(end - piece * units, units);
      const Kept<W>& of = kept[piece % kCount];
      sum_share(of, of.share(piece / kCount), first * W::kUnit, std::min(last * W::kUnit, columns), scratch,
                sums + piece * width);
    }
  });
  parallel(units, kPieces * W::kUnit, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * W::kUnit; n < std::min(end * W::kUnit, columns); n += kChunk) {
      Chunk total[kCount] = {};
      for (int64_t piece = 0; piece < kPieces; piece++) {
        const Chunk part = load(sums + piece * width + n);
        total[piece % kCount].lo += part.lo, total[piece % kCount].hi += part.hi;
      }
      done(n, total);
    }
  });
}

}  // namespace
