// What stands between the ops in a step that decodes one token of each text, for blocks like Llama's. Two calls take
// the place of forty of torch's, each of which takes longer to call than to compute.
//
// Values are rounded to the dtype where torch's ops round them; sums are float32.
#pragma once

#include "launch.h"

namespace {

// Rounds a chunk to T.
template <class T>
Chunk rounded(Chunk c) {
  T values[kChunk];
  store(values, c);
  return load(values);
}

// x += delta, unless delta is null. Then y = weight · x / sqrt(mean(x²) + eps). All have `width` elements.
template <class T>
void add_rms_norm_token(T* x, const T* delta, const T* weight, int64_t width, float eps, T* y) {
  Vec squares{};
  for (int64_t i = 0; i < width; i += kChunk) {
    Chunk c = load_first(x + i, width - i);
    if (delta) {
      const Chunk d = load_first(delta + i, width - i);
      c = rounded<T>({c.lo + d.lo, c.hi + d.hi});
      store_first(x + i, c, width - i);
    }
    squares += c.lo * c.lo + c.hi * c.hi;
  }
  const float factor = 1.0f / std::sqrt(sum(squares) / width + eps);
  for (int64_t i = 0; i < width; i += kChunk) {
    const Chunk c = load_first(x + i, width - i), w = load_first(weight + i, width - i);
    const Chunk normal = rounded<T>({c.lo * factor, c.hi * factor});
    store_first(y + i, {w.lo * normal.lo, w.hi * normal.hi}, width - i);
  }
}

// These functions have one caller, `rana_kernels/integrations/decoding`. Their checks say that memory is not overrun.
inline void require(bool right, const char* wanted) {
  if (!right) throw std::runtime_error(std::string("rana_decoding: wanted ") + wanted);
}

inline void require_like(const Tensor& t, const Tensor& x, int64_t count, const char* wanted) {
  require(t.scalar_type() == x.scalar_type() && t.numel() == count, wanted);
}

Tensor add_rms_norm(const Tensor& x, const OptionalTensor& delta, const Tensor& weight, double eps) {
  const int64_t width = last_size(x), tokens = tokens_of(x);
  require(x.is_contiguous(), "a contiguous x");
  require_like(weight, x, width, "a weight for each element of a token, in the dtype of x");
  if (delta) require_like(*delta, x, x.numel(), "a delta like x");
  Tensor y = empty_output(x, width);
  for_dtype(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const auto d = packed<T>(delta);
    const Packed<T> w(weight);
    T *in = static_cast<T*>(x.mutable_data_ptr()), *out = static_cast<T*>(y.mutable_data_ptr());
    for (int64_t m = 0; m < tokens * width; m += width)
      add_rms_norm_token<T>(in + m, d ? d->data + m : nullptr, w.data, width, float(eps), out + m);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY(rana_decoding, m) {
  m.def("add_rms_norm(Tensor(a!) x, Tensor? delta, Tensor weight, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rana_decoding, CPU, m) { m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm)); }
