// The grid barrier, in the names of CUDA's cooperative groups.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct grid_group {
  using arrival_token = unsigned;

  void sync() const { shim::wait(shim::Scope::grid, "grid.sync"); }
  arrival_token barrier_arrive() const { return shim::arrive_at_grid(); }
  void barrier_wait(arrival_token&& arrival) const { shim::wait_for_grid(arrival); }
};

inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
