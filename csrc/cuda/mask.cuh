// The mask, and the values of h that it keeps: z = m ⊙ h, in the forms in which the sums over rows read it.
#pragma once

#include "any_width.cuh"

namespace {

// Keeps h unless |h|·norms < threshold, decided in float32, so that a NaN is kept. `norms` may be null. There is one
// threshold for all rows (threshold_step 0) or one a row (threshold_step 1).
struct Mask {
  const float* threshold;
  int threshold_step;
  const float* norms;

  // Returns m ⊙ h for the h of a row.
  __device__ float apply(float h, int64_t row) const {
    const float score = norms ? fabsf(h) * norms[row] : fabsf(h);
    return score < threshold[row * threshold_step] ? 0.0f : h;
  }
};

// A sum over rows reads z [tokens, rows] from one of the structures below. For threads these have
//   value(m, row)       z of a token at a row
//   run(row, values)    z of the first token at eight rows from a multiple of eight on, 0 beyond the last row
// and for tensor cores
//   factors(row)        this lane's part of z at sixteen rows from a multiple of sixteen on

constexpr int kRun = 8;

template <class Z>
__device__ void run_one_by_one(const Z& z, int64_t row, float (&values)[kRun]) {
#pragma unroll
  for (int i = 0; i < kRun; i++) values[i] = row + i < z.rows ? z.value(0, row + i) : 0.0f;
}

// The input h of an op; the mask is applied when it is read.
template <class T>
struct MaskedInput {
  const T* h;
  int tokens;
  int64_t rows;
  Mask mask;

  __device__ float value(int m, int64_t row) const { return mask.apply(float(h[m * rows + row]), row); }
  __device__ void run(int64_t row, float (&values)[kRun]) const { run_one_by_one(*this, row, values); }
};

// Values that this launch has written itself, in float32. They are read past the first-level cache, because writes of
// other multiprocessors do not reach it.
struct Floats {
  float* z;
  int tokens;
  int64_t rows;

  int64_t size() const { return tokens * rows; }
  __device__ void store(int m, int64_t row, float value) const { z[m * rows + row] = value; }
  __device__ float value(int m, int64_t row) const { return __ldcg(z + m * rows + row); }
  __device__ void run(int64_t row, float (&values)[kRun]) const {
    if (row + kRun <= rows) {
#pragma unroll
      for (int i = 0; i < kRun; i += 4) {
        const float4 four = __ldcg(reinterpret_cast<const float4*>(z + row + i));
        values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
      }
    } else {
      run_one_by_one(*this, row, values);
    }
  }
};

// The same values as sums of three bfloat16, in the order in which the lanes of a warp read them.
template <int kMostTokens>
struct Parts {
  struct OfLane {
    uint32_t words[8];  // b[0] and b[1] of each part; the last two are not used
  };
  OfLane* z;  // [sixteens of rows, eights of tokens, members, groups]
  int tokens;
  int64_t rows;

  int64_t size() const { return ceil_div(rows, 16) * (kMostTokens / 8) * kLanes; }
  __device__ OfLane* of(int64_t row, int m) const {
    return z + ((row / 16 * (kMostTokens / 8) + m / 8) * 4 + row % 8 / 2) * 8 + m % 8;
  }
  __device__ void store(int m, int64_t row, float value) const {
    auto* const halves = reinterpret_cast<uint16_t*>(of(row, m)->words) + row % 16 / 8 * 2 + row % 2;
#pragma unroll
    for (int part = 0; part < kParts; part++) halves[4 * part] = split_off(value);
  }
  __device__ Factors<kMostTokens> factors(int row) const {
    Factors<kMostTokens> factors = {};
    if (row >= rows) return factors;
#pragma unroll
    for (int eight = 0; eight < kMostTokens / 8; eight++) {
      if (8 * eight + group() >= tokens) continue;
      auto& b = factors.b[eight];
      const auto* const words = reinterpret_cast<const uint4*>(of(row + 2 * member(), 8 * eight + group()));
      const uint4 first = __ldcg(words);
      const uint2 last = __ldcg(reinterpret_cast<const uint2*>(words + 1));
      b[0][0] = first.x, b[0][1] = first.y, b[1][0] = first.z, b[1][1] = first.w, b[2][0] = last.x, b[2][1] = last.y;
    }
    return factors;
  }
};

template <class Z>
constexpr bool kInParts = false;
template <int kMostTokens>
constexpr bool kInParts<Parts<kMostTokens>> = true;

// The form of a z that is computed within a launch, for sums over rows W.
template <class W, int kTokens>
using Computed = std::conditional_t<kExpandedByMma<W, kTokens>, Parts<kTokens>, Floats>;

}  // namespace
