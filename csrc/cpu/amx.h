// The matrix tiles of a processor (AMX): eight registers of up to 16 rows of 64 bytes.
//
// In assembly, because the intrinsics take registers as literals only, and those of GCC 12 do not say that a tile is
// loaded from memory: what was stored there just before might then come too late.
#pragma once

#if defined(__AMX_BF16__)

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <stdexcept>

namespace {
namespace amx {

constexpr int64_t kRows = 16;  // of a tile, and the 4-byte values of one of its rows
constexpr int64_t kRowBytes = 64;

// Which part of its registers a thread uses; it must not use them before, nor after.
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
  // Linux saves these registers for a process only if that has asked for them.
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

// Rows lie `stride` bytes apart.
template <int kTile>
inline void load(const void* p, int64_t stride = kRowBytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
inline void store(void* p, int64_t stride = kRowBytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}

// sums[i][j] += Σ left[i][2k] right[k][2j] + left[i][2k + 1] right[k][2j + 1]: rows of bfloat16 times pairs of them,
// in float32.
template <int kSums, int kLeft, int kRight>
inline void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kLeft), "i"(kRight));
}

}  // namespace amx
}  // namespace

#endif
