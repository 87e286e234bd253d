// A std::vector that begins with a line of the caches: a vector of 512 bits across two lines takes twice as long.
#pragma once

#include <new>
#include <vector>

#include "simd.h"

namespace {

// Takes a little more memory than is asked for, and begins with its first line. glibc's aligned_alloc is slower, and a
// step needs hundreds of small pieces of memory.
template <class T>
struct LineAllocator {
  using value_type = T;

  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>& /*other*/) {}

  T* allocate(size_t count) {
    char* const block = static_cast<char*>(::operator new(count * sizeof(T) + kLineBytes));
    char* const line = block + kLineBytes - reinterpret_cast<uintptr_t>(block) % kLineBytes;
    static_assert(alignof(std::max_align_t) >= sizeof(block));  // so there is room for the block before the line
    std::memcpy(line - sizeof block, &block, sizeof block);
    return reinterpret_cast<T*>(line);
  }
  void deallocate(T* line, size_t /*count*/) {
    char* block;
    std::memcpy(&block, reinterpret_cast<char*>(line) - sizeof block, sizeof block);
    ::operator delete(block);
  }
  template <class U>
  bool operator==(const LineAllocator<U>& /*other*/) const {
    return true;
  }
  template <class U>
  bool operator!=(const LineAllocator<U>& /*other*/) const {
    return false;
  }
};

template <class T>
using LineVector = std::vector<T, LineAllocator<T>>;

}  // namespace
