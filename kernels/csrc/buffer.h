// Memory at a cache line's start that may fail to be had, and a division.

#pragma once

#include <cstdint>
#include <memory>
#include <new>

struct Free {
  void operator()(void* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

// count elements, or null.
template <typename T>
Buffer<T> allocate(int64_t count) {
  return Buffer<T>(static_cast<T*>(::operator new[](count * sizeof(T), std::align_val_t(64), std::nothrow)));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
