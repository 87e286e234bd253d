// Sums over the live rows of quantised weights for one token, in whole numbers.
//
// h · scale becomes fixed point: 15 bits and a sign, with one step for 32 columns of ten rows. The sums of ten rows are
// exact, and then become float32.
#pragma once

#include <vector>

#include "expand_by_vectors.h"
#include "integers.h"

#if defined(__SSE2__)

namespace {

constexpr int kPairsOfRows = kTen / 2;

// The factors h · scale of ten rows in fixed point, for each block of 32 columns.
class FixedFactors {
 public:
  void resize(int64_t blocks) {
    blocks_ = blocks, ld_ = (blocks + kLanes - 1) / kLanes * kLanes;
    pairs_.resize(kPairsOfRows * ld_), sum_.resize(ld_), step_.resize(ld_);
  }

  // Takes the values of ten rows, which start at scales `scale`; a scale has 2^group_bits columns, or all. Returns
  // false if a factor could be too large for float32, or is not finite.
  bool set(const half* const (&scale)[kTen], const float (&value)[kTen], int group_bits) {
    switch (group_bits) {
      case 5: set_groups<0>(scale, value); break;
      case 6: set_groups<1>(scale, value); break;
      case 7: set_groups<2>(scale, value); break;
      default:
        for (int64_t b = 0; b < blocks_; b += kLanes)
          set_lanes(b, [&](int i) { return splat(value[i] * to_float(*scale[i])); });
    }
    constexpr float kMost = 0x1p111f;  // times a float16
    return std::all_of(value, value + kTen, [](float v) { return __builtin_fabsf(v) < kMost; });
  }

  // What the blocks of a span share, from `block` on, in the lanes of each.
  template <int kBlocks>
  Bits pair(int p, int64_t block) const {
    return integers::spread<kBlocks, Bits>(&pairs_[p * ld_ + block]);
  }
  template <int kBlocks>
  Ints sum(int64_t block) const {
    return integers::spread<kBlocks, Ints>(&sum_[block]);
  }
  template <int kBlocks>
  Vec step(int64_t block) const {
    return integers::spread<kBlocks, Vec>(&step_[block]);
  }

 private:
  // For groups that 2^kShift blocks share.
  template <int kShift>
  void set_groups(const half* const (&scale)[kTen], const float (&value)[kTen]) {
    constexpr int64_t kShared = 1 << kShift;
    const int64_t groups = (blocks_ + kShared - 1) / kShared;
    int64_t b = 0, g = 0;
    const auto with = [&](auto load) {
      set_lanes(b, [&](int i) { return value[i] * repeat_lanes<kShift>(load(scale[i] + g), 0); });
      b += kLanes, g = b / kShared;
    };
    while (b < blocks_ && g + kLanes <= groups) with([](const half* p) { return load_lanes(p); });
    while (b < blocks_) with([&](const half* p) { return load_first_lanes(p, groups - g); });
  }
  // factor_of(i) returns the factors of row i for kLanes blocks from b on.
  template <class Factor>
  void set_lanes(int64_t b, Factor factor_of) {
    using namespace integers;
    Vec factor[kTen];
    Ints largest = {};
    for (int i = 0; i < kTen; i++) {
      factor[i] = factor_of(i);
      largest = larger(largest, magnitude(factor[i]));
    }
    const Step step(largest);
    Ints sum = {};
    for (int p = 0; p < kPairsOfRows; p++) {
      const Bits first = step.low_words(factor[2 * p]), second = step.low_words(factor[2 * p + 1]);
      const Bits pair = (first & 0xffffu) | (second << 16);
      std::memcpy(&pairs_[p * ld_ + b], &pair, sizeof pair);
      sum = multiply_add(sum, pair, both(1) - Bits{});
    }
    std::memcpy(&sum_[b], &sum, sizeof sum);
    std::memcpy(&step_[b], &step.step, sizeof step.step);
  }

  int64_t blocks_ = 0, ld_ = 0;
  LineVector<int32_t> pairs_, sum_;
  LineVector<float> step_;
};

// The sums of ten rows over a span: of half the words of every 16 bytes, for every shift.
template <int kWidth>
struct HalfTile {
  static constexpr int kShifts = integers::kShifts<kWidth>;
  Ints sums[kShifts];

  // Takes the sum of the factors, because weights are too large by an offset.
  explicit HalfTile(Ints sum) {
    integers::for_shifts<kWidth>(
        [&](auto i) { sums[i()] = sum * (-integers::offset_of<kWidth, i()> * integers::weight_of<kWidth, i()>); });
  }
  __attribute__((always_inline)) void add(Bits words, Bits value) {
    const Bits unsigned_words = integers::without_signs<kWidth>(words);
    integers::for_shifts<kWidth>([&](auto i) {
      sums[i()] = integers::multiply_add(sums[i()], integers::weights_in_place<kWidth, i()>(unsigned_words), value);
    });
  }
  void add_to(float* floats, Vec step) const {
    integers::for_shifts<kWidth>([&](auto i) {
      Vec sum = load_bytes<Vec>(floats + i() * kLanes);
      sum += step / integers::weight_of<kWidth, i()> * to_floats(sums[i()]);
      std::memcpy(floats + i() * kLanes, &sum, sizeof sum);
    });
  }
};

// Adds a span of ten rows to sums in the order of the shifts. load(p) reads the span at p.
template <int kWidth, class Load>
inline void add_span(const uint8_t* const (&row)[kTen], const FixedFactors& factors, int64_t n, Load load,
                     float* sums) {
  constexpr int kBlocks = integers::kSpanBlocks<kWidth>;
  const int64_t block = n / kScaleColumns;
  HalfTile<kWidth> low(factors.sum<kBlocks>(block)), high = low;
#pragma GCC unroll 8
  for (int p = 0; p < kPairsOfRows; p++) {
    Bits a = load(row[2 * p] + n * kWidth / 8), b = load(row[2 * p + 1] + n * kWidth / 8);
    asm("" : "+v"(a), "+v"(b));  // keeps them in registers: GCC 12 stores them and reads them back for each use
    const Bits value = factors.pair<kBlocks>(p, block);
    low.add(integers::low_words(a, b), value);
    high.add(integers::high_words(a, b), value);
  }
  const Vec step = factors.step<kBlocks>(block);
  low.add_to(sums + n, step);
  high.add_to(sums + n + low.kShifts * kLanes, step);
}

// Adds the sums of a span, which lie in the order of the shifts, to sums in natural order. Four columns that follow one
// another are two words of two shifts.
template <int kWidth>
inline void add_in_natural_order(const float* by_shift, float* sums) {
  constexpr int kShifts = integers::kShifts<kWidth>, kWords = kLanes / 4 * 8;
  for (int half = 0; half < 2; half++)
    for (int shift = 0; shift < kShifts / 2; shift++) {
      const float* const first = by_shift + (half * kShifts + shift) * kLanes;
      const Vec a = load_bytes<Vec>(first), b = load_bytes<Vec>(first + kShifts / 2 * kLanes);
      const Vec parts[2] = {integers::low_floats(a, b), integers::high_floats(a, b)};
#pragma GCC unroll 8
      for (int word = half * 4; word < kWords; word += 8)
        for (int i = 0; i < 2; i++) {
          float* const first_sum = sums + integers::column_of<kWidth>(word + 2 * i, shift);
          Floats<4> part, sum = load_bytes<Floats<4>>(first_sum);
          std::memcpy(&part, reinterpret_cast<const char*>(&parts[i]) + word / 8 * sizeof part, sizeof part);
          sum += part;
          std::memcpy(first_sum, &sum, sizeof sum);
        }
    }
}

template <class T, int kWidth>
struct Scratch<Quantized<T, kWidth>> {
  LineVector<float> room, by_shift;
  FixedFactors factors;
};

// Adds most steps of a share, as the general add_tens does, which also adds rows whose factors stay float32.
template <class T, int kWidth>
int64_t add_tens(const Masked<ByVectors<Single<Quantized<T, kWidth>>>>& h, Share share,
                 const Quantized<T, kWidth>& rows, int64_t column, int64_t size, Scratch<Quantized<T, kWidth>>& scratch,
                 float* sums) {
  using W = Quantized<T, kWidth>;
  if (!rows.fixed_point) return add_tens<W>(h, share, rows, column, size, scratch, sums);
  constexpr int64_t kSpan = integers::kSpan<kWidth>;
  const integers::Spans<kWidth> spans(size);
  scratch.room.resize(kTen * W::room(size));
  scratch.by_shift.assign(spans.count() * kSpan, 0.0f);
  scratch.factors.resize(W::scale_blocks(spans.columns));
  const Turns<kTen> turns(share.begin, share.end);
  auto ahead = ahead_of_tens(h, rows, turns, column, size);
  for (int64_t turn = 0; turn < turns.count; turn++) {
    typename W::Row row[kTen];
    const uint8_t* steps[kTen];
    const half* scale[kTen];
    float value[kTen];
    for (int i = 0; i < kTen; i++) {
      const int64_t s = turns.row(turn, i);
      row[i] = rows.at(h.row(s, 0), column);
      steps[i] = row[i].steps, scale[i] = row[i].first_scale(), value[i] = h.values[s];
    }
    ahead.begin(turn);
    int64_t n = 0;
    if (scratch.factors.set(scale, value, rows.group_bits)) {
      integers::for_spans(spans, [&](int64_t first, auto load) {
        ahead.ask(lines_of<W>(kTen * kSpan));
        add_span<kWidth>(steps, scratch.factors, first, load, scratch.by_shift.data());
      });
      n = spans.columns;
    }
    if (n < size) add_ten<W>(row, value, n, size, scratch.room.data(), ahead, sums);
  }
  // Sums have room for whole spans.
  for (int64_t n = 0; n < spans.columns; n += kSpan)
    add_in_natural_order<kWidth>(scratch.by_shift.data() + n, sums + n);
  return turns.rest();
}

}  // namespace

#endif
