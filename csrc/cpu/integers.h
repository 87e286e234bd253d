// Quantised weights times 15-bit fixed point numbers, in whole numbers: an instruction multiplies a vector of 16-bit
// words and adds the products of neighbours.
//
// A vector of bytes holds a span of columns. Its words, shifted by multiples of a weight's bits, give kShifts times a
// vector of words with one weight each. In 4 bits, 16 bytes hold a block of 32 columns (csrc/quantized.h).
#pragma once

#include <algorithm>

#include "quantized.h"

#if defined(__SSE2__)

namespace {
namespace integers {

constexpr int kLargest = 32767;

template <int kWidth>
constexpr int kSpan = 8 * kVectorBytes / kWidth;
// Blocks of kScaleColumns in a span. Where a span is shorter than a block, it has the block to itself.
template <int kWidth>
constexpr int kSpanBlocks = std::max<int>(1, kSpan<kWidth> / kScaleColumns);
template <int kWidth>
constexpr int kShifts = 16 / kWidth;

// The sums of products of neighbouring 16-bit words, plus `sums`.
inline Ints multiply_add(Ints sums, Bits a, Bits b) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif defined(__AVX512F__)
  return sums + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return sums + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  return sums + (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
}

// The words of two vectors in turns: those of the lower half of every 16 bytes, or of the upper half.
inline Bits low_words(Bits a, Bits b) {
#if defined(__AVX512F__)
  return (Bits)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Bits)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b);
#else
  return (Bits)_mm_unpacklo_epi16((__m128i)a, (__m128i)b);
#endif
}
inline Bits high_words(Bits a, Bits b) {
#if defined(__AVX512F__)
  return (Bits)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Bits)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b);
#else
  return (Bits)_mm_unpackhi_epi16((__m128i)a, (__m128i)b);
#endif
}

// kBlocks values of 4 bytes at p, each in the lanes of its block.
template <int kBlocks, class V>
inline V spread(const void* p) {
  if constexpr (kBlocks == 1) return (V)(load_bytes<int32_t>(p) - Ints{});
#if defined(__AVX512F__)
  else if constexpr (kBlocks == 2) {
    const __m512i places = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m128i two = _mm_loadl_epi64(static_cast<const __m128i*>(p));
    return (V)_mm512_permutexvar_epi32(places, _mm512_castsi128_si512(two));
  } else {
    const __m512i places = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return (V)_mm512_permutexvar_epi32(places, _mm512_castsi128_si512(load_bytes<__m128i>(p)));
  }
#elif defined(__AVX2__)
  else {
    const __m256i two = _mm256_castsi128_si256(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
    return (V)_mm256_permutevar8x32_epi32(two, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
  }
#endif
}

// A weight is stored as a signed number. These functions return it plus kOffset, which is not negative.
template <int kWidth>
constexpr int kOffset = 1 << (kWidth - 1);

// The weights of words for a shift, where they lie: times 2^(kWidth · kShift).
template <int kWidth, int kShift>
inline Bits in_place(Bits words) {
  constexpr uint32_t kBoth = 0x00010001u << kWidth * kShift;
  return (words & ((1u << kWidth) - 1) * kBoth) ^ kOffset<kWidth> * kBoth;
}
// The lowest weights of words.
template <int kWidth>
inline Bits lowest(Bits words) {
  return in_place<kWidth, 0>(words);
}

// The weights of words for a shift, times weight_of<kWidth, kShift>: only the last shift needs an instruction. Sums of
// ten of them, times 15 bits, fit 32 bits.
template <int kWidth, int kShift>
inline Bits weights(Bits words) {
  if constexpr (kShift == kShifts<kWidth> - 1) return lowest<kWidth>(words >> kWidth * kShift);
  else return in_place<kWidth, kShift>(words);
}
template <int kWidth, int kShift>
constexpr int weight_of = kShift == kShifts<kWidth> - 1 ? 1 : 1 << kWidth * kShift;

// The column of a span in word `word` of a vector, for a shift.
template <int kWidth>
constexpr int column_of(int word, int shift) {
  if constexpr (kWidth == 8) return 2 * word + shift;
  else return word / 8 * 32 + shift % 2 * 16 + word % 8 * 2 + shift / 2;
}

inline Ints round(Vec v) {
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  return (Ints)(v + kRounder) - 0x4b400000;
}

// A power of two for each lane: with it as their step, numbers up to `largest` become 16-bit whole numbers.
struct Step {
  Vec step, inverse;

  explicit Step(Ints largest) {
    constexpr uint32_t kExponent = 0x7f800000u, kLeast = (127 - 110) << 23;
    const Bits bits = (Bits)largest & kExponent, exponent = bits < kLeast ? kLeast - Bits{} : bits;
    step = (Vec)(exponent - (14u << 23));
    inverse = (Vec)(((127u * 2 + 14) << 23) - exponent);
  }
  Ints operator()(Vec v) const {
    const Ints rounded = round(v * inverse), most = kLargest - Ints{};
    return rounded < most ? rounded : most;
  }
};

// The bits of |v|. Their order is that of the numbers; Inf and NaN are above all numbers.
inline Ints magnitude(Vec v) { return (Ints)((Bits)v & 0x7fffffffu); }
inline Ints larger(Ints a, Ints b) { return a < b ? b : a; }
inline int32_t largest_lane(Ints magnitudes) {
  int32_t lanes[kLanes];
  std::memcpy(lanes, &magnitudes, sizeof lanes);
  return *std::max_element(lanes, lanes + kLanes);
}
inline bool finite(int32_t magnitude) { return magnitude < 0x7f800000; }

}  // namespace integers
}  // namespace

#endif
