// A bfloat16 matrix transposed, 32 rows by 32 columns at a time.
// Meaning: transpose in linear_logp_native.py.

#include "bf16_product.h"

#if HAVE_BF16

namespace {

constexpr int kSide = 32;
constexpr int64_t kTaskColumns = 2 * kSide;  // of x, all rows: two lines of the cache of each row

INLINE __mmask32 first(int64_t count) { return count >= 32 ? 0xffffffffu : (1u << count) - 1; }

// x (rows, columns) becomes out (columns, rows), neither more than kSide.
INLINE void transpose_square(const uint16_t* x, int64_t rows, int64_t columns, int64_t stride, uint16_t* out,
                             int64_t out_stride) {
  const __mmask32 inside = first(columns);
  __m512i upper[16], lower[16];  // of each half of the rows, pairs of columns
  for (int i = 0; i < 16; ++i) {
    upper[i] = i < rows ? _mm512_maskz_loadu_epi16(inside, x + i * stride) : _mm512_setzero_si512();
    lower[i] = i + 16 < rows ? _mm512_maskz_loadu_epi16(inside, x + (i + 16) * stride) : _mm512_setzero_si512();
  }
  transpose(upper);
  transpose(lower);
  alignas(64) static constexpr struct Even {
    uint16_t at[32];
    constexpr Even() : at() {
      for (int i = 0; i < 32; ++i) at[i] = uint16_t(2 * i);
    }
  } even;
  const __m512i evens = _mm512_load_si512(even.at), odds = _mm512_add_epi16(evens, _mm512_set1_epi16(1));
  for (int64_t j = 0; j < columns; ++j) {
    const __m512i column = _mm512_permutex2var_epi16(upper[j / 2], j % 2 ? odds : evens, lower[j / 2]);
    _mm512_mask_storeu_epi16(out + j * out_stride, first(rows), column);
  }
}

TARGET void transpose_columns(const uint16_t* x, int64_t n, int64_t columns, int64_t stride, uint16_t* out,
                              int64_t out_stride) {
  for (int64_t r = 0; r < n; r += kSide)
    for (int64_t j = 0; j < columns; j += kSide)
      transpose_square(x + r * stride + j, n - r < kSide ? n - r : kSide, columns - j < kSide ? columns - j : kSide,
                       stride, out + j * out_stride + r, out_stride);
}

}  // namespace

#endif

// Returns 0, or -1 where there is no AVX512-BF16.
EXPORT int cream_transpose(
    const uint16_t* x,  // (n, c) bfloat16, rows stride elements apart, columns dense
    int64_t n,
    int64_t c,
    int64_t stride,
    uint16_t* out,  // (c, n), rows out_stride elements apart, columns dense
    int64_t out_stride,
    int threads
) {
#if HAVE_BF16
  if (!bf16_product(1)) return -1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < ceil_div(c, kTaskColumns); ++task) {
    const int64_t begin = task * kTaskColumns, left = c - begin;
    transpose_columns(x + begin, n, left < kTaskColumns ? left : kTaskColumns, stride, out + begin * out_stride,
                      out_stride);
  }
  return 0;
#else
  (void)x, (void)n, (void)c, (void)stride, (void)out, (void)out_stride, (void)threads;
  return -1;
#endif
}
