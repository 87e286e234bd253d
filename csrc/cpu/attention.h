// The attention of one token of each text to all tokens before it, over a cache that grows in place.
#pragma once

#include "activation.h"
#include "between.h"

namespace {

// x · cos + turned · sin, for a chunk of each.
template <class T>
Chunk rotated(Chunk x, Chunk turned, Chunk cos, Chunk sin) {
  const Chunk a = rounded<T>({x.lo * cos.lo, x.hi * cos.hi});
  const Chunk b = rounded<T>({turned.lo * sin.lo, turned.hi * sin.hi});
  return {a.lo + b.lo, a.hi + b.hi};
}

// Rotates a vector of D elements by the angles of its position.
template <class T>
void rotate(const T* x, const T* cos, const T* sin, int64_t D, T* y) {
  const int64_t half = D / 2;
  for (int64_t i = 0; i < half; i += kChunk) {
    const int64_t left = half - i, j = half + i;
    const Chunk a = load_first(x + i, left), b = load_first(x + j, left);
    const auto turn = [&](int64_t at, Chunk own, Chunk turned) {
      const Chunk c = load_first(cos + at, left), s = load_first(sin + at, left);
      store_first(y + at, rotated<T>(own, turned, c, s), left);
    };
    turn(i, a, {-b.lo, -b.hi});
    turn(j, b, a);
  }
}

// So many queries read keys and values together, and so many keys are read side by side: one score a lane.
constexpr int64_t kQueries = 4;
constexpr int64_t kKeys = kLanes / kQueries;

// Calls f(load), where load(p, left) reads a chunk of a vector of D elements, of which `left` are left. Most vectors
// are whole chunks, and reading those needs no call, around which all sums would go to memory.
template <class T, class F>
void for_chunks_of(int64_t D, F f) {
  if (D % kChunk == 0) f([](const T* p, int64_t /*left*/) { return load(p); });
  else f([](const T* p, int64_t left) { return load_first(p, left); });
}

// scores[j][l] = scale · q[j]·keys[l] for `length` keys, which are D elements apart; queries are in whole chunks.
// Scores are `lds` apart, a multiple of kLanes.
template <class T, class Load>
void score(Load load, const Chunk* q, const T* keys, int64_t length, int64_t D, float scale, float* scores,
           int64_t lds) {
  const int64_t chunks = chunks_of(D);
  for (int64_t l = 0; l < length; l += kKeys) {
    Vec products[kQueries * kKeys] = {};
    for (int64_t c = 0; c < chunks; c++)
#pragma GCC unroll 4
      for (int64_t k = 0; k < kKeys; k++) {
        const T* const key = keys + std::min(l + k, length - 1) * D;
        const Chunk part = load(key + c * kChunk, D - c * kChunk);
#pragma GCC unroll 4
        for (int64_t j = 0; j < kQueries; j++)
          products[j * kKeys + k] = multiply_add(products[j * kKeys + k], q[j * chunks + c], part);
      }
    const Vec found = scale * sum_each(products);
    for (int64_t j = 0; j < kQueries; j++)
      std::memcpy(scores + j * lds + l, reinterpret_cast<const float*>(&found) + j * kKeys, kKeys * sizeof(float));
  }
}

// Replaces the scores by their softmax. Those that are not `seen` get none of it; a null `seen` is all. There is room
// for `whole` scores, a multiple of kLanes.
inline void softmax(float* scores, int64_t length, int64_t whole, const bool* seen) {
  for (int64_t l = 0; seen && l < length; l++)
    if (!seen[l]) scores[l] = -INFINITY;
  std::fill(scores + length, scores + whole, -INFINITY);
  Vec largest = splat(-INFINITY), total = {};
  for (int64_t l = 0; l < whole; l += kLanes) {
    const Vec v = load_bytes<Vec>(scores + l);
    largest = v > largest ? v : largest;
  }
  const float* const lanes = reinterpret_cast<const float*>(&largest);
  const float most = *std::max_element(lanes, lanes + kLanes);
  for (int64_t l = 0; l < whole; l += kLanes) {
    const Vec v = exp(load_bytes<Vec>(scores + l) - most);
    std::memcpy(scores + l, &v, sizeof v);
    total += v;
  }
  const float all = sum(total);
  for (int64_t l = 0; l < length; l++) scores[l] /= all;
}

// y[j] = the sum of `length` values, D elements apart, each by its share[j], for the first `count` of kQueries queries,
// whose shares are `lds` apart.
template <class T, class Load>
void mix(Load load, const float* shares, int64_t lds, const T* values, int64_t length, int64_t D, int64_t count, T* y) {
  for (int64_t i = 0; i < D; i += kChunk) {
    Chunk totals[kQueries] = {};
    for (int64_t l = 0; l < length; l++) {
      const Chunk v = load(values + l * D + i, D - i);
      // Unrolled, like the loop after it: an index that is no constant puts the totals into memory.
#pragma GCC unroll 4
      for (int64_t j = 0; j < kQueries; j++) {
        totals[j].lo += shares[j * lds + l] * v.lo;
        totals[j].hi += shares[j * lds + l] * v.hi;
      }
    }
#pragma GCC unroll 4
    for (int64_t j = 0; j < kQueries; j++)
      if (j < count) store_first(y + j * D + i, totals[j], D - i);
  }
}

// One token of each text, and the cache that it attends to.
struct Attention {
  const Tensor &cos, &sin;
  const OptionalTensor& seen;
  const Tensor &keys, &values;  // [batch, heads, room, D], of which `length` are filled
  int64_t length;
  double scale;

  int64_t batch() const { return keys.size(0); }
  int64_t heads() const { return keys.size(1); }
  int64_t room() const { return keys.size(2); }
  int64_t head_size() const { return keys.size(3); }
  int64_t width() const { return heads() * head_size(); }  // of the new keys of a text

  // Checks all for queries of a dtype.
  void check(const Tensor& q) const {
    const int64_t angles = batch() * head_size();
    require(keys.dim() == 4 && keys.is_contiguous() && values.is_contiguous() && 0 <= length && length < room(),
            "contiguous keys and values with room");
    require(width() > 0 && head_size() % 2 == 0, "heads of an even size");
    require_like(keys, q, keys.numel(), "keys in the dtype of q");
    require_like(values, q, keys.numel(), "values like keys");
    require_like(cos, q, angles, "cosines for each text");
    require_like(sin, q, angles, "sines for each text");
    require(!seen || (seen->scalar_type() == ScalarType::Bool && seen->numel() == batch() * (length + 1)),
            "`seen` to be bool, for each text and token");
  }
};

// A vector for each text, `stride` elements apart.
template <class T>
struct Vectors {
  const T* data;
  int64_t stride;
};

// Adds k and v [heads · D] to the cache of each text, and attends with q, `queries` · D elements for each head.
template <class T>
void attend_heads(const Attention& a, Vectors<T> q, Vectors<T> k, Vectors<T> v, int64_t queries, T* y) {
  const int64_t heads = a.heads(), room = a.room(), D = a.head_size(), length = a.length, chunks = chunks_of(D);
  const Packed<T> cosines(a.cos), sines(a.sin);
  const auto mask = packed<bool>(a.seen);
  T* const all_keys = static_cast<T*>(a.keys.mutable_data_ptr());
  T* const all_values = static_cast<T*>(a.values.mutable_data_ptr());
  parallel(a.batch() * heads, 2 * queries * (length + 1) * D, [&](int64_t begin, int64_t end) {
    const int64_t seen_length = length + 1, lds = (seen_length + kLanes - 1) / kLanes * kLanes;
    std::vector<float> shares(kQueries * lds);
    std::vector<Chunk> turned(kQueries * chunks);
    std::vector<T> one(D);
    for (int64_t i = begin; i < end; i++) {  // a head of a text
      T *own_keys = all_keys + i * room * D, *own_values = all_values + i * room * D;
      const int64_t text = i / heads, head = i % heads;
      const T *c = cosines.data + text * D, *s = sines.data + text * D;
      rotate(k.data + text * k.stride + head * D, c, s, D, own_keys + length * D);
      std::copy_n(v.data + text * v.stride + head * D, D, own_values + length * D);
      for (int64_t first = 0; first < queries; first += kQueries) {
        const int64_t count = std::min(kQueries, queries - first);
        const T* const own_queries = q.data + text * q.stride + (head * queries + first) * D;
        for (int64_t j = 0; j < count; j++) {
          rotate(own_queries + j * D, c, s, D, one.data());
          for (int64_t n = 0; n < chunks; n++)
            turned[j * chunks + n] = load_first(one.data() + n * kChunk, D - n * kChunk);
        }
        const bool* const seen = mask ? mask->data + text * seen_length : nullptr;
        for_chunks_of<T>(D, [&](auto load) {
          score(load, turned.data(), own_keys, seen_length, D, float(a.scale), shares.data(), lds);
          for (int64_t j = 0; j < count; j++) softmax(shares.data() + j * lds, seen_length, lds, seen);
          mix(load, shares.data(), lds, own_values, seen_length, D, count, y + (i * queries + first) * D);
        });
      }
    }
  });
}

Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
              const OptionalTensor& seen, const Tensor& keys, const Tensor& values, int64_t length, double scale) {
  const Attention attention{cos, sin, seen, keys, values, length, scale};
  attention.check(q);
  const int64_t width = attention.width(), queries = last_size(q) / width;
  require_like(q, keys, attention.batch() * width * queries, "heads of q that share keys evenly");
  require_like(k, q, attention.batch() * width, "one new key a head");
  require_like(v, q, attention.batch() * width, "one new value a head");
  Tensor y = empty_output(q, last_size(q));
  for_dtype(q.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Packed<T> query(q), key(k), value(v);
    attend_heads<T>(attention, {query.data, width * queries}, {key.data, width}, {value.data, width}, queries,
                    static_cast<T*>(y.mutable_data_ptr()));
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rana_decoding, m) {
  m.def(
      "attend(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor? seen, Tensor(a!) keys, Tensor(b!) values, "
      "int length, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rana_decoding, CPU, m) { m.impl("attend", TORCH_BOX(&attend)); }
