// The matrix tiles of a processor (AMX): eight registers of up to 16 rows of 64 bytes.
//
// The instructions are written in assembly: the intrinsics take register numbers as literals only, and those of GCC 12
// do not tell the compiler that a tile load reads memory, so an earlier store to the same place might move behind it.
#pragma once

#include <type_traits>

#include "simd.h"
#include "steps.h"

#if defined(__AMX_BF16__)

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <stdexcept>

namespace {
namespace amx {

constexpr int64_t kRows = 16;  // of a tile, and the 4-byte values of one of its rows
constexpr int64_t kRowBytes = 64;

// The shapes of the tiles of a thread. Tiles may be used only while an InUse lives.
class Shapes {
 public:
  Shapes() { permit(); }
  void set(int tile, int64_t rows, int64_t row_bytes) {
    config_.rows[tile] = rows, config_.row_bytes[tile] = row_bytes;
  }
  class InUse {
   public:
    explicit InUse(const Shapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes.config_)); }
    ~InUse() { asm volatile("tilerelease"); }
    InUse(const InUse&) = delete;
  };

 private:
  // Linux saves these registers only for processes that have asked for it.
  static void permit() {
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA of asm/prctl.h
    static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
    if (!granted)
      throw std::runtime_error(
          "rana_kernels: this processor has matrix tiles (AMX), but Linux refuses them to this process: set "
          "RANA_CPU_ISA=avx512_bf16, which does without");
  }

  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config_;
};

// Loads a tile whose rows lie `stride` bytes apart.
template <int kTile>
inline void load(const void* p, int64_t stride = kRowBytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
inline void store(void* p, int64_t stride = kRowBytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}

// sums[i][j] += Σ left[i][2k] right[k][2j] + left[i][2k + 1] right[k][2j + 1], where the factors are bfloat16 and the
// sums float32.
template <int kSums, int kLeft, int kRight>
inline void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kLeft), "i"(kRight));
}

}  // namespace amx

constexpr int64_t kSide = amx::kRows;  // lines of a tile; a line holds so many float32 sums, or pairs of bfloat16
constexpr int64_t kBlock = 2 * kSide;  // bfloat16 values in a line
constexpr int64_t kBlocksAhead = 8;    // the distance of prefetches of weights
constexpr int64_t kParts = 3;          // so many bfloat16 add up to a float32 exactly

struct alignas(amx::kRowBytes) Tile {
  float lines[kSide][kSide];
};

inline int64_t blocks_of(int64_t elements) { return (elements + kBlock - 1) / kBlock; }
inline int64_t tiles_of(int64_t tokens) { return (tokens + kSide - 1) / kSide; }

}  // namespace

constexpr bool kHasAmx = true;
#else
constexpr bool kHasAmx = false;
#endif

namespace {

// A method: tiles multiply blocks of kBlock rows. A block always covers the same rows, because the processor adds up a
// block before it adds to a sum. A token's bits therefore do not depend on the other tokens.
template <class W>
struct ByAmx {
  using Step = Fastest<W>;
};

template <class W>
constexpr bool kUsesAmx = kHasAmx && std::is_same_v<typename W::Element, bfloat16>;

}  // namespace
