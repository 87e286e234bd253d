// Quantised weights times 15-bit fixed point numbers, in whole numbers: an instruction multiplies a vector of 16-bit
// words and adds the products of neighbours.
//
// A vector of bytes holds a span of columns. Its words, shifted by multiples of a weight's bits, give kShifts times a
// vector of words with one weight each. In 4 bits, 16 bytes hold a block of 32 columns (csrc/quantized.h).
#pragma once

#include <algorithm>
#include <utility>

#include "quantized.h"

#if defined(__SSE2__)

namespace {
namespace integers {

template <int kWidth>
constexpr int kSpan = 8 * kVectorBytes / kWidth;
// Blocks of kScaleColumns in a span. Where a span is shorter than a block, it has the block to itself.
template <int kWidth>
constexpr int kSpanBlocks = std::max<int>(1, kSpan<kWidth> / kScaleColumns);
template <int kWidth>
constexpr int kShifts = 16 / kWidth;

// The columns of a row that are multiplied in whole numbers: whole blocks. The last span may be incomplete.
template <int kWidth>
struct Spans {
  int64_t columns, whole, rest;  // columns in whole numbers, those of them in whole spans, those after these

  explicit Spans(int64_t size)
      : columns(size / kScaleColumns * kScaleColumns),
        whole(columns / kSpan<kWidth> * kSpan<kWidth>),
        rest(columns - whole) {}
  int64_t count() const { return (columns + kSpan<kWidth> - 1) / kSpan<kWidth>; }
};

// The first `bytes` bytes at p, a multiple of 4, followed by zeros.
inline Bits load_first_bytes(const void* p, int64_t bytes) {
#if defined(__AVX512F__)
  return (Bits)_mm512_maskz_loadu_epi32((1u << bytes / 4) - 1, p);
#elif defined(__AVX2__)
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i wanted = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(bytes / 4)), lane);
  return (Bits)_mm256_maskload_epi32(static_cast<const int*>(p), wanted);
#else
  Bits padded = {};
  std::memcpy(&padded, p, bytes);
  return padded;
#endif
}

// Calls f(n, load) for the first column n of each span. load(p) reads the weights of a span at p.
template <int kWidth, class F>
inline void for_spans(const Spans<kWidth>& spans, F f) {
  for (int64_t n = 0; n < spans.whole; n += kSpan<kWidth>) f(n, [](const void* p) { return load_bytes<Bits>(p); });
  if constexpr (kSpanBlocks<kWidth> > 1)
    if (const int64_t bytes = spans.rest * kWidth / 8; bytes > 0)
      f(spans.whole, [=](const void* p) { return load_first_bytes(p, bytes); });
}

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

// The floats of two vectors in turns: those of the lower half of every 16 bytes, or of the upper half.
inline Vec low_floats(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_unpacklo_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_unpacklo_ps((__m256)a, (__m256)b);
#else
  return (Vec)_mm_unpacklo_ps((__m128)a, (__m128)b);
#endif
}
inline Vec high_floats(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_unpackhi_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_unpackhi_ps((__m256)a, (__m256)b);
#else
  return (Vec)_mm_unpackhi_ps((__m128)a, (__m128)b);
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

// A weight is stored as a signed number. An offset of kOffset, which flips one bit, makes it positive.
template <int kWidth>
constexpr int kOffset = 1 << (kWidth - 1);

// A bit pattern in both words of a lane.
constexpr uint32_t both(uint32_t word) { return word << 16 | word; }

// Flips the offset's bit of the weights of all shifts but the last one. The last one's are signed.
template <int kWidth>
inline Bits without_signs(Bits words) {
  uint32_t flipped = 0;
  for (int shift = 0; shift < kShifts<kWidth> - 1; shift++) flipped |= kOffset<kWidth> << kWidth * shift;
  return words ^ both(flipped);
}
template <int kWidth, int kShift>
constexpr int offset_of = kShift < kShifts<kWidth> - 1 ? kOffset<kWidth> : 0;

// The weights of the last shift, which are signed.
template <int kWidth>
inline Bits signed_weights(Bits words) {
  using Words = int16_t __attribute__((vector_size(kVectorBytes)));
  return (Bits)((Words)words >> kWidth * (kShifts<kWidth> - 1));
}
// The words that `weights` takes. With AVX-512 it flips the bits itself.
template <int kWidth>
inline Bits words_of_weights(Bits words) {
#if defined(__AVX512F__)
  asm("" : "+v"(words));  // keeps them in a register: GCC 12 reads them again for each shift
  return words;
#else
  return without_signs<kWidth>(words);
#endif
}
// The weights of these words for a shift, plus offset_of<kWidth, kShift>.
template <int kWidth, int kShift>
inline Bits weights(Bits words) {
  if constexpr (kShift == kShifts<kWidth> - 1) return signed_weights<kWidth>(words);
  constexpr uint32_t kMask = both((1u << kWidth) - 1);
  const Bits shifted = words >> kWidth * kShift;
#if defined(__AVX512F__)
  constexpr int kMaskThenFlip = 0x6a;
  return (Bits)_mm512_ternarylogic_epi32((__m512i)shifted, _mm512_set1_epi32(kMask),
                                         _mm512_set1_epi32(both(kOffset<kWidth>)), kMaskThenFlip);
#else
  return shifted & kMask;
#endif
}
// The weights of words without signs for a shift, times weight_of<kWidth, kShift>: one instruction. Sums of ten of
// them, times 15 bits, fit 32 bits.
template <int kWidth, int kShift>
inline Bits weights_in_place(Bits words) {
  if constexpr (kShift == kShifts<kWidth> - 1) return signed_weights<kWidth>(words);
  else return words & both(((1u << kWidth) - 1) << kWidth * kShift);
}
template <int kWidth, int kShift>
constexpr int weight_of = kShift == kShifts<kWidth> - 1 ? 1 : 1 << kWidth * kShift;

// Calls f(shift) for every shift, a constant. Inlined by force: around a call that GCC leaves, all sums go to memory.
template <class F, int... kShift>
__attribute__((always_inline)) inline void for_each(std::integer_sequence<int, kShift...>, F f) {
  (f(std::integral_constant<int, kShift>{}), ...);
}
template <int kWidth, class F>
__attribute__((always_inline)) inline void for_shifts(F f) {
  for_each(std::make_integer_sequence<int, kShifts<kWidth>>{}, f);
}

// The column of a span in word `word` of a vector, for a shift.
template <int kWidth>
constexpr int column_of(int word, int shift) {
  if constexpr (kWidth == 8) return 2 * word + shift;
  else return word / 8 * 32 + shift % 2 * 16 + word % 8 * 2 + shift / 2;
}

// A power of two for each lane: with it as their step, numbers up to `largest` become words of 15 bits and a sign.
struct Step {
  Vec step, inverse;

  explicit Step(Ints largest) {
    constexpr uint32_t kExponent = 0x7f800000u, kLeast = (127 - 110) << 23;
    // A number that would be rounded to 2^15 gets the next step.
    const Bits bits = ((Bits)largest + 0x100) & kExponent, exponent = bits < kLeast ? kLeast - Bits{} : bits;
    step = (Vec)(exponent - (14u << 23));
    inverse = (Vec)(((127u * 2 + 14) << 23) - exponent);
  }
  Ints operator()(Vec v) const { return (Ints)rounded(v) - kRounder; }
  // The whole numbers in the lower words of the lanes. The upper words are not defined.
  Bits low_words(Vec v) const { return (Bits)rounded(v); }

 private:
  static constexpr int32_t kRounder = 0x4b400000;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  Vec rounded(Vec v) const { return v * inverse + (Vec)(kRounder - Ints{}); }
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
