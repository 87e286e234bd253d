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
