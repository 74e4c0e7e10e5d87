// A product of two bfloat16 matrices with float32 sums, which torch has not on CPUs, in bf16_product's blocks.
// Meaning: multiply_bf16 in linear_logp_native.py.

#include <algorithm>

#include "bf16_product.h"
#include "isa.h"

#if HAVE_BF16

namespace {

constexpr int64_t kTaskRows = 1032;  // a task is so many rows, or fewer where threads are many, by some panels

struct Right {
  const uint16_t* data;
  int64_t stride;   // from one of its rows to the next, or from one column
  bool rows_dense;  // which of them

  void pack(const Product& product, int64_t column, int64_t columns, int64_t m, uint32_t* panel) const {
    if (rows_dense)
      product.pack_panel_across(data + column, columns, m, stride, panel);
    else
      product.pack_panel(data + column * stride, columns, m, stride, panel);
  }
};

struct Sums {
  void* data;
  int64_t stride;
  bool half;            // bfloat16
  bool adds;            // to what is there,
  const float* shrink;  // times this by row, or null
};

TARGET void put(const float* tile, int64_t first, int64_t rows, int64_t column, int64_t columns, const Sums& out) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (first + r) * out.stride + column;
    const __m512 shrink = _mm512_set1_ps(out.shrink ? out.shrink[first + r] : 1.0f);
    for (int g = 0; g < kGroups; ++g) {
      const int64_t left = columns - g * kLanes;
      if (left <= 0) break;
      const __mmask16 inside = left >= kLanes ? 0xffff : __mmask16((1u << left) - 1);
      __m512 x = _mm512_load_ps(tile + r * kColumns + g * kLanes);
      if (out.half) {
        uint16_t* to = static_cast<uint16_t*>(out.data) + at + g * kLanes;
        _mm256_mask_storeu_epi16(to, inside, (__m256i)_mm512_cvtneps_pbh(x));
        continue;
      }
      float* to = static_cast<float*>(out.data) + at + g * kLanes;
      if (out.adds) x = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(inside, to), shrink, x);
      _mm512_mask_storeu_ps(to, inside, x);
    }
  }
}

void prefetch(const Sums& out, int64_t first, int64_t end, int64_t column) {
  for (int64_t r = first; r < end; ++r)
    for (int g = 0; g < kColumns; g += kLanes)
      _mm_prefetch((const char*)(static_cast<float*>(out.data) + r * out.stride + column + g), _MM_HINT_T0);
}

// 0, or -2 without memory.
int multiply(const Product& product, Left& left, const Right& right, int64_t n, int64_t m, int64_t c, const Sums& out,
             int threads) {
  const int64_t rows = product.rows, pairs = pairs_of(m), row_blocks = left.blocks();
  const int64_t at_once = product.panels, strips = ceil_div(c, at_once * kColumns);
  const int64_t enough = std::min(row_blocks, ceil_div(8 * threads, std::max<int64_t>(strips, 1)));
  const int64_t groups = std::max({ceil_div(n, kTaskRows), enough, int64_t(1)});
  const int64_t task_rows = ceil_div(row_blocks, groups) * rows;
  bool no_memory = left.no_memory();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Buffer<uint32_t> panels = allocate<uint32_t>(at_once * pairs * kColumns);
    if (!panels) {
#pragma omp atomic write
      no_memory = true;
    }
#pragma omp for
    for (int64_t b = 0; b < row_blocks; ++b)
      if (!left.no_memory()) left.pack(b);
    // Other threads are at other rows: two that write to one page, fresh from the system, would wait for each other.
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < strips * groups; ++task) {
      if (!panels || left.no_memory()) continue;
      alignas(64) float tile[kMostRows * kColumns];
      const int64_t first = task / groups * at_once * kColumns, last = std::min(c, first + at_once * kColumns);
      const int64_t start = task % groups * task_rows, end = std::min(n, start + task_rows);
      product.begin();
      uint32_t* panel = panels.get();
      for (int64_t v = first; v < last; v += kColumns, panel += pairs * kColumns)
        right.pack(product, v, last - v, m, panel);
      for (int64_t r = start; r < end; r += rows) {
        panel = panels.get();
        for (int64_t v = first; v < last; v += kColumns, panel += pairs * kColumns) {
          if (out.adds) prefetch(out, r, std::min(r + rows, end), v);
          product.multiply(left.from(r), panel, m, tile);
          put(tile, r, std::min(rows, end - r), v, last - v, out);
        }
      }
      product.end();
    }
  }
  return no_memory ? -2 : 0;
}

}  // namespace

#endif

// Whether this is the fastest product here of right operands whose rows are dense, such as those of a gradient; not where
// another is, or where it was not measured.
EXPORT int cream_bf16_across_serves() {
#if HAVE_BF16
  return bf16_product(1) && amd_family() >= 26 ? 1 : 0;
#else
  return 0;
#endif
}

// Returns 0, or -1 where there is no bf16_product of this isa for operands that lie so, or -2 without memory.
EXPORT int cream_bf16_multiply(
    const uint16_t* left,  // (n, m) bfloat16, rows left_stride elements apart, columns dense
    int64_t left_stride,
    const uint16_t* right,  // (m, c) bfloat16, its rows and columns so many elements apart, one of them 1
    int64_t right_row,
    int64_t right_column,
    int64_t n,
    int64_t m,
    int64_t c,
    void* out,  // (n, c), columns dense
    int out_is_bf16,
    int64_t out_stride,
    int adds,             // to what out holds, if that is float32,
    const float* shrink,  // times this (n,), or null
    int threads,
    int isa
) {
#if HAVE_BF16
  const Product* product = bf16_product(isa);
  const bool rows_dense = right_row != 1;
  if (!product || (rows_dense && !product->pack_panel_across)) return -1;
  Left rows(*product, left, n, m, left_stride);
  const Right columns = {right, rows_dense ? right_row : right_column, rows_dense};
  return multiply(*product, rows, columns, n, m, c, {out, out_stride, out_is_bf16 != 0, adds != 0, shrink}, threads);
#else
  (void)left, (void)left_stride, (void)right, (void)right_row, (void)right_column, (void)n, (void)m, (void)c;
  (void)out, (void)out_is_bf16, (void)out_stride, (void)adds, (void)shrink, (void)threads, (void)isa;
  return -1;
#endif
}
