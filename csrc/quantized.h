// How quantised weights lie in memory: as rana_kernels/ops/quantized.py says.
#pragma once

#include <cstdint>
#include <initializer_list>

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

// The number of bits by which a column, a number of type Column, is shifted to find its group: all of them if a row is
// one group.
template <class Column>
int group_bits(int64_t columns, int64_t groups) {
  const int64_t group = group_size(columns, groups);
  for (int bits : {5, 6, 7})
    if (group == int64_t(1) << bits) return bits;
  return 8 * sizeof(Column) - 1;
}

}  // namespace rana
