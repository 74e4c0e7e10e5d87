// bfloat16 products that keep float32, which torch has not on CPUs: recomputed logits, and gradients summed in place.
//
// out (n, m) = or += left (n, k) @ right (k, m). A task is a panel of right's columns by some of left's rows.

#include "bf16_product.h"

#if HAVE_BF16

namespace {

constexpr int64_t kTaskRows = 384;  // a multiple of kRows

// The bits of two bfloat16 vectors as 16 pairs.
INLINE __m512i pairs_of(__m256i first, __m256i second) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

// Up to 6 rows of k float32, rounded to bfloat16, as pack_rows has them.
TARGET void pack_wide_rows(const float* rows, int64_t count, int64_t k, int64_t stride, uint32_t* out) {
  const int64_t pairs = (k + 1) / 2;
  alignas(64) uint32_t some[kLanes];
  for (int r = 0; r < kRows; ++r) {
    for (int64_t j = 0; j < pairs; j += kLanes) {
      const int64_t left = k - 2 * j;
      const __mmask32 inside = r >= count ? 0 : left >= 32 ? 0xffffffffu : (1u << left) - 1;
      const float* at = rows + r * stride + 2 * j;
      const __m512 low = _mm512_maskz_loadu_ps(__mmask16(inside), at);
      const __m512 high = _mm512_maskz_loadu_ps(__mmask16(inside >> 16), at + 16);
      _mm512_store_si512(some, (__m512i)_mm512_cvtne2ps_pbh(high, low));
      const int64_t filled = pairs - j < kLanes ? pairs - j : kLanes;
      for (int64_t i = 0; i < filled; ++i) out[(j + i) * kRows + r] = some[i];
    }
  }
}

// Up to 16 blocks from a (k, 96) float32 matrix, whose columns are left's rows.
TARGET void pack_wide_columns(const float* matrix, int64_t count, int64_t k, int64_t stride, uint32_t* out) {
  const int64_t pairs = (k + 1) / 2, blocks = ceil_div(count, kRows);
  alignas(64) uint32_t line[kRows * kLanes];
  for (int64_t j = 0; j < pairs; ++j) {
    for (int g = 0; g < kRows; ++g) {
      const int64_t left = count - g * kLanes;
      const __mmask16 inside = left >= kLanes ? 0xffff : left <= 0 ? 0 : __mmask16((1u << left) - 1);
      const float* at = matrix + 2 * j * stride + g * kLanes;
      const __m512 first = _mm512_maskz_loadu_ps(inside, at);
      const __m512 second = _mm512_maskz_loadu_ps(2 * j + 1 < k ? inside : __mmask16(0), at + stride);
      _mm512_store_si512(line + g * kLanes,
                         pairs_of((__m256i)_mm512_cvtneps_pbh(first), (__m256i)_mm512_cvtneps_pbh(second)));
    }
    for (int64_t b = 0; b < blocks; ++b) memcpy(out + (b * pairs + j) * kRows, line + b * kRows, 4 * kRows);
  }
}

// Up to 64 columns of a (k, m) matrix as a panel.
TARGET void pack_columns(const uint16_t* matrix, int64_t count, int64_t k, int64_t stride, uint32_t* out) {
  for (int64_t j = 0; 2 * j < k; ++j) {
    for (int g = 0; g < kGroups; ++g) {
      const int64_t left = count - g * kLanes;
      const __mmask16 inside = left >= kLanes ? 0xffff : left <= 0 ? 0 : __mmask16((1u << left) - 1);
      const uint16_t* at = matrix + 2 * j * stride + g * kLanes;
      const __m256i first = _mm256_maskz_loadu_epi16(inside, at);
      const __m256i second = _mm256_maskz_loadu_epi16(2 * j + 1 < k ? inside : __mmask16(0), at + stride);
      _mm512_store_si512(out + j * kColumns + g * kLanes, pairs_of(first, second));
    }
  }
}

TARGET void put(const float* tile, int64_t rows, int64_t columns, bool add, float* out, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int g = 0; g < kGroups; ++g) {
      const int64_t left = columns - g * kLanes;
      const __mmask16 inside = left >= kLanes ? 0xffff : left <= 0 ? 0 : __mmask16((1u << left) - 1);
      float* at = out + r * stride + g * kLanes;
      __m512 x = _mm512_load_ps(tile + r * kColumns + g * kLanes);
      if (add) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(inside, at));
      _mm512_mask_storeu_ps(at, inside, x);
    }
}

}  // namespace

#endif

// Returns 0, or -1 where cream_bf16_available is 0, or -2 without memory.
EXPORT int cream_bf16_product(
    const void* left,  // (n, k): 0 bfloat16, 1 float32 that is rounded to it, 2 the same as (k, n)
    int left_kind,
    int64_t n,
    int64_t k,
    int64_t left_stride,    // rows so many elements apart, columns dense, as everywhere here
    const uint16_t* right,  // bfloat16: 0 (m, k), 1 (k, m)
    int right_kind,
    int64_t m,
    int64_t right_stride,
    float* out,  // (n, m)
    int64_t out_stride,
    int add,  // to out, or else put there
    int threads
) {
#if HAVE_BF16
  if (!processor_has_bf16()) return -1;
  const int64_t pairs = (k + 1) / 2, row_blocks = ceil_div(n, kRows), groups = ceil_div(n, kTaskRows);
  const int64_t panels = ceil_div(m, kColumns);
  Buffer<uint32_t> blocks = allocate<uint32_t>(row_blocks * kRows * pairs);
  if (!blocks) return -2;
  bool no_memory = false;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Buffer<uint32_t> panel = allocate<uint32_t>(pairs * kColumns);
    if (!panel) {
#pragma omp atomic write
      no_memory = true;
    }
    const int64_t at_once = left_kind == 2 ? kLanes : 1;  // blocks
#pragma omp for
    for (int64_t b = 0; b < row_blocks; b += at_once) {
      uint32_t* to = blocks.get() + b * kRows * pairs;
      const int64_t start = b * kRows;
      if (left_kind == 0)
        pack_rows(static_cast<const uint16_t*>(left) + start * left_stride, n - start, k, left_stride, to);
      else if (left_kind == 1)
        pack_wide_rows(static_cast<const float*>(left) + start * left_stride, n - start, k, left_stride, to);
      else
        pack_wide_columns(static_cast<const float*>(left) + start, n - start < 96 ? n - start : 96, k, left_stride, to);
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < panels * groups; ++task) {
      if (!panel) continue;
      alignas(64) float tile[kRows * kColumns];
      const int64_t first = task % panels * kColumns, columns = m - first < kColumns ? m - first : kColumns;
      const int64_t start = task / panels * kTaskRows, end = start + kTaskRows < n ? start + kTaskRows : n;
      if (right_kind == 0)
        pack_panel(right + first * right_stride, columns, k, right_stride, panel.get());
      else
        pack_columns(right + first, columns, k, right_stride, panel.get());
      for (int64_t r = start; r < end; r += kRows) {
        multiply(blocks.get() + r * pairs, panel.get(), pairs, tile);
        put(tile, end - r < kRows ? end - r : kRows, columns, add, out + r * out_stride + first, out_stride);
      }
    }
  }
  return no_memory ? -2 : 0;
#else
  (void)left, (void)left_kind, (void)n, (void)k, (void)left_stride, (void)right, (void)right_kind, (void)m;
  (void)right_stride, (void)out, (void)out_stride, (void)add, (void)threads;
  return -1;
#endif
}
