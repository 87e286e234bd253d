// The mask, and the values of h that it keeps.
#pragma once

#include <algorithm>
#include <vector>

#include "steps.h"

namespace {

// Keeps h unless |h|·norms < threshold, decided in float32, so that a NaN is kept. `norms` may be null. There is one
// threshold for all rows (threshold_step 0) or one a row (threshold_step 1).
struct Mask {
  const float* threshold;
  int64_t threshold_step;
  const float* norms;

  // Sets kept[r] to h[r] if it is kept, else to 0; sets live[r] if it is kept. Each form of the mask has its own loop:
  // a loop that tests the form for every row takes 4 ns a row, these take 0.2 ns.
  void apply(const float* h, int64_t ranks, float* kept, uint32_t* live) const {
    const auto decide = [=](auto score_of, auto threshold_of) {
      for (int64_t r = 0; r < ranks; r++) {
        const bool keep = !(score_of(__builtin_fabsf(h[r]), r) < threshold_of(r));
        kept[r] = keep ? h[r] : 0.0f;
        live[r] |= keep;
      }
    };
    const auto with = [=](auto score_of) {
      if (threshold_step) decide(score_of, [=](int64_t r) { return threshold[r]; });
      else decide(score_of, [t = threshold[0]](int64_t) { return t; });
    };
    if (norms) with([=](float magnitude, int64_t r) { return magnitude * norms[r]; });
    else with([](float magnitude, int64_t) { return magnitude; });
  }
};

// The steps that at least one token keeps, in order, and the values of every token for these steps: 0 where the token
// does not keep the row. A step always covers the same rows, so a token's sums do not depend on the other tokens.
// Tokens lie in tiles of `width`; zeros fill the last tile.
template <class Method>
struct Masked {
  using Step = typename Method::Step;
  using Value = typename Step::Value;
  static constexpr int kRows = Step::kRows;
  int64_t tokens, ranks, width;
  std::vector<int64_t> first;  // [steps], the first row of each
  std::vector<Value> values;   // [tiles, steps, width]

  Masked(const float* h, int64_t ldh, int64_t tokens, int64_t ranks, Mask mask)
      : tokens(tokens), ranks(ranks), width(Method::width(tokens)) {
    const int64_t most = steps_of<Step>(ranks);
    std::vector<uint32_t> live(most * kRows);
    std::vector<float> kept(most * kRows);
    if constexpr (kRows == 1)
      if (tokens == 1 && width == 1) {
        mask.apply(h, ranks, kept.data(), live.data());
        list_kept(kept.data(), live.data());
        return;
      }
    std::vector<Value> packed(tokens * most);
    for (int64_t m = 0; m < tokens; m++) {
      mask.apply(h + m * ldh, ranks, kept.data(), live.data());
      Step::pack(kept.data(), most, packed.data() + m * most);
    }
    list(live.data(), most);
    values.resize((tokens + width - 1) / width * steps() * width);
    for (int64_t m = 0; m < tokens; m += width)
      fill(packed.data() + m * most, most, std::min(width, tokens - m), values.data() + m * steps());
  }

  int64_t steps() const { return first.size(); }
  // Row i of step s. If the number of rows is odd, the last row has no partner: it is then read twice, the second time
  // times zero.
  int64_t row(int64_t s, int i) const { return first[s] + i < ranks ? first[s] + i : first[s]; }

 private:
  // The steps and values of a single token.
  void list_kept(const float* kept, const uint32_t* live) {
    first.resize(ranks), values.resize(ranks);
    int64_t steps = 0;
    for (int64_t r = 0; r < ranks; r++) {
      first[steps] = r, values[steps] = kept[r];
      steps += live[r];
    }
    first.resize(steps), values.resize(steps);
  }
  void fill(const Value* packed, int64_t most, int64_t count, Value* tile) const {
    for (int64_t s = 0; s < steps(); s++)
      for (int64_t m = 0; m < count; m++) tile[s * width + m] = packed[m * most + first[s] / kRows];
  }
  void list(const uint32_t* live, int64_t most) {
    first.resize(most);
    int64_t steps = 0;
    for (int64_t s = 0; s < most; s++) {
      first[steps] = s * kRows;
      steps += std::any_of(live + s * kRows, live + (s + 1) * kRows, [](uint32_t flag) { return flag; });
    }
    first.resize(steps);
  }
};

}  // namespace
