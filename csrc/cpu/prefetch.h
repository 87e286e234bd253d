// Rows are asked from memory before they are read.
#pragma once

#include <algorithm>

#include "storage.h"

namespace {

// Rows are asked for at least so many bytes ahead.
constexpr int64_t kAheadBytes = 16 * 1024;
// If live rows lie at most so many bytes apart, what lies between them is asked for too: the hardware prefetcher
// follows a stream without holes. Memory delivers short rows, of which a token keeps seven in ten, 1.5 times as fast
// that way.
constexpr int64_t kBetweenBytes = 1088;

// A few rows that are read side by side later. While earlier rows are read side by side, memory is asked for these one
// after the other, in the order in which they lie, which the hardware prefetcher follows. They wait in the second-level
// cache.
template <class RowOf>
class Ahead {
 public:
  // While the rows i in [r, r + count) are read, as many later ones are asked for, of those with i < end. Of each,
  // `bytes` from row_of(i) on are read. What lies between rows that are at most `between` bytes apart is asked for too.
  Ahead(RowOf row_of, int64_t r, int64_t count, int64_t end, int64_t bytes, int64_t between = 0)
      : row_of_(row_of), lines_((bytes + kLineBytes - 1) / kLineBytes), between_(between) {
    const int64_t of_all = std::max<int64_t>(count * bytes, 1);
    next_ = r + (kAheadBytes + of_all - 1) / of_all * count;
    end_ = std::min(next_ + count, end);
    if (between > 0 && next_ > 0 && next_ < end_) at_ = address_of(next_ - 1) + lines_ * kLineBytes;
  }

  // Asks for the rows from r on that ask() leaves out, because they are read sooner.
  void ask_for_first(int64_t r) {
    Ahead first = *this;
    first.next_ = r, first.end_ = std::min(next_, end_);
    first.ask(first.lines_ * (first.end_ - r));
  }

  // Asks for some lines of the caches.
  void ask(int64_t lines) {
    for (int64_t run; lines > 0; lines -= run) {
      if (left_ == 0) {
        if (next_ >= end_) return;
        const char* const row = address_of(next_++);
        if (row > at_ && row - at_ <= between_) ask_upto(row);
        at_ = row;
        left_ = lines_;
      }
      run = std::min(lines, left_);
      left_ -= run;
      ask_upto(at_ + run * kLineBytes);
    }
  }

 private:
  const char* address_of(int64_t i) const { return static_cast<const char*>(row_of_(i)); }
  void ask_upto(const char* stop) {
    for (; at_ < stop; at_ += kLineBytes) __builtin_prefetch(at_, 0, 2);
  }

  RowOf row_of_;
  int64_t lines_, between_, next_, end_, left_ = 0;
  const char* at_ = nullptr;
};

}  // namespace
