// The element types of the ops, in short names.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace {

using bfloat16 = torch::headeronly::BFloat16;
using half = torch::headeronly::Half;

}  // namespace
