// The first half of an adapter, h = B x, split over threads.
#pragma once

#include <vector>

#include "project_by_amx.h"
#include "project_by_integers.h"
#include "project_by_panels.h"
#include "project_by_vectors.h"
#include "tiling.h"

namespace {

// Converts rows of B block by block, because every token multiplies them, and then proceeds as with plain rows.
template <class Method, class W, class Arranged>
void project_converted(Method method, const W& B, const Arranged& x, int64_t tokens, int64_t begin, int64_t end,
                       float* h) {
  using T = typename W::Element;
  constexpr int64_t kBufferBytes = 256 * 1024;
  const int64_t row_bytes = std::max<int64_t>(1, B.columns * sizeof(T));
  const int64_t most = std::max<int64_t>(1, kBufferBytes / row_bytes / kTile) * kTile;
  std::vector<T> buffer(std::min(most, end - begin) * B.columns);
  for (int64_t r = begin; r < end; r += most) {
    const int64_t count = std::min(most, end - r);
    for (int64_t i = 0; i < count; i++) W::elements(B.at(r + i, 0), B.columns, buffer.data() + i * B.columns);
    const Plain<T> converted{buffer.data(), count, B.columns, B.columns};
    project_rows(method, converted, x, tokens, 0, count, h + r, B.rows);
  }
}

// The method for quantised weights and a few tokens.
template <class W>
struct MethodOfFewTokens {
  using type = ByVectors<Single<W>>;
};
#if defined(__SSE2__)
template <>
struct MethodOfFewTokens<Quantized<float, 4>> {
  using type = ByIntegers<Quantized<float, 4>>;
};
#endif
template <class W>
using MethodOfFew = typename MethodOfFewTokens<W>::type;

// h = x Bᵀ in float32, [tokens, B.rows].
template <class W>
void project(const typename W::Element* x, int64_t tokens, const W& B, float* h) {
  using T = typename W::Element;
  if constexpr (!W::kAddressable && std::is_same_v<T, float>)
    if (tokens <= kTileTokens) {
      const MethodOfFew<W> method;
      const auto arranged = arrange(method, x, tokens, B.columns);
      return parallel(B.rows, B.columns * tokens, [&](int64_t begin, int64_t end) {
        project_rows(method, B, arranged, tokens, begin, end, h, B.rows);
      });
    }
  for_method<Plain<T>>(tokens, [&](auto method) {
    const auto arranged = arrange(method, x, tokens, B.columns);
    parallel(B.rows, B.columns * tokens, [&](int64_t begin, int64_t end) {
      if constexpr (W::kAddressable) project_rows(method, B, arranged, tokens, begin, end, h, B.rows);
      else project_converted(method, B, arranged, tokens, begin, end, h);
    });
  });
}

}  // namespace
