// What every op starts from: torch's tensors as pointers and sizes.
#pragma once

#include <torch/csrc/stable/library.h>

#include "../check.h"
#include "../tensors.h"
#include "expand.h"
#include "project.h"
#include "quantized.h"

namespace {

template <class T>
Plain<T> plain(const Tensor& t) {
  return {static_cast<const T*>(t.const_data_ptr()), t.size(0), t.size(1), t.stride(0)};
}

template <class T, int kWidth>
Quantized<T, kWidth> quantized(const Tensor& t, const Tensor& scale, int64_t columns, bool fixed_point) {
  return {static_cast<const uint8_t*>(t.const_data_ptr()),
          t.size(0),
          columns,
          t.stride(0),
          static_cast<const half*>(scale.const_data_ptr()),
          scale.stride(0),
          rana::group_bits<int64_t>(columns, scale.size(1)),
          fixed_point};
}

// A weight [rows, columns] as an op gets it: float, or quantised with its scale.
struct Weight {
  const Tensor& tensor;
  const OptionalTensor& scale;
  int64_t columns;

  Weight(const Tensor& tensor, const OptionalTensor& scale, int64_t columns)
      : tensor(tensor), scale(scale), columns(columns) {}
  Weight(const Tensor& tensor, const OptionalTensor& scale) : Weight(tensor, scale, rana::columns_of(tensor)) {}

  int64_t rows() const { return tensor.size(0); }
  bool stored_as(const Weight& other) const { return tensor.scalar_type() == other.tensor.scalar_type(); }
};

// Calls f with the storage of a weight. Quantised weights are multiplied as values of type E, or in fixed point: 15
// bits hold what 16-bit numbers of like size say, but not what float32 says.
template <class T, class E, class F>
void for_storage(const Weight& weight, F f) {
  constexpr bool kFixedPoint = !std::is_same_v<T, float>;
  if (!weight.scale) f(plain<T>(weight.tensor));
  else if (rana::is_packed(weight.tensor))
    f(quantized<E, 4>(weight.tensor, *weight.scale, weight.columns, kFixedPoint));
  else f(quantized<E, 8>(weight.tensor, *weight.scale, weight.columns, kFixedPoint));
}

// The same for several weights that are stored alike: f takes a vector.
template <class T, class E, class F>
void for_storages(const std::vector<Weight>& all, F f) {
  for_storage<T, E>(all[0], [&](const auto& first) {
    using W = std::decay_t<decltype(first)>;
    std::vector<W> found;
    for (const Weight& each : all)
      for_storage<T, E>(each, [&](const auto& one) {
        if constexpr (std::is_same_v<decltype(one), const W&>) found.push_back(one);
      });
    f(found);
  });
}

// Returns x in float32.
template <class T>
std::vector<float> widened(const T* x, int64_t count) {
  std::vector<float> wide(count);
  widen(x, count, wide.data());
  return wide;
}

// Returns h = x Bᵀ in float32 for several B that are stored alike, side by side: [tokens, all rows].
template <class T>
std::vector<float> project(const T* x, int64_t tokens, const std::vector<Weight>& all) {
  const Weight& B = all[0];
  int64_t ldh = 0;
  for (const Weight& each : all) ldh += each.rows();
  std::vector<float> h(tokens * ldh);
  const auto with = [&](const auto& rows) {
    using E = typename std::decay_t<decltype(rows[0])>::Element;
    if constexpr (std::is_same_v<E, T>) project(x, tokens, rows, h.data(), ldh);
    else project(widened(x, tokens * B.columns).data(), tokens, rows, h.data(), ldh);
  };
  if (kMultipliesPairs<T> && tokens > (B.scale ? kFixedPointTokens : kVectorTokens)) for_storages<T, T>(all, with);
  else for_storages<T, float>(all, with);
  return h;
}

// Calls f with the storage of rows that `tokens` tokens expand. Where the processor multiplies pairs of bfloat16,
// quantised rows become bfloat16.
template <class T, class F>
void for_rows(const Weight& rows, int64_t tokens, F f) {
  if (kMultipliesPairs<T> && expands_pairs(tokens)) for_storage<T, T>(rows, f);
  else for_storage<T, float>(rows, f);
}

// Computes (m ⊙ h) rows. Calls done(token, column, sums in the lane order of T), in several threads.
template <class T, class Done>
void expand(const float* h, int64_t ldh, int64_t tokens, const Weight& rows, Mask mask, Done done) {
  for_rows<T>(rows, tokens, [&](const auto& weights) { expand<T>(h, ldh, tokens, weights, mask, done); });
}

}  // namespace
