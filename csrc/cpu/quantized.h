// Quantised weights: int8, or two 4-bit values a byte, with a float16 scale a group (csrc/quantized.h).
//
// A loop reads the whole numbers of a row and multiplies by scales as seldom as it can. All sizes of groups are
// multiples of 32 columns or whole rows, so loops see one scale for every 32 columns.
#pragma once

#include "../quantized.h"
#include "storage.h"

namespace {

constexpr int64_t kScaleColumns = 32;

// The whole numbers of a chunk in natural order, and the scale of its columns.
struct Scaled {
  Chunk steps;
  Vec scale;
};

inline Vec multiply_add(Vec sum, Chunk x, Scaled w) {
  Vec product = x.lo * w.steps.lo;
  product += x.hi * w.steps.hi;
  sum += w.scale * product;
  return sum;
}

using Ints = int32_t __attribute__((vector_size(kVectorBytes)));

// kLanes signed bytes, each in the high byte of a lane; the rest of the lane is not defined.
inline Ints high_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return (Ints)_mm512_slli_epi32(_mm512_cvtepu8_epi32(load_bytes<__m128i>(p)), 24);
#elif defined(__AVX2__)
  return (Ints)_mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 24);
#elif defined(__SSE2__)
  const __m128i bytes = _mm_cvtsi32_si128(load_bytes<int32_t>(p)), pairs = _mm_unpacklo_epi8(bytes, bytes);
  return (Ints)_mm_unpacklo_epi16(pairs, pairs);
#else
  Ints lanes;
  for (int i = 0; i < kLanes; i++) lanes[i] = int32_t(uint32_t(p[i]) << 24);
  return lanes;
#endif
}

inline Vec to_floats(Ints v) { return __builtin_convertvector(v, Vec); }

inline Vec signed_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return to_floats((Ints)_mm512_cvtepi8_epi32(load_bytes<__m128i>(p)));
#elif defined(__AVX2__)
  return to_floats((Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return to_floats(high_bytes(p) >> 24);
#endif
}

// ---- whole numbers as floats: kChunk columns, from a multiple of kChunk on ----

template <int kWidth>
struct Steps;

template <>
struct Steps<8> {
  static Chunk load(const uint8_t* row, int64_t n, int64_t /*columns*/) {
    return {signed_bytes(row + n), signed_bytes(row + n + kLanes)};
  }
  static float one(const uint8_t* row, int64_t n, int64_t /*columns*/) { return int8_t(row[n]); }
};

template <>
struct Steps<4> {
  static Chunk load(const uint8_t* row, int64_t n, int64_t columns) {
    const int64_t start = n / kBlock * kBlock;
    const uint8_t* const block = row + start / 2;
#if defined(__AVX512F__)
    static_assert(kChunk == kBlock);
    const __m512i bytes = _mm512_cvtepu8_epi32(load_bytes<__m128i>(block));
    // The look-up takes the low four bits of each index.
    const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return {(Vec)_mm512_permutexvar_ps(bytes, values), (Vec)_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), values)};
#else
    if (start + kBlock > columns) return load_one_by_one(row, n, columns);
    return {nibbles(block, n - start), nibbles(block, n - start + kLanes)};
#endif
  }
  // In a shorter last block the columns lie in plain order.
  static float one(const uint8_t* row, int64_t n, int64_t columns) {
    const int64_t start = n / kBlock * kBlock, i = n - start;
    const bool whole = start + kBlock <= columns;
    const int byte = row[start / 2 + (whole ? i % (kBlock / 2) : i / 2)];
    const bool high = whole ? i >= kBlock / 2 : i % 2;
    return int8_t((high ? byte : byte << 4) & 0xf0) / 16;
  }

 private:
  static constexpr int64_t kBlock = rana::kNibbleBlock;

  static Vec nibbles(const uint8_t* block, int64_t column) {
    const Ints bytes = high_bytes(block + column % (kBlock / 2));
    return to_floats((column < kBlock / 2 ? bytes << 4 : bytes) >> 28);
  }
  static Chunk load_one_by_one(const uint8_t* row, int64_t n, int64_t columns) {
    float values[kChunk];
    for (int i = 0; i < kChunk; i++) values[i] = one(row, n + i, columns);
    return ::load(values);
  }
};

// float16 to float32, one value.
inline float to_float(half scale) {
#if defined(__F16C__)
  uint16_t bits;
  std::memcpy(&bits, &scale, sizeof bits);
  return _cvtsh_ss(bits);
#else
  return scale;
#endif
}

constexpr int64_t kMostShared = 4;  // blocks of kScaleColumns that share a scale, unless a whole row does
constexpr int64_t kSharedColumns = kMostShared * kScaleColumns;

// The lanes from `first` on of a vector in which each lane of v is repeated 2^kShift times.
template <int kShift>
inline Vec repeat_lanes(Vec v, int first) {
  if constexpr (kShift == 0) return v;
  int32_t from[kLanes];
  for (int i = 0; i < kLanes; i++) from[i] = (first + i) >> kShift;
#if defined(__AVX512F__)
  return (Vec)_mm512_permutexvar_ps(load_bytes<__m512i>(from), (__m512)v);
#elif defined(__AVX2__)
  return (Vec)_mm256_permutevar8x32_ps((__m256)v, load_bytes<__m256i>(from));
#else
  Vec repeated;
  for (int i = 0; i < kLanes; i++) repeated[i] = v[from[i]];
  return repeated;
#endif
}

// Up to kLanes numbers, followed by zeros.
inline Vec load_first_lanes(const half* p, int64_t count) {
  if (count >= kLanes) return load_lanes(p);
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16((1u << count) - 1, p));
#else
  half padded[kLanes] = {};
  std::memcpy(padded, p, count * sizeof(half));
  return load_lanes(padded);
#endif
}

// A vector of values, one for each factor: the same for all, or those at a pointer.
inline Vec values_from(float value, int64_t /*first*/) { return splat(value); }
inline Vec values_from(const float* values, int64_t first) { return load_bytes<Vec>(values + first); }

// Writes value · scale, each scale 2^kShift times, until there are `count`, and zeros up to a multiple of kLanes.
template <int kShift, class Value>
inline void write_factors(const half* scale, Value value, int64_t count, float* into) {
  constexpr int kShared = 1 << kShift;
  for (int64_t i = 0; i < count; i += kLanes * kShared) {
    const Vec scales = load_first_lanes(scale + (i >> kShift), (count - i + kShared - 1) >> kShift);
#pragma GCC unroll 4
    for (int part = 0; part < kShared; part++) {
      const int64_t start = i + part * kLanes;
      if (start >= count) break;
      const Vec factors = values_from(value, start) * repeat_lanes<kShift>(scales, part * kLanes);
      std::memcpy(into + start, &factors, sizeof factors);
    }
  }
}

// Weights of kWidth bits beside inputs of type T.
template <class T, int kWidth>
struct Quantized {
  using Element = T;
  struct Row {
    const uint8_t* steps;
    const half* scale;
    int64_t first;  // the column where it starts, a multiple of kScaleColumns
    const Quantized* all;

    int64_t left() const { return all->columns - first; }
    const half* first_scale() const { return scale + (first >> all->group_bits); }
  };
  static constexpr int64_t kBits = kWidth;
  static constexpr bool kAddressable = false;
  static constexpr int64_t kUnit = std::max<int64_t>(8 * kVectorBytes / kWidth, kSharedColumns);

  const uint8_t* data;
  int64_t rows, columns, ld;  // ld in bytes
  const half* scale;
  int64_t scale_ld;
  int group_bits;    // a group has 2^group_bits columns, or all
  bool fixed_point;  // for a few tokens, what meets the weights may become 15 bits and a sign: x has 16

  Row at(int64_t row, int64_t column) const {
    return {data + row * ld + column * kWidth / 8, scale + row * scale_ld, column, this};
  }

  static Row skip(const Row& row, int64_t count) {
    return {row.steps + count * kWidth / 8, row.scale, row.first + count, row.all};
  }
  static const void* address(const Row& row, int64_t n) { return row.steps + n * kWidth / 8; }
  // Prefetches the scales of `size` columns.
  static void ask_for_scales(const Row& row, int64_t size) {
    const half* const first = row.first_scale();
    const half* const last = row.scale + ((row.first + size - 1) >> row.all->group_bits);
    for (const half* p = first; p <= last; p += kLineBytes / sizeof(half)) __builtin_prefetch(p);
  }

  // The factors of a Term are its scales, times its value, in float32: one for every kScaleColumns columns. Finite
  // ones follow, up to a multiple of kMostShared, if the row begins at its first column.
  struct Term {
    const uint8_t* steps;
    const float* factor;
    int64_t columns;

    template <class... Count>
    Scaled operand(int64_t n, Count... count) const {
      return {whole_numbers(n, count...), splat(factor[n / kScaleColumns])};
    }
    template <class... Count>
    Chunk chunk(int64_t n, Count... count) const {
      const Scaled w = operand(n, count...);
      return to_lane_order<T>({w.scale * w.steps.lo, w.scale * w.steps.hi});
    }
    template <class... Count>
    Bits pairs(int64_t n, Count... count) const {
      T natural[kChunk];
      store(natural, chunk(n, count...));
      return load_bytes<Bits>(natural);
    }
    template <class... Count>
    void add_to(Chunk& sums, int64_t n, Count... count) const {
      const Scaled w = operand(n, count...);
      sums.lo += w.scale * w.steps.lo;
      sums.hi += w.scale * w.steps.hi;
    }

   private:
    Chunk whole_numbers(int64_t n) const { return Steps<kWidth>::load(steps, n, columns); }
    Chunk whole_numbers(int64_t n, int64_t count) const {
      if (count >= kChunk) return whole_numbers(n);
      float padded[kChunk] = {};
      for (int64_t i = 0; i < count; i++) padded[i] = Steps<kWidth>::one(steps, n + i, columns);
      return load(padded);
    }
  };
  static constexpr int64_t scale_blocks(int64_t size) { return (size + kScaleColumns - 1) / kScaleColumns; }
  // Of a multiple of kLanes floats.
  static constexpr int64_t room(int64_t size) {
    return (scale_blocks(size) + kMostShared + kLanes - 2) / kLanes * kLanes;
  }
  // `value` is a float, or, for a row from its first column on, a pointer to one for each block, up to a multiple of
  // kLanes.
  template <class Value>
  static Term term(const Row& row, Value value, int64_t size, float* into) {
    const int64_t blocks = row.first / kScaleColumns, count = scale_blocks(size);
    const auto write = [&](auto shift) {
      const int64_t before = blocks % (1 << shift());  // blocks of the first group that lie before this row
      write_factors<shift()>(row.scale + (blocks >> shift()), value, before + count, into);
      return Term{row.steps, into + before, row.left()};
    };
    static_assert(kScaleColumns == 32 && kMostShared == 4);
    switch (row.all->group_bits) {
      case 5: return write(std::integral_constant<int, 0>{});
      case 6: return write(std::integral_constant<int, 1>{});
      case 7: return write(std::integral_constant<int, 2>{});
    }
    const float scale = to_float(*row.scale);
    for (int64_t i = 0; i < count + kMostShared - 1; i += kLanes) {
      const Vec factors = values_from(value, i) * scale;
      std::memcpy(into + i, &factors, sizeof factors);
    }
    return {row.steps, into, row.left()};
  }
};

}  // namespace
