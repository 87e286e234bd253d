// The first half of an adapter, h = B x, split over threads.
#pragma once

#include <vector>

#include "project_by_amx.h"
#include "project_by_panels.h"
#include "project_by_vectors.h"
#include "tiling.h"

namespace {

// Returns h = x Bᵀ in float32, [tokens, B.rows].
template <class W>
std::vector<float> project(const typename W::Element* x, int64_t tokens, const W& B) {
  std::vector<float> h(tokens * B.rows);
  for_method<W>(tokens, [&](auto method) {
    const auto arranged = arrange(method, x, tokens, B.columns);
    parallel(B.rows, B.columns * tokens, [&](int64_t begin, int64_t end) {
      project_rows(method, B, arranged, tokens, begin, end, h.data(), B.rows);
    });
  });
  return h;
}

}  // namespace
