// Sums over the live rows of quantised weights for one token, in whole numbers.
//
// h · scale becomes fixed point: 15 bits and a sign, with one step for 32 columns of ten rows. The sums of ten rows are
// exact, and then become float32.
#pragma once

#include <utility>
#include <vector>

#include "expand_by_vectors.h"
#include "integers.h"

#if defined(__SSE2__)

namespace {

constexpr int kPairsOfRows = kFarStreams / 2;

// The factors of ten rows in fixed point, for each block of 32 columns.
class FixedFactors {
 public:
  explicit FixedFactors(int64_t blocks) : blocks_((blocks + kLanes - 1) / kLanes * kLanes) {
    pairs_.resize(kPairsOfRows * blocks_), sum_.resize(blocks_), step_.resize(blocks_);
  }

  // Takes the factors of ten terms. Returns false if one of them is not finite.
  template <class Term>
  bool set(const Term (&term)[kFarStreams], int64_t blocks) {
    using namespace integers;
    Ints largest_of_all = {};
    for (int64_t b = 0; b < blocks; b += kLanes) {
      Vec factor[kFarStreams];
      Ints largest = {};
      for (int i = 0; i < kFarStreams; i++) {
        factor[i] = first_lanes(term[i].factor + b, blocks - b);
        largest = larger(largest, magnitude(factor[i]));
      }
      largest_of_all = larger(largest_of_all, largest);
      const Step step(largest);
      Ints sum = {};
      for (int p = 0; p < kPairsOfRows; p++) {
        const Ints first = step(factor[2 * p]), second = step(factor[2 * p + 1]);
        const Ints pair = (first & 0xffff) | (second << 16);
        std::memcpy(&pairs_[p * blocks_ + b], &pair, sizeof pair);
        sum += first + second;
      }
      std::memcpy(&sum_[b], &sum, sizeof sum);
      std::memcpy(&step_[b], &step.step, sizeof step.step);
    }
    return finite(largest_lane(largest_of_all));
  }

  // What the blocks of a span share, from `block` on, in the lanes of each.
  template <int kBlocks>
  Bits pair(int p, int64_t block) const {
    return integers::spread<kBlocks, Bits>(&pairs_[p * blocks_ + block]);
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
  static Vec first_lanes(const float* p, int64_t count) {
    if (count >= kLanes) return load_bytes<Vec>(p);
    Vec v = {};
    std::memcpy(&v, p, count * sizeof(float));
    return v;
  }

  int64_t blocks_;
  std::vector<int32_t> pairs_, sum_;
  std::vector<float> step_;
};

// The sums of ten rows over a span: of half the words of every 16 bytes, for every shift.
template <int kWidth>
struct HalfTile {
  static constexpr int kShifts = integers::kShifts<kWidth>;
  Ints sums[kShifts];

  // Takes the sum of the factors. Weights are too large by kOffset.
  explicit HalfTile(Ints sum) {
    sum *= -integers::kOffset<kWidth>;
    for_shifts([&](auto i) { sums[i()] = sum * integers::weight_of<kWidth, i()>; });
  }
  void add(Bits words, Bits value) {
    for_shifts(
        [&](auto i) { sums[i()] = integers::multiply_add(sums[i()], integers::weights<kWidth, i()>(words), value); });
  }
  void add_to(float* floats, Vec step) const {
    for_shifts([&](auto i) {
      Vec sum = load_bytes<Vec>(floats + i() * kLanes);
      sum += step / integers::weight_of<kWidth, i()> * to_floats(sums[i()]);
      std::memcpy(floats + i() * kLanes, &sum, sizeof sum);
    });
  }

 private:
  template <class F, int... kShift>
  static void for_each(std::integer_sequence<int, kShift...>, F f) {
    (f(std::integral_constant<int, kShift>{}), ...);
  }
  template <class F>
  static void for_shifts(F f) {
    for_each(std::make_integer_sequence<int, kShifts>{}, f);
  }
};

// Adds a span of ten rows to sums in the order of the shifts.
template <int kWidth>
inline void add_span(const uint8_t* const (&row)[kFarStreams], const FixedFactors& factors, int64_t n, float* sums) {
  constexpr int kBlocks = integers::kSpanBlocks<kWidth>;
  const int64_t block = n / kScaleColumns;
  HalfTile<kWidth> low(factors.sum<kBlocks>(block)), high = low;
#pragma GCC unroll 8
  for (int p = 0; p < kPairsOfRows; p++) {
    const Bits a = load_bytes<Bits>(row[2 * p] + n * kWidth / 8), b = load_bytes<Bits>(row[2 * p + 1] + n * kWidth / 8);
    const Bits value = factors.pair<kBlocks>(p, block);
    low.add(integers::low_words(a, b), value);
    high.add(integers::high_words(a, b), value);
  }
  low.add_to(sums + n, factors.step<kBlocks>(block));
  high.add_to(sums + n + low.kShifts * kLanes, factors.step<kBlocks>(block));
}

// Brings the sums of a span from the order of the shifts into natural order.
template <int kWidth>
inline void to_natural_order(float* sums) {
  constexpr int kShifts = integers::kShifts<kWidth>;
  float from[integers::kSpan<kWidth>];
  std::memcpy(from, sums, sizeof from);
  for (int half = 0; half < 2; half++)
    for (int shift = 0; shift < kShifts; shift++)
      for (int lane = 0; lane < kLanes; lane++) {
        const int word = lane / 4 * 8 + half * 4 + lane % 4;
        sums[integers::column_of<kWidth>(word, shift)] = from[(half * kShifts + shift) * kLanes + lane];
      }
}

// Adds most steps of a share, as the general add_far_rows does, which also adds rows whose factors stay float32.
template <class T, int kWidth>
int64_t add_far_rows(const Masked<ByVectors<Single<Quantized<T, kWidth>>>>& h, Share share,
                     const Quantized<T, kWidth>& rows, int64_t column, int64_t size, float* sums) {
  using W = Quantized<T, kWidth>;
  if (!rows.fixed_point) return add_far_rows<W>(h, share, rows, column, size, sums);
  constexpr int64_t kSpan = integers::kSpan<kWidth>;
  const FarAhead ahead(columns_in<W>(far_ahead_bytes()), size);
  const int64_t whole = size / kSpan * kSpan;
  const int64_t ld = W::room(size);
  FixedFactors factors(W::scale_blocks(size));
  std::vector<float> room(kFarStreams * ld), by_integers(whole);
  const auto nothing = [](int, int64_t, int64_t) {};
  for (int64_t s = 0; s < share.stream_length(); s++) {
    typename W::Term term[kFarStreams];
    const uint8_t *row[kFarStreams], *next[kFarStreams];
    for (int i = 0; i < kFarStreams; i++) {
      const int64_t step = share.step(i, s);
      const typename W::Row here = rows.at(h.row(step, 0), column);
      term[i] = W::term(here, h.values[step], size, room.data() + i * ld);
      row[i] = here.steps;
      const typename W::Row later = rows.at(h.row(std::min(step + ahead.steps, share.end - 1), 0), column);
      W::ask_for_scales(later, size);
      next[i] = later.steps;
    }
    int64_t n = 0;
    if (factors.set(term, W::scale_blocks(whole)))
      for (; n < whole; n += kSpan) {
        for (int i = 0; i < kFarStreams; i++)
          __builtin_prefetch(n + ahead.columns < size ? row[i] + (n + ahead.columns) * kWidth / 8
                                                      : next[i] + (n + ahead.columns - size) * kWidth / 8);
        add_span<kWidth>(row, factors, n, by_integers.data());
      }
    for (; n + kChunk <= size; n += kChunk) add_columns<1>(term, n, sums, nothing);
    if (n < size) add_columns<1>(term, n, sums, nothing, size - n);
  }
  for (int64_t n = 0; n < whole; n += kSpan) {
    to_natural_order<kWidth>(by_integers.data() + n);
    for (int i = 0; i < kSpan; i++) sums[n + i] += by_integers[n + i];
  }
  return share.step(kFarStreams, 0);
}

}  // namespace

#endif
