// How quantised weights lie in memory: as rana_kernels/ops/quantized.py says.
#pragma once

#include <cstdint>

namespace rana {

constexpr int64_t kGroupSizes[] = {32, 64, 128};
constexpr int64_t kNibbleBlock = 32;  // columns; byte i of a block holds columns i and i + 16

inline int64_t groups_of(int64_t columns, int64_t group) { return group > 0 ? (columns + group - 1) / group : 0; }

// The columns that share a scale in a row with so many scales, or -1 if no size gives that number.
inline int64_t group_size(int64_t columns, int64_t groups) {
  for (int64_t group : kGroupSizes)
    if (groups_of(columns, group) == groups) return group;
  return groups_of(columns, columns) == groups ? columns : -1;
}

}  // namespace rana
