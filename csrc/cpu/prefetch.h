// Rows are asked from memory before they are read.
#pragma once

#include <algorithm>

#include "storage.h"

namespace {

// Rows are asked for at least so many bytes ahead.
constexpr int64_t kAheadBytes = 16 * 1024;

// The number of groups of `rows` pieces of rows, each of `bytes` bytes, that lie between a piece and its use.
inline int64_t groups_ahead(int64_t rows, int64_t bytes) {
  return (kAheadBytes + rows * bytes - 1) / std::max<int64_t>(rows * bytes, 1);
}

// A few rows that are read side by side later. While earlier rows are read side by side, memory is asked for these one
// after the other, in the order in which they lie: that is the only order in which it is fast, and which the hardware
// prefetcher follows. They wait in the second-level cache.
template <class RowOf>
class Ahead {
 public:
  // The rows row_of(i) for i in [next, end), each of `bytes` bytes.
  Ahead(RowOf row_of, int64_t next, int64_t end, int64_t bytes)
      : row_of_(row_of), next_(next), end_(end), lines_((bytes + kLineBytes - 1) / kLineBytes) {}

  // Asks for some lines of the caches.
  void ask(int64_t lines) {
    for (int64_t run; lines > 0; lines -= run) {
      if (left_ == 0) {
        if (next_ >= end_) return;
        at_ = static_cast<const char*>(row_of_(next_++));
        left_ = lines_;
      }
      run = std::min(lines, left_);
      left_ -= run;
      for (const char* const stop = at_ + run * kLineBytes; at_ != stop; at_ += kLineBytes)
        __builtin_prefetch(at_, 0, 2);
    }
  }

 private:
  RowOf row_of_;
  int64_t next_, end_, lines_, left_ = 0;
  const char* at_ = nullptr;
};

}  // namespace
