// How far ahead of their use memory is asked for the rows of one token.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

// AMD's Zen 3 and Zen 4.
inline bool is_amd_family_25() {
#if defined(__x86_64__)
  unsigned signature, vendor[3];
  if (!__get_cpuid(0, &signature, &vendor[0], &vendor[1], &vendor[2]) || vendor[0] != signature_AMD_ebx) return false;
  __get_cpuid(1, &signature, &vendor[0], &vendor[1], &vendor[2]);
  return (signature >> 8 & 15) + (signature >> 20 & 255) == 25;
#else
  return false;
#endif
}

// The hardware prefetcher does not know where a stream continues after the end of a row. Zen 4 loses a quarter of its
// speed if ten streams ask 1024 bytes ahead, and Zen 5 loses a seventh if they ask 256 bytes ahead (bench/NOTES.md).
inline int64_t far_ahead_bytes() {
  static const int64_t bytes = is_amd_family_25() ? 256 : 1024;
  return bytes;
}

}  // namespace
