// hidden @ weight.T of bfloat16 on CPUs with AVX512-BF16: what linear_logp.cpp and logits_tile.cpp share.
//
// D is the summed index. A product is made of blocks of 6 rows of hidden by panels of 64 of weight, whose 24 vectors of
// sums stay in registers. Both operands are packed, so that pairs of neighbours along D, what vdpbf16ps takes, lie in
// the order of use. On Zen 4 this keeps the multiplier 97% busy from D = 576 to 4096, although a panel of 4096 comes
// from the second level cache: panels cut along D, blocks of 9 x 48, 14 x 32, 5 x 80 and 4 x 96, and prefetching the
// next panel were not faster.

#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#if defined(__x86_64__) && ((defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && __GNUC__ >= 10))
#define HAVE_BF16 1
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // g++ 12 warns of its own immintrin.h, at every use
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")))
#define INLINE TARGET inline __attribute__((always_inline))
#else
#define HAVE_BF16 0
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

#if HAVE_BF16

namespace {

constexpr int kRows = 6, kLanes = 16, kGroups = 4, kColumns = kGroups * kLanes;  // of a block; of a panel
constexpr int64_t kStretch = 96;  // pairs in one running sum

// Whether this processor has the instructions.
inline bool processor_has_bf16() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16");
}

struct Free {
  void operator()(void* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

// count elements at a cache line's start, or null.
template <typename T>
Buffer<T> allocate(int64_t count) {
  return Buffer<T>(static_cast<T*>(::operator new[](count * sizeof(T), std::align_val_t(64), std::nothrow)));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Up to 6 rows of D as a block, [pair][row]; zero where there are no more rows or D is odd.
inline void pack_rows(const uint16_t* rows, int64_t count, int64_t D, int64_t stride, uint32_t* out) {
  const int64_t pairs = (D + 1) / 2;
  for (int r = 0; r < kRows; ++r) {
    if (r >= count) {
      for (int64_t k = 0; k < pairs; ++k) out[k * kRows + r] = 0;
      continue;
    }
    const uint16_t* row = rows + r * stride;
    for (int64_t k = 0; k < D / 2; ++k) memcpy(&out[k * kRows + r], row + 2 * k, 4);
    if (D % 2) out[(pairs - 1) * kRows + r] = row[D - 1];  // little-endian: the other half is zero
  }
}

// 16 rows of 16 words become 16 columns.
INLINE void transpose(__m512i x[16]) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // now x[i + j] holds column j of rows i to i + 3, in each quarter
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(x[j], x[j + 4], 0x88), b = _mm512_shuffle_i32x4(x[j + 8], x[j + 12], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(x[j], x[j + 4], 0xdd), d = _mm512_shuffle_i32x4(x[j + 8], x[j + 12], 0xdd);
    y[j] = _mm512_shuffle_i32x4(a, b, 0x88);
    y[j + 8] = _mm512_shuffle_i32x4(a, b, 0xdd);
    y[j + 4] = _mm512_shuffle_i32x4(c, d, 0x88);
    y[j + 12] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}

// Up to 64 rows of D as a panel, [pair][row]; zero where there are no more rows or D is odd.
TARGET inline void pack_panel(const uint16_t* rows, int64_t count, int64_t D, int64_t stride, uint32_t* out) {
  const int64_t pairs = (D + 1) / 2;
  for (int g = 0; g < kColumns; g += kLanes) {
    for (int64_t k = 0; k < pairs; k += 16) {
      const int64_t left = D - 2 * k;
      const __mmask32 inside = left >= 32 ? 0xffffffffu : (1u << left) - 1;
      __m512i x[16];
      for (int i = 0; i < 16; ++i)
        x[i] = _mm512_maskz_loadu_epi16(g + i < count ? inside : 0, rows + (g + i) * stride + 2 * k);
      transpose(x);
      const int64_t filled = pairs - k < 16 ? pairs - k : 16;
      for (int64_t i = 0; i < filled; ++i) _mm512_store_si512(out + (k + i) * kColumns + g, x[i]);
    }
  }
}

// 6 rows by 64 columns of float32: products over all of D, in stretches whose sums are added up. One running sum over
// D = 4096 would be wrong by 1e-5 where these are by 2e-6; they cost 1% of the time.
TARGET inline void multiply(const uint32_t* block, const uint32_t* panel, int64_t pairs, float* tile) {
  const int64_t stretches = ceil_div(pairs, kStretch), length = ceil_div(pairs, stretches ? stretches : 1);
  for (int64_t start = 0; start < pairs; start += length) {
    const int64_t end = start + length < pairs ? start + length : pairs;
    __m512 sum[kRows][kGroups];
    for (int r = 0; r < kRows; ++r)
      for (int g = 0; g < kGroups; ++g) sum[r][g] = _mm512_setzero_ps();
    for (int64_t k = start; k < end; ++k) {
      __m512i columns[kGroups];
      for (int g = 0; g < kGroups; ++g) columns[g] = _mm512_load_si512(panel + k * kColumns + g * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const __m512i row = _mm512_set1_epi32(int32_t(block[k * kRows + r]));
        for (int g = 0; g < kGroups; ++g) sum[r][g] = _mm512_dpbf16_ps(sum[r][g], (__m512bh)row, (__m512bh)columns[g]);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int g = 0; g < kGroups; ++g) {
        float* out = tile + r * kColumns + g * kLanes;
        _mm512_store_ps(out, start ? _mm512_add_ps(_mm512_load_ps(out), sum[r][g]) : sum[r][g]);
      }
  }
}

}  // namespace

#endif
