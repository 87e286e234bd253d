// The first half of an adapter, h = B x, split over threads.
#pragma once

#include <vector>

#include "project_by_amx.h"
#include "project_by_integers.h"
#include "project_by_panels.h"
#include "project_by_vectors.h"
#include "project_converted.h"
#include "tiling.h"

namespace {

// h = x Bᵀ in float32 for several B that read the same x, side by side: [tokens, ldh], the rows of all.
template <class W>
void project(const typename W::Element* x, int64_t tokens, const std::vector<W>& all, float* h, int64_t ldh) {
  using E = typename W::Element;
  const W& B = all[0];
  const auto run = [&](auto method, auto project_some) {
    const auto arranged = arrange(method, x, tokens, B.columns);
    parallel(ldh, B.columns * tokens, [&](int64_t begin, int64_t end) {
      int64_t first = 0;  // column of h of each B
      for (const W& each : all) {
        const int64_t from = std::max<int64_t>(begin - first, 0), upto = std::min(end - first, each.rows);
        if (from < upto) project_some(method, each, arranged, from, upto, h + first);
        first += each.rows;
      }
    });
  };
  const auto rows = [&](auto method, const W& each, const auto& arranged, int64_t begin, int64_t end, float* into) {
    project_rows(method, each, arranged, tokens, begin, end, into, ldh);
  };
  if constexpr (W::kAddressable) {
    for_method<W>(tokens, [&](auto method) { run(method, rows); });
  } else {
    if constexpr (std::is_same_v<E, float>) {
#if defined(__SSE2__)
      if (B.fixed_point && tokens <= kFixedPointTokens) return run(ByIntegers<W>{}, rows);
#endif
      if (tokens <= kTileTokens) return run(ByVectors<Single<W>>{}, rows);
    }
    for_method<Plain<E>>(tokens, [&](auto method) {
      run(method, [&](auto method, const W& each, const auto& arranged, int64_t begin, int64_t end, float* into) {
        project_converted(method, each, arranged, tokens, begin, end, into, ldh);
      });
    });
  }
}

}  // namespace
