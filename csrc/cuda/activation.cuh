// The activations of an MLP, in float32.
#pragma once

#include <cmath>
#include <string>

#include "device.cuh"

namespace {

enum class Activation { silu, gelu, gelu_tanh, relu, relu2, unknown };

inline Activation find_activation(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  if (name == "relu2") return Activation::relu2;
  return Activation::unknown;
}

__device__ inline float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::silu: return x / (1.0f + expf(-x));
    case Activation::gelu: return 0.5f * x * erfcf(x * -0.707106781f);
    // 0.5 (1 + tanh u) = 1 / (1 + e^-2u), which does not cancel for negative x
    case Activation::gelu_tanh: return x / (1.0f + expf(-1.59576912f * (x + 0.044715f * x * x * x)));
    case Activation::relu: return x < 0.0f ? 0.0f : x;
    default: return x < 0.0f ? 0.0f : x * x;
  }
}

}  // namespace
