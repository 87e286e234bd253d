// Rows are asked from memory before they are read.
#pragma once

#include <algorithm>
#include <optional>

#include "processor.h"
#include "storage.h"

namespace {

// Rows are asked for at least so many bytes ahead.
constexpr int64_t kAheadBytes = 16 * 1024;
// If live rows lie at most so many bytes apart, what lies between them is asked for too: the hardware prefetcher
// follows a stream without holes. Memory delivers short rows, of which a token keeps seven in ten, 1.5 times as fast
// that way.
constexpr int64_t kBetweenBytes = 1088;

// Streams of rows that lie far apart ask for what comes so many bytes later in each, in its next rows too. Of live
// rows, the next one does not follow in memory.
constexpr int64_t kStreamAheadBytes = 2048, kLiveStreamAheadBytes = 1024;

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

// The order in which the rows [begin, end) are read, kSide of them side by side in each turn: neighbours, or one of
// each of kSide streams, which lie far apart. The rows from rest() on are left.
template <int kSide>
struct Turns {
  int64_t begin, count;
  bool far;

  Turns(int64_t begin, int64_t end, bool far = rows_lie_far_apart())
      : begin(begin), count((end - begin) / kSide), far(far) {}
  int64_t rest() const { return begin + count * kSide; }
  int64_t apart() const { return far ? count : 1; }
  int64_t first(int64_t turn) const { return begin + turn * (far ? 1 : kSide); }
  int64_t row(int64_t turn, int i) const { return first(turn) + i * apart(); }
};

// The rows that streams far apart read later, one of each stream side by side. They wait in the first-level cache.
template <int kStreams, class RowOf>
class AheadInStreams {
 public:
  // Of each row, `bytes` from row_of(i) on are read. In each stream, they are asked for `ahead` bytes early.
  AheadInStreams(const Turns<kStreams>& turns, RowOf row_of, int64_t bytes, int64_t ahead)
      : turns_(turns), row_of_(row_of), lines_((bytes + kLineBytes - 1) / kLineBytes), ahead_(ahead / kLineBytes) {
    find();
  }

  // Asks for what comes before that which ask() asks for.
  void ask_for_first() { ask(kStreams * ahead_); }

  // While the rows of a turn are read, as much is asked for that comes later. Requests that ran ahead or fell behind,
  // because they count whole lines, are put right here.
  void begin(int64_t turn) {
    const int64_t wanted = turn * lines_ + ahead_;
    if (turn_ * lines_ + line_ != wanted) turn_ = wanted / lines_, line_ = wanted % lines_, find();
  }

  // Asks for some lines of the caches, of each stream as many.
  void ask(int64_t lines) {
    for (lines = (lines + kStreams - 1) / kStreams; lines > 0 && turn_ < turns_.count; lines--) {
      for (const char*& at : at_) __builtin_prefetch(at), at += kLineBytes;
      if (++line_ == lines_) line_ = 0, turn_++, find();
    }
  }

 private:
  void find() {
    if (turn_ >= turns_.count) return;
    for (int i = 0; i < kStreams; i++)
      at_[i] = static_cast<const char*>(row_of_(turns_.row(turn_, i))) + line_ * kLineBytes;
  }

  Turns<kStreams> turns_;
  RowOf row_of_;
  int64_t lines_, ahead_, turn_ = 0, line_ = 0;
  const char* at_[kStreams];
};

// What is asked from memory during turns, `ahead` bytes early in each stream. The other parameters are those of Ahead:
// neighbours go on to rows before `end`. For rows without columns nothing is asked for.
template <int kSide, class RowOf>
class AheadOfTurns {
 public:
  AheadOfTurns(const Turns<kSide>& turns, RowOf row_of, int64_t end, int64_t bytes, int64_t ahead, int64_t between = 0)
      : turns_(turns), row_of_(row_of), end_(end), bytes_(bytes), between_(between) {
    if (turns.count == 0 || bytes == 0) return;
    if (turns.far) streams_.emplace(turns, row_of, bytes, ahead), streams_->ask_for_first();
    else begin(0), neighbours_->ask_for_first(turns.begin);
  }
  void begin(int64_t turn) {
    if (streams_) streams_->begin(turn);
    else neighbours_.emplace(row_of_, turns_.first(turn), kSide, end_, bytes_, between_);
  }
  void ask(int64_t lines) {
    if (streams_) streams_->ask(lines);
    else neighbours_->ask(lines);
  }

 private:
  Turns<kSide> turns_;
  RowOf row_of_;
  int64_t end_, bytes_, between_;
  std::optional<AheadInStreams<kSide, RowOf>> streams_;
  std::optional<Ahead<RowOf>> neighbours_;
};

}  // namespace
