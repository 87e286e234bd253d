// Streaming loops that measure the memory bandwidth of this machine, to which kernels bound by bytes are
// compared. stream.py compiles them with -march=native. Each function works on one thread's share.
#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
using Vec = float __attribute__((vector_size(kBytes)));
using Bits = uint32_t __attribute__((vector_size(kBytes)));
constexpr int64_t kLanes = kBytes / 4;

template <class V>
V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < kLanes; i++) total += v[i];
  return total;
}

}  // namespace

extern "C" {

// Reads `words` 4-byte words and does as little as possible with them.
float stream_read(const uint32_t* p, int64_t words) {
  Bits a{}, b{}, c{}, d{};
  for (int64_t i = 0; i + 4 * kLanes <= words; i += 4 * kLanes) {
    a ^= load<Bits>(p + i);
    b ^= load<Bits>(p + i + kLanes);
    c ^= load<Bits>(p + i + 2 * kLanes);
    d ^= load<Bits>(p + i + 3 * kLanes);
  }
  return sum((Vec)(a ^ b ^ c ^ d));
}

// The same with the arithmetic of a bfloat16 dot product against 4096 values that stay in the cache.
float stream_dot(const uint32_t* p, int64_t words) {
  static const float x[4096] = {1.0f};
  Vec even[2] = {}, odd[2] = {};
  for (int64_t i = 0; i + 2 * kLanes <= words; i += 2 * kLanes)
    for (int u = 0; u < 2; u++) {
      const Bits w = load<Bits>(p + i + u * kLanes);
      const float* v = x + (2 * (i + u * kLanes)) % 4096;
      even[u] += (Vec)(w << 16) * load<Vec>(v);
      odd[u] += (Vec)(w & 0xffff0000u) * load<Vec>(v + kLanes);
    }
  return sum((even[0] + even[1]) + (odd[0] + odd[1]));
}

// Eight rows of 4096 bfloat16 at a time, added to a row of sums that stays in the cache.
float stream_axpy(const uint32_t* p, int64_t words) {
  constexpr int64_t kRow = 2048, kRows = 8;
  alignas(64) static thread_local float sums[2 * kRow];
  std::memset(sums, 0, sizeof sums);
  for (int64_t i = 0; i + kRows * kRow <= words; i += kRows * kRow)
    for (int64_t n = 0; n < kRow; n += kLanes) {
      Vec even = load<Vec>(sums + 2 * n), odd = load<Vec>(sums + 2 * n + kLanes);
      for (int64_t r = 0; r < kRows; r++) {
        const Bits w = load<Bits>(p + i + r * kRow + n);
        even += 0.5f * (Vec)(w << 16);
        odd += 0.5f * (Vec)(w & 0xffff0000u);
      }
      std::memcpy(sums + 2 * n, &even, sizeof even);
      std::memcpy(sums + 2 * n + kLanes, &odd, sizeof odd);
    }
  return sums[0];
}
}
