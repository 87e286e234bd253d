// The activations of an MLP on vectors, in float32.
#pragma once

#include <cmath>
#include <string>

#include "simd.h"

namespace {

// Returns e^x, accurate to about one unit in the last place: 2^n times a polynomial on [-ln2/2, ln2/2]. Inf and NaN
// behave as in std::exp; results below the normal range are 0 or the smallest normal number.
inline Vec exp(Vec x) {
  constexpr float kLog2e = 1.44269504f, kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vec clamped = x < -87.0f ? splat(-87.0f) : x;
  const Vec shifted = clamped * kLog2e + kRounder;
  const Vec n = shifted - kRounder;
  const Vec r = (clamped - n * kLn2Hi) - n * kLn2Lo;
  Vec p = splat(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = p * r + c;
  p = p * r * r + r + 1.0f;
  const Vec power = (Vec)(((Bits)shifted + 127u) << 23);
  return x > 88.0f ? splat(INFINITY) : p * power;
}

inline Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

inline Vec gelu(Vec x) {
  Vec y;
  for (int i = 0; i < kLanes; i++) y[i] = 0.5f * x[i] * std::erfc(x[i] * -0.707106781f);
  return y;
}

// 0.5 (1 + tanh u) = 1 / (1 + e^-2u), which does not cancel for negative x.
inline Vec gelu_tanh(Vec x) { return x / (1.0f + exp(-1.59576912f * (x + 0.044715f * x * x * x))); }

inline Vec relu(Vec x) { return x < 0.0f ? Vec{} : x; }

inline Vec relu2(Vec x) { return relu(x) * relu(x); }

using Activation = Vec (*)(Vec);

// Returns the activation of that name, or null.
inline Activation find_activation(const std::string& name) {
  if (name == "silu") return silu;
  if (name == "gelu") return gelu;
  if (name == "gelu_tanh") return gelu_tanh;
  if (name == "relu") return relu;
  if (name == "relu2") return relu2;
  return nullptr;
}

}  // namespace
