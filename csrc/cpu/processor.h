// What the instruction sets do not say about the processor: how its memory likes to be read.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

// The family of an AMD processor, or 0 for others: 25 is Zen 3 and 4, 26 is Zen 5.
inline unsigned amd_family() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (__get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx && __get_cpuid(1, &a, &b, &c, &d)) {
    const unsigned family = a >> 8 & 15;
    return family == 15 ? family + (a >> 20 & 255) : family;
  }
#endif
  return 0;
}

// Whether rows that are read side by side should lie far apart, or be neighbours. Zen 5 follows ten streams; Zen 4 is
// fastest if memory is asked for rows as they lie (bench/NOTES.md). RANA_CPU_ROWS decides otherwise.
inline bool rows_lie_far_apart() {
  static const bool far = [] {
    const char* const asked = std::getenv("RANA_CPU_ROWS");
    return asked ? !std::strcmp(asked, "far") : amd_family() == 26;
  }();
  return far;
}

}  // namespace
