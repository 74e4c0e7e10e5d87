// Matrix products with float32 sums of float32 and bfloat16 operands, in AVX2 or AVX-512.
// Meaning: multiply in linear_logp_native.py.
//
// The summed index is cut into steps. Of each, the right operand is packed whole, in slivers of 16 or 48 columns, for
// all threads; the left one by each thread for itself, in blocks of 6 or 8 rows, as many as stay in its second level
// cache. A block's sums (6 x 16 or 8 x 48) stay in registers, and the steps' are added up in order, so no result depends
// on the number of threads. bfloat16 becomes float32 where it is packed: no wide copy is ever made.

#include <algorithm>

#include "buffer.h"
#include "isa.h"
#include "scalars.h"

#if defined(__x86_64__)
#define HAVE_AVX2 1
#include <immintrin.h>
#define TARGET __attribute__((target("avx2,fma")))
#define TARGET_512 __attribute__((target("avx512f,avx2,fma")))
#else
#define HAVE_AVX2 0
#endif

#if HAVE_AVX2

namespace {

constexpr int kLanes = 8, kWideLanes = 16;
constexpr int64_t kStep = 192;      // of the summed index at most: a longer running sum would be more wrong than MKL's
constexpr int64_t kTaskRows = 320;  // at most

struct Matrix {
  const void* data;
  int64_t row, column;  // from one to the next, elements
  bool half;            // bfloat16
};

TARGET INLINE __m256 load(const float* x) { return _mm256_loadu_ps(x); }
TARGET INLINE __m256 load(const uint16_t* x) {
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}

TARGET INLINE void transpose(__m256 x[kLanes]) {
  __m256 y[kLanes], z[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) {  // now z[i + j] holds column j of rows i to i + 3, in each half
    z[i] = _mm256_shuffle_ps(y[i], y[i + 2], 0x44);
    z[i + 1] = _mm256_shuffle_ps(y[i], y[i + 2], 0xee);
    z[i + 2] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0x44);
    z[i + 3] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    x[j] = _mm256_permute2f128_ps(z[j], z[j + 4], 0x20);
    x[j + 4] = _mm256_permute2f128_ps(z[j], z[j + 4], 0x31);
  }
}

// WIDTH lines side by side, out[k * WIDTH + i] = x[i * line + k * next]; zeros where there are no more lines.
template <int WIDTH, typename T>
TARGET void pack(const T* x, int64_t lines, int64_t count, int64_t line, int64_t next, float* out) {
  int64_t k = 0;
  if (line == 1 && lines >= WIDTH) {
    for (; k < count; ++k)
      for (int i = 0; i < WIDTH; i += WIDTH % kLanes ? 1 : kLanes) {
        if (WIDTH % kLanes)
          out[k * WIDTH + i] = to_float(x[k * next + i]);
        else
          _mm256_store_ps(out + k * WIDTH + i, load(x + k * next + i));
      }
    return;
  }
  if (next == 1) {  // where WIDTH is not whole vectors, each one but the last of all may hang over into the next
    for (; k + kLanes <= count - (WIDTH % kLanes != 0); k += kLanes)
      for (int g = 0; g < WIDTH; g += kLanes) {
        __m256 columns[kLanes];
        for (int i = 0; i < kLanes; ++i)
          columns[i] = g + i < WIDTH && g + i < lines ? load(x + (g + i) * line + k) : _mm256_setzero_ps();
        transpose(columns);
        for (int i = 0; i < kLanes; ++i) _mm256_storeu_ps(out + (k + i) * WIDTH + g, columns[i]);
      }
  }
  for (; k < count; ++k)
    for (int i = 0; i < WIDTH; ++i) out[k * WIDTH + i] = i < lines ? to_float(x[i * line + k * next]) : 0.0f;
}

// Of x's lines from first on and its numbers from k on.
template <int WIDTH>
void pack(const Matrix& x, int64_t line, int64_t next, int64_t first, int64_t lines, int64_t k, int64_t count,
          float* out) {
  const int64_t at = first * line + k * next;
  if (x.half)
    pack<WIDTH>(static_cast<const uint16_t*>(x.data) + at, lines - first, count, line, next, out);
  else
    pack<WIDTH>(static_cast<const float*>(x.data) + at, lines - first, count, line, next, out);
}

// out (kRows, kColumns), or out += where adds, a block of the left operand times a sliver of the right one.
struct Avx2 {
  static constexpr int kRows = 6, kColumns = 2 * kLanes;

  TARGET static void multiply(const float* left, const float* right, int64_t count, float* out, int64_t stride,
                              bool adds) {
    __m256 sum[kRows][2];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      sum[r][0] = sum[r][1] = _mm256_setzero_ps();
      _mm_prefetch(reinterpret_cast<const char*>(out + r * stride), _MM_HINT_T0);
    }
#pragma GCC unroll 4
    for (int64_t k = 0; k < count; ++k, left += kRows, right += kColumns) {
      const __m256 first = _mm256_load_ps(right), second = _mm256_load_ps(right + kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const __m256 x = _mm256_broadcast_ss(left + r);
        sum[r][0] = _mm256_fmadd_ps(x, first, sum[r][0]);
        sum[r][1] = _mm256_fmadd_ps(x, second, sum[r][1]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int g = 0; g < 2; ++g) {
        float* to = out + r * stride + g * kLanes;
        _mm256_storeu_ps(to, adds ? _mm256_add_ps(_mm256_loadu_ps(to), sum[r][g]) : sum[r][g]);
      }
  }
};

struct Avx512 {
  static constexpr int kVectors = 3, kRows = 8, kColumns = kVectors * kWideLanes;

  TARGET_512 static void multiply(const float* left, const float* right, int64_t count, float* out, int64_t stride,
                                  bool adds) {
    __m512 sum[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int g = 0; g < kVectors; ++g) {
        sum[r][g] = _mm512_setzero_ps();
        _mm_prefetch(reinterpret_cast<const char*>(out + r * stride + g * kWideLanes), _MM_HINT_T0);
      }
#pragma GCC unroll 4
    for (int64_t k = 0; k < count; ++k, left += kRows, right += kColumns) {
      __m512 y[kVectors];
#pragma GCC unroll 3
      for (int g = 0; g < kVectors; ++g) y[g] = _mm512_load_ps(right + g * kWideLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512 x = _mm512_set1_ps(left[r]);
#pragma GCC unroll 3
        for (int g = 0; g < kVectors; ++g) sum[r][g] = _mm512_fmadd_ps(x, y[g], sum[r][g]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
      for (int g = 0; g < kVectors; ++g) {
        float* to = out + r * stride + g * kWideLanes;
        _mm512_storeu_ps(to, adds ? _mm512_add_ps(_mm512_loadu_ps(to), sum[r][g]) : sum[r][g]);
      }
  }
};

// The same at an edge, where only some rows and columns are there.
template <typename Block>
void multiply_edge(const float* left, const float* right, int64_t count, float* out, int64_t stride, bool adds,
                   int64_t rows, int64_t columns) {
  constexpr int kColumns = Block::kColumns;
  alignas(64) float part[Block::kRows * kColumns];
  Block::multiply(left, right, count, part, kColumns, false);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < columns; ++j) {
      float& to = out[r * stride + j];
      to = part[r * kColumns + j] + (adds ? to : 0.0f);
    }
}

bool has(int isa) {
  __builtin_cpu_init();
  return (isa == 1 || (isa == 2 && __builtin_cpu_supports("avx512f"))) && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma");
}

// 0, or -2 without memory.
template <typename Block>
int multiply(const Matrix& a, const Matrix& b, int64_t n, int64_t m, int64_t c, float* out, int64_t out_stride,
             bool adds, int threads) {
  constexpr int kRows = Block::kRows, kColumns = Block::kColumns;
  const int64_t steps = std::max<int64_t>(1, ceil_div(m, kStep)), length = ceil_div(m, steps);
  const int64_t slivers = ceil_div(c, kColumns), blocks = ceil_div(n, kRows);
  // Tasks of about one size, and as many for each thread.
  const int64_t rounds = ceil_div(blocks * kRows, kTaskRows * threads);
  const int64_t tasks = std::min(blocks, rounds * threads), task_blocks = ceil_div(blocks, tasks);
  Buffer<float> slivers_of_b = allocate<float>(slivers * kColumns * length);
  if (!slivers_of_b) return -2;
  bool no_memory = false;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Buffer<float> blocks_of_a = allocate<float>(task_blocks * kRows * length);
    if (!blocks_of_a) {
#pragma omp atomic write
      no_memory = true;
    }
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t k = step * length, count = std::min(length, m - k);
      const bool sums = adds || step > 0;
#pragma omp for
      for (int64_t s = 0; s < slivers; ++s)
        pack<kColumns>(b, b.column, b.row, s * kColumns, c, k, count, slivers_of_b.get() + s * kColumns * length);
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < tasks; ++task) {
        if (!blocks_of_a) continue;
        const int64_t first = task * task_blocks, last = std::min(blocks, first + task_blocks);
        for (int64_t i = first; i < last; ++i)
          pack<kRows>(a, a.row, a.column, i * kRows, n, k, count, blocks_of_a.get() + (i - first) * kRows * length);
        for (int64_t s = 0; s < slivers; ++s)
          for (int64_t i = first; i < last; ++i) {
            const float* x = blocks_of_a.get() + (i - first) * kRows * length;
            const float* y = slivers_of_b.get() + s * kColumns * length;
            float* to = out + i * kRows * out_stride + s * kColumns;
            const int64_t rows = n - i * kRows, columns = c - s * kColumns;
            if (rows >= kRows && columns >= kColumns)
              Block::multiply(x, y, count, to, out_stride, sums);
            else
              multiply_edge<Block>(x, y, count, to, out_stride, sums, std::min<int64_t>(rows, kRows),
                            std::min<int64_t>(columns, kColumns));
          }
      }
    }
  }
  return no_memory ? -2 : 0;
}

}  // namespace

#endif

// The instruction set with which this is the fastest product here of float32 operands (half 0), or of such that are
// bfloat16 (1): 1 AVX2, 2 AVX-512; 0 where another is, or where it was not measured.
EXPORT int cream_multiply_isa(int half) {
#if HAVE_AVX2
  if (!has(1)) return 0;
  if (has(2)) return !half && amd_family() >= 26 ? 2 : 0;
  return half || amd_family() ? 1 : 0;
#else
  (void)half;
  return 0;
#endif
}

// Returns 0, or -1 where isa is not there, or -2 without memory.
EXPORT int cream_multiply(
    const void* left,  // (n, m), its rows and columns so many elements apart
    int left_is_bf16,
    int64_t left_row,
    int64_t left_column,
    const void* right,  // (m, c)
    int right_is_bf16,
    int64_t right_row,
    int64_t right_column,
    int64_t n,
    int64_t m,
    int64_t c,
    float* out,  // (n, c), columns dense
    int64_t out_stride,
    int adds,  // to what out holds
    int threads,
    int isa
) {
#if HAVE_AVX2
  if (!has(isa)) return -1;
  if (n == 0 || c == 0) return 0;
  const Matrix a = {left, left_row, left_column, left_is_bf16 != 0};
  const Matrix b = {right, right_row, right_column, right_is_bf16 != 0};
  return isa == 2 ? multiply<Avx512>(a, b, n, m, c, out, out_stride, adds != 0, threads)
                  : multiply<Avx2>(a, b, n, m, c, out, out_stride, adds != 0, threads);
#else
  (void)left, (void)left_is_bf16, (void)left_row, (void)left_column, (void)right, (void)right_is_bf16;
  (void)right_row, (void)right_column, (void)n, (void)m, (void)c, (void)out, (void)out_stride, (void)adds;
  (void)threads, (void)isa;
  return -1;
#endif
}
