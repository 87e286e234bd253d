// Portable vectors: one source, compiled once for every instruction set.
//
// A Chunk is 2 * kLanes consecutive elements of a row, widened to float32 in two vectors. Their
// order inside a chunk is the cheapest one for the element type ("lane order"): natural for float
// and half, even elements before odd ones for bfloat16, where widening is then a shift and a mask.
// Sums stay in lane order until they are stored, so nothing is ever shuffled in an inner loop.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "../dtypes.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;
constexpr int kChunk = 2 * kLanes;
constexpr int64_t kLineBytes = 64;  // a line of the caches

using Vec = float __attribute__((vector_size(kVectorBytes)));
using Bits = uint32_t __attribute__((vector_size(kVectorBytes)));

struct Chunk {
  Vec lo, hi;
};

inline Vec splat(float value) { return value - Vec{}; }

template <class V>
inline V load_bytes(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <int kCount>
using Floats __attribute__((vector_size(4 * kCount))) = float;

// Returns the sum of the lanes: the two halves are added first, then their halves.
template <int kCount>
inline float sum_lanes(Floats<kCount> v) {
  Floats<kCount / 2> halves[2];
  std::memcpy(halves, &v, sizeof v);
  if constexpr (kCount == 2) return halves[0][0] + halves[1][0];
  else return sum_lanes<kCount / 2>(halves[0] + halves[1]);
}

inline float sum(Vec v) { return sum_lanes<kLanes>(v); }

// sum_each returns the sum of the lanes of each vector in its lane, with the bits of `sum`. With shuffles of two
// vectors, which GCC has since version 12, that takes a third of the instructions.
#if defined(__clang__) || __GNUC__ >= 12
// Of every kWidth lanes of a and then b, the first half (kHalf = 0) or the second (1).
template <int kWidth, int kHalf, int... kLane>
inline Vec halves(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  constexpr int kSize = kWidth / 2;
  return __builtin_shufflevector(a, b, (kLane / kSize * kWidth + kHalf * kSize + kLane % kSize)...);
}

template <int kWidth = kLanes>
inline Vec sum_each(const Vec (&v)[kWidth]) {
  constexpr std::make_integer_sequence<int, kLanes> kAll;
  Vec pairs[kWidth / 2];
#pragma GCC unroll 8
  for (int i = 0; i < kWidth / 2; i++)
    pairs[i] = halves<kWidth, 0>(v[2 * i], v[2 * i + 1], kAll) + halves<kWidth, 1>(v[2 * i], v[2 * i + 1], kAll);
  if constexpr (kWidth == 2) return pairs[0];
  else return sum_each<kWidth / 2>(pairs);
}
#else
inline Vec sum_each(const Vec (&v)[kLanes]) {
  Vec sums;
  for (int i = 0; i < kLanes; i++) sums[i] = sum(v[i]);
  return sums;
}
#endif

// ---- widening: kChunk elements at p, in lane order ----

inline Chunk load(const float* p) { return {load_bytes<Vec>(p), load_bytes<Vec>(p + kLanes)}; }

inline Chunk load(const bfloat16* p) {
  const Bits pairs = load_bytes<Bits>(p);
  return {(Vec)(pairs << 16), (Vec)(pairs & 0xffff0000u)};
}

inline Vec load_lanes(const half* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(load_bytes<__m256i>(p));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(load_bytes<__m128i>(p));
#else
  Vec v;
  for (int i = 0; i < kLanes; i++) v[i] = p[i];
  return v;
#endif
}
inline Chunk load(const half* p) { return {load_lanes(p), load_lanes(p + kLanes)}; }

// ---- rounding to nearest even: the inverse of load ----

inline void store(float* p, Chunk c) {
  // One copy of both halves would go through the stack.
  std::memcpy(p, &c.lo, sizeof c.lo);
  std::memcpy(p + kLanes, &c.hi, sizeof c.hi);
}

inline Bits round_to_bfloat16(Vec v) {
  const Bits bits = (Bits)v;
  const Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Bits quiet_nan = bits | 0x00400000u;
  return (v == v) ? rounded : quiet_nan;
}

inline void store(bfloat16* p, Chunk c) {
  const Bits pairs = (round_to_bfloat16(c.lo) >> 16) | (round_to_bfloat16(c.hi) & 0xffff0000u);
  std::memcpy(p, &pairs, sizeof pairs);
}

inline void store(half* p, Chunk c) {
#if defined(__AVX512F__)
  const __m256i lo = _mm512_cvtps_ph((__m512)c.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i hi = _mm512_cvtps_ph((__m512)c.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &lo, sizeof lo);
  std::memcpy(p + kLanes, &hi, sizeof hi);
#elif defined(__F16C__)
  const __m128i lo = _mm256_cvtps_ph((__m256)c.lo, _MM_FROUND_TO_NEAREST_INT);
  const __m128i hi = _mm256_cvtps_ph((__m256)c.hi, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &lo, sizeof lo);
  std::memcpy(p + kLanes, &hi, sizeof hi);
#else
  for (int i = 0; i < kLanes; i++) p[i] = half(c.lo[i]), p[kLanes + i] = half(c.hi[i]);
#endif
}

// ---- the incomplete chunk at the end of a row: `count` elements; the rest is read as zeros and not written ----

template <class T>
inline Chunk load_first(const T* p, int64_t count) {
  if (count >= kChunk) return load(p);
  T padded[kChunk] = {};
  std::memcpy(padded, p, count * sizeof(T));
  return load(padded);
}

template <class T>
inline void store_first(T* p, Chunk c, int64_t count) {
  if (count >= kChunk) return store(p, c);
  T padded[kChunk];
  store(padded, c);
  std::memcpy(p, padded, count * sizeof(T));
}

// ---- products of whole chunks, summed over the chunk ----
// An Operand is a chunk in the form that multiply_add takes: widened, or raw where the processor multiplies
// pairs of bfloat16 into float32 sums.

template <class T>
struct Operand {
  using type = Chunk;
};
template <class T>
inline typename Operand<T>::type load_operand(const T* p) {
  return load(p);
}
inline Vec multiply_add(Vec sum, Chunk a, Chunk b) {
  sum += a.lo * b.lo;
  sum += a.hi * b.hi;
  return sum;
}

#if defined(__AVX512BF16__)
template <>
struct Operand<bfloat16> {
  using type = __m512bh;
};
template <>
inline __m512bh load_operand(const bfloat16* p) {
  return (__m512bh)load_bytes<__m512i>(p);
}
inline Vec multiply_add(Vec sum, __m512bh a, __m512bh b) { return (Vec)_mm512_dpbf16_ps((__m512)sum, a, b); }
#endif

template <class T>
inline typename Operand<T>::type load_operand_first(const T* p, int64_t count) {
  if (count >= kChunk) return load_operand(p);
  T padded[kChunk] = {};
  std::memcpy(padded, p, count * sizeof(T));
  return load_operand(padded);
}

// ---- lane order and natural order ----

// Returns where element i of a chunk of T in lane order is in natural order.
template <class T>
constexpr int natural_position(int i) {
  return i;
}
template <>
constexpr int natural_position<bfloat16>(int i) {
  return i < kLanes ? 2 * i : 2 * (i - kLanes) + 1;
}

// Stores a chunk in the lane order of T as floats in natural order.
template <class T>
inline void store_natural(float* p, Chunk c, int64_t count) {
  float lanes[kChunk], natural[kChunk];
  store(lanes, c);
  for (int i = 0; i < kChunk; i++) natural[natural_position<T>(i)] = lanes[i];
  std::memcpy(p, natural, (count < kChunk ? count : kChunk) * sizeof(float));
}

// Brings a chunk from natural order into the lane order of T.
template <class T>
inline Chunk to_lane_order(Chunk natural) {
  if constexpr (natural_position<T>(1) == 1) return natural;
#if defined(__AVX512F__)
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512 lo = (__m512)natural.lo, hi = (__m512)natural.hi;
  return {(Vec)_mm512_permutex2var_ps(lo, even, hi), (Vec)_mm512_permutex2var_ps(lo, odd, hi)};
#else
  float from[kChunk], lanes[kChunk];
  store(from, natural);
  for (int i = 0; i < kChunk; i++) lanes[i] = from[natural_position<T>(i)];
  return load(lanes);
#endif
}

// Converts `count` elements to float32. Where lane order is natural order, whole chunks are faster than what the
// compiler makes of the loop for half.
template <class T>
inline void widen(const T* p, int64_t count, float* wide) {
  int64_t i = 0;
  if constexpr (natural_position<T>(1) == 1)
    for (; i + kChunk <= count; i += kChunk) store(wide + i, load(p + i));
  for (; i < count; i++) wide[i] = p[i];
}

inline int64_t chunks_of(int64_t elements) { return (elements + kChunk - 1) / kChunk; }

}  // namespace
