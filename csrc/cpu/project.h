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

// h = x Bᵀ in float32, [tokens, B.rows].
template <class W>
void project(const typename W::Element* x, int64_t tokens, const W& B, float* h) {
  using E = typename W::Element;
  const auto run = [&](auto method, auto project_some) {
    const auto arranged = arrange(method, x, tokens, B.columns);
    parallel(B.rows, B.columns * tokens,
             [&](int64_t begin, int64_t end) { project_some(method, arranged, begin, end); });
  };
  const auto rows = [&](auto method, const auto& arranged, int64_t begin, int64_t end) {
    project_rows(method, B, arranged, tokens, begin, end, h, B.rows);
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
      run(method, [&](auto method, const auto& arranged, int64_t begin, int64_t end) {
        project_converted(method, B, arranged, tokens, begin, end, h);
      });
    });
  }
}

}  // namespace
