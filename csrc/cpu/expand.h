// The second half of an adapter, y = (m ⊙ h) rows + bias, split over threads.
#pragma once

#include "expand_by_amx.h"
#include "expand_by_panels.h"
#include "expand_by_shares.h"
#include "tiling.h"

namespace {

// Returns a chunk of sums plus the bias of its columns, those from n on; `count` columns are left. `bias` may be null.
template <class T>
Chunk add_bias(Chunk sums, const T* bias, int64_t n, int64_t count) {
  const Chunk b = bias ? load_first(bias + n, count) : Chunk{};
  return {sums.lo + b.lo, sums.hi + b.hi};
}

// Adds the bias to finished sums and rounds them into y [tokens, columns].
template <class T>
struct Output {
  T* y;
  int64_t columns;
  const T* bias;

  void operator()(int64_t m, int64_t n, Chunk sums) const {
    store_first(y + m * columns + n, add_bias(sums, bias, n, columns - n), columns - n);
  }
};

// Returns `done` for sums in the lane order of W's elements, where it wants that of T.
template <class T, class W, class Done>
auto in_lanes_of(Done done) {
  if constexpr (std::is_same_v<typename W::Element, T>) return done;
  else return [=](int64_t m, int64_t n, Chunk natural) { done(m, n, to_lane_order<T>(natural)); };
}

// Computes (m ⊙ h) rows. Calls done(token, column, sums in the lane order of T), in several threads.
template <class T, class W, class Done>
void expand(const float* h, int64_t ldh, int64_t tokens, const W& rows, Mask mask, Done done) {
  const auto in_lanes = in_lanes_of<T, W>(done);
  if (tokens == 1) {
    const OneToken<W> kept(h, ldh, 1, rows.rows, mask);
    return sum_shares<1, W>({{&kept, &rows}}, [=](int64_t n, const Chunk(&sums)[1]) { in_lanes(0, n, sums[0]); });
  }
  for_method<W>(tokens, [&](auto method) {
    const Masked<decltype(method)> kept(h, ldh, tokens, rows.rows, mask);
    for_column_slices<W>(rows.columns, rows.rows * tokens,
                         [&](int64_t begin, int64_t end) { sum_rows(kept, rows, begin, end, in_lanes); });
  });
}

}  // namespace
