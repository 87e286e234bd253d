// Decode: a few tokens, bound by the bytes of the weights. Each weight row that is needed is read
// from memory once, front to back, for all tokens.
//
// Sums run in one fixed order for each output, whatever the split over threads, so that results have
// the same bits at every thread count, and a token's do not depend on the other tokens.
#pragma once

#include <vector>

#include "simd.h"

namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 4;    // 16 sums of a 4 x 4 tile fit in 32 registers
constexpr int kSharedRows = 8;  // widened rows kept in registers while the tokens pass
#else
constexpr int kTileRows = 2;
constexpr int kSharedRows = 4;
#endif
constexpr int kTileTokens = 4;
constexpr int kStreamedRows = 16;  // rows read side by side for one token: enough streams to fill the memory bus

// ---- h = B x ----

// h[r] = B[r] · x for kRows rows and one token. Four independent sums a row hide the latency of the
// multiply-add; plain loads leave the hardware prefetcher in charge (software prefetch halves the
// speed on Zen 4), and rows go one at a time as long as x stays in the first-level cache.
template <int kRows, class T>
void dot_rows(const T* B, int64_t ldb, const T* x, int64_t size, float* h) {
  Chunk even[kRows] = {}, odd[kRows] = {};
  int64_t k = 0;
  for (; k + 2 * kChunk <= size; k += 2 * kChunk) {
    const Chunk x0 = load(x + k), x1 = load(x + k + kChunk);
    for (int r = 0; r < kRows; r++) {
      const Chunk w0 = load(B + r * ldb + k), w1 = load(B + r * ldb + k + kChunk);
      even[r].lo += w0.lo * x0.lo;
      even[r].hi += w0.hi * x0.hi;
      odd[r].lo += w1.lo * x1.lo;
      odd[r].hi += w1.hi * x1.hi;
    }
  }
  for (; k < size; k += kChunk) {
    const Chunk x0 = load_first(x + k, size - k);
    for (int r = 0; r < kRows; r++) {
      const Chunk w0 = load_first(B + r * ldb + k, size - k);
      even[r].lo += w0.lo * x0.lo;
      even[r].hi += w0.hi * x0.hi;
    }
  }
  for (int r = 0; r < kRows; r++) h[r] = sum((even[r].lo + even[r].hi) + (odd[r].lo + odd[r].hi));
}

// h[m][r] = B[r] · x[m] for a tile of kRows rows and kTokens tokens.
template <int kRows, int kTokens, class T>
void dot_tile(const T* B, int64_t ldb, const T* x, int64_t ldx, int64_t size, float* h, int64_t ldh) {
  Vec sums[kTokens][kRows] = {};
  const auto step = [&](auto load_at) {
    typename Operand<T>::type w[kRows];
    for (int r = 0; r < kRows; r++) w[r] = load_at(B + r * ldb);
    for (int m = 0; m < kTokens; m++) {
      const auto v = load_at(x + m * ldx);
      for (int r = 0; r < kRows; r++) sums[m][r] = multiply_add(sums[m][r], v, w[r]);
    }
  };
  int64_t k = 0;
  for (; k + kChunk <= size; k += kChunk) step([k](const T* row) { return load_operand(row + k); });
  if (k < size) step([k, size](const T* row) { return load_operand_first(row + k, size - k); });
  for (int m = 0; m < kTokens; m++)
    for (int r = 0; r < kRows; r++) h[m * ldh + r] = sum(sums[m][r]);
}

template <int kRows, class T>
void dot_tokens(const T* B, int64_t ldb, const T* x, int64_t ldx, int64_t tokens, int64_t size, float* h, int64_t ldh) {
  for (; tokens >= kTileTokens; tokens -= kTileTokens, x += kTileTokens * ldx, h += kTileTokens * ldh)
    dot_tile<kRows, kTileTokens>(B, ldb, x, ldx, size, h, ldh);
  if (tokens == 3) dot_tile<kRows, 3>(B, ldb, x, ldx, size, h, ldh);
  if (tokens == 2) dot_tile<kRows, 2>(B, ldb, x, ldx, size, h, ldh);
  if (tokens == 1) dot_tile<kRows, 1>(B, ldb, x, ldx, size, h, ldh);
}

// h[m][r] = B[r] · x[m] for r in [begin, end) and all tokens; h is [tokens, ldh].
template <class T>
void project_rows(const T* B, int64_t ldb, const T* x, int64_t ldx, int64_t tokens, int64_t size, int64_t begin,
                  int64_t end, float* h, int64_t ldh) {
  constexpr int64_t kFirstLevelBytes = 16 * 1024;  // what x may take of the first-level cache
  const bool one_token = tokens == 1;
  const int64_t together = !one_token ? kTileRows : size * int64_t(sizeof(T)) > kFirstLevelBytes ? 4 : 1;
  int64_t r = begin;
  for (; r + together <= end; r += together) {
    if (!one_token) dot_tokens<kTileRows>(B + r * ldb, ldb, x, ldx, tokens, size, h + r, ldh);
    else if (together == 4) dot_rows<4>(B + r * ldb, ldb, x, size, h + r);
    else dot_rows<1>(B + r * ldb, ldb, x, size, h + r);
  }
  for (; r < end; r++) {
    if (!one_token) dot_tokens<1>(B + r * ldb, ldb, x, ldx, tokens, size, h + r, ldh);
    else dot_rows<1>(B + r * ldb, ldb, x, size, h + r);
  }
}

// ---- the mask ----

// Keep unless |h|·scale < threshold, decided in float32; a NaN is kept. `scale` may be null, and
// the threshold is one value (step 0) or one a row (step 1).
struct Mask {
  const float* threshold;
  int64_t threshold_step;
  const float* scale;

  bool keeps(float h, int64_t row) const {
    const float magnitude = __builtin_fabsf(h);
    const float score = scale ? magnitude * scale[row] : magnitude;
    return !(score < threshold[row * threshold_step]);
  }
  float apply(float h, int64_t row) const { return keeps(h, row) ? h : 0.0f; }
};

// The rows that at least one token keeps, in order, each with one coefficient a token: that token's
// h where it keeps the row, else 0.
struct Live {
  int64_t tokens = 0;
  std::vector<int64_t> rows;
  std::vector<float> coefficients;  // [rows.size(), tokens]

  Live(const float* h, int64_t ldh, int64_t tokens, int64_t size, Mask mask) : tokens(tokens) {
    rows.resize(size);
    coefficients.resize(size * tokens);
    int64_t count = 0;
    for (int64_t r = 0; r < size; r++) {
      bool any = false;
      for (int64_t m = 0; m < tokens; m++) {
        const bool kept = mask.keeps(h[m * ldh + r], r);
        coefficients[count * tokens + m] = kept ? h[m * ldh + r] : 0.0f;
        any |= kept;
      }
      rows[count] = r;
      count += any;
    }
    rows.resize(count);
  }
};

// ---- sums over the live rows ----

// sums[n] += Σ_r coefficients[r] · row_r[n] for kRows rows and one token; sums are chunks in lane order.
template <int kRows, class T>
void add_rows(const T* rows, int64_t ld, const int64_t* live, const float* coefficients, int64_t size, float* sums) {
  const T* row[kRows];
  Vec c[kRows];
  for (int r = 0; r < kRows; r++) row[r] = rows + live[r] * ld, c[r] = splat(coefficients[r]);
  const auto step = [&](int64_t n, auto load_at) {
    Chunk s = load(sums + n);
    for (int r = 0; r < kRows; r++) {
      const Chunk w = load_at(row[r] + n);
      s.lo += c[r] * w.lo;
      s.hi += c[r] * w.hi;
    }
    store(sums + n, s);
  };
  int64_t n = 0;
  for (; n + kChunk <= size; n += kChunk) step(n, [](const T* p) { return load(p); });
  if (n < size) step(n, [count = size - n](const T* p) { return load_first(p, count); });
}

// The same for several tokens: coefficients [kRows, tokens], sums [tokens, lds].
template <int kRows, class T>
void add_rows_to_tokens(const T* rows, int64_t ld, const int64_t* live, const float* coefficients, int64_t tokens,
                        int64_t size, float* sums, int64_t lds) {
  const T* row[kRows];
  for (int r = 0; r < kRows; r++) row[r] = rows + live[r] * ld;
  for (int64_t n = 0; n < size; n += kChunk) {
    Chunk w[kRows];
    for (int r = 0; r < kRows; r++) w[r] = load_first(row[r] + n, size - n);
    for (int64_t m = 0; m < tokens; m++) {
      Chunk s = load(sums + m * lds + n);
      for (int r = 0; r < kRows; r++) {
        const Vec c = splat(coefficients[r * tokens + m]);
        s.lo += c * w[r].lo;
        s.hi += c * w[r].hi;
      }
      store(sums + m * lds + n, s);
    }
  }
}

template <int kRows, class T>
int64_t add_groups(const T* rows, int64_t ld, const Live& live, int64_t i, int64_t size, float* sums, int64_t lds) {
  const int64_t count = live.rows.size();
  for (; i + kRows <= count; i += kRows) {
    const float* c = live.coefficients.data() + i * live.tokens;
    if (live.tokens == 1) add_rows<kRows>(rows, ld, live.rows.data() + i, c, size, sums);
    else add_rows_to_tokens<kRows>(rows, ld, live.rows.data() + i, c, live.tokens, size, sums, lds);
  }
  return i;
}

// sums[m][0, size) = Σ over the live rows, in order; sums is [tokens, lds], chunks in lane order, and
// rows starts at the first of the columns wanted.
template <class T>
void sum_live_rows(const T* rows, int64_t ld, const Live& live, int64_t size, float* sums, int64_t lds) {
  std::memset(sums, 0, live.tokens * lds * sizeof(float));
  int64_t i = 0;
  if (live.tokens == 1) i = add_groups<kStreamedRows>(rows, ld, live, i, size, sums, lds);
  i = add_groups<kSharedRows>(rows, ld, live, i, size, sums, lds);
  i = add_groups<kSharedRows / 4>(rows, ld, live, i, size, sums, lds);
  add_groups<1>(rows, ld, live, i, size, sums, lds);
}

}  // namespace
