// hidden @ weight.T of bfloat16 on CPUs that multiply it in hardware: what linear_logp.cpp, bf16_multiply.cpp and
// transpose.cpp share.
//
// D is the summed index, in pairs of neighbours, 16 pairs a step. A product is made of blocks of some rows of hidden by
// panels of 64 rows of weight. Panels are packed first, in the order in which they will be used; so is hidden for AMX.

#pragma once

#include <cstdint>
#include <cstring>

#include "buffer.h"

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

constexpr int kLanes = 16, kGroups = 4, kColumns = kGroups * kLanes;  // of a panel
constexpr int kStep = 16;                                             // pairs
constexpr int kMostRows = 32;                                         // of a block

// Rows of hidden as a product takes them: count of them stride elements apart or, where it packs, a block.
struct Rows {
  const uint16_t* data;
  int64_t stride, count;
  const uint32_t* block;
};

// One way to multiply. The packers put zeros where there are no more rows or no more of D.
struct Product {
  int64_t rows;    // of a block
  int64_t panels;  // that lie in the second level cache together, so that a block is read once for all of them
  // The first `rows` of count rows, stride elements apart, as a block of rows * pairs. Null: taken as they lie.
  void (*pack_rows)(const uint16_t* rows, int64_t count, int64_t D, int64_t stride, uint32_t* out);
  // The first 64 of count rows as a panel of 64 * pairs.
  void (*pack_panel)(const uint16_t* rows, int64_t count, int64_t D, int64_t stride, uint32_t* out);
  // The same of the first 64 of count columns, whose D rows are stride elements apart. Null: there is none.
  void (*pack_panel_across)(const uint16_t* columns, int64_t count, int64_t D, int64_t stride, uint32_t* out);
  // A tile (rows, 64) of float32 sums over all of D. Of rows that are not there, anything.
  void (*multiply)(const Rows& hidden, const uint32_t* panel, int64_t D, float* tile);
  void (*begin)();  // whatever a thread needs before it multiplies,
  void (*end)();    // and gives back when it has
};

// The product of this number, or null where the processor, the system or the build has none: 1 AVX512-BF16, 2 AMX.
const Product* bf16_product(int isa);

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

inline int64_t pairs_of(int64_t D) { return ceil_div(D, 2 * kStep) * kStep; }

// hidden (n, D) for a product: packed block by block, if that is how it is taken.
class Left {
 public:
  Left(const Product& product, const uint16_t* data, int64_t n, int64_t D, int64_t stride)
      : product_(product), data_(data), n_(n), D_(D), stride_(stride) {
    if (product.pack_rows) packed_ = allocate<uint32_t>(blocks() * product.rows * pairs_of(D));
  }
  bool no_memory() const { return product_.pack_rows && !packed_; }
  int64_t blocks() const { return ceil_div(n_, product_.rows); }
  void pack(int64_t block) {
    const int64_t row = block * product_.rows;
    if (product_.pack_rows)
      product_.pack_rows(data_ + row * stride_, n_ - row, D_, stride_, packed_.get() + row * pairs_of(D_));
  }
  // The block that begins with this row.
  Rows from(int64_t row) const {
    return {data_ + row * stride_, stride_, n_ - row, packed_ ? packed_.get() + row * pairs_of(D_) : nullptr};
  }

 private:
  const Product& product_;
  const uint16_t* data_;
  int64_t n_, D_, stride_;
  Buffer<uint32_t> packed_;
};

#endif
