// The two products of bf16_product.h.
//
// AVX512-BF16: blocks of 6 rows, which are read where they lie, and whose 24 vectors of sums stay in registers. On Zen 5
// the loop is as fast as of packed rows. On Zen 4 packed ones kept the multiplier 97% busy from D = 576 to 4096, although a
// panel of 4096 comes from the second level cache: panels cut along D, blocks of 9 x 48, 14 x 32, 5 x 80 and 4 x 96, and
// prefetching the next panel were not faster.
//
// AMX: blocks of 32 rows, two tiles of them by two of a panel at a time. Operands lie tile after tile, 1 KB each.

#include "bf16_product.h"

#if HAVE_BF16 && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define HAVE_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#else
#define HAVE_AMX 0
#endif

#if HAVE_BF16

namespace {

// 16 pairs of a row from k on.
INLINE __m512i load_step(const uint16_t* row, int64_t k, int64_t D) {
  const int64_t left = D - 2 * k;
  return _mm512_maskz_loadu_epi16(left >= 32 ? 0xffffffffu : (1u << left) - 1, row + 2 * k);
}

// The first 64 rows: pair k of the row g * 16 + i at out[g / 2 * half + g % 2 * group + k / 16 * step + k % 16 * pair + i].
INLINE void pack_columns(const uint16_t* rows, int64_t count, int64_t D, int64_t stride, uint32_t* out, int64_t half,
                         int64_t group, int64_t step, int64_t pair) {
  for (int g = 0; g < kGroups; ++g) {
    for (int64_t k = 0; k < pairs_of(D); k += kStep) {
      __m512i x[16];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t row = g * kLanes + i;
        x[i] = row < count ? load_step(rows + row * stride, k, D) : _mm512_setzero_si512();
      }
      transpose(x);
      uint32_t* to = out + g / 2 * half + g % 2 * group + k / kStep * step;
      for (int i = 0; i < kStep; ++i) _mm512_store_si512(to + i * pair, x[i]);
    }
  }
}

void nothing() {}

namespace avx512 {

constexpr int kRows = 6;
constexpr int64_t kStretch = 96;  // pairs in one running sum
constexpr int64_t kAhead = 64;    // rows

// [pair][row of weight]
TARGET void pack_panel(const uint16_t* rows, int64_t count, int64_t D, int64_t stride, uint32_t* out) {
  pack_columns(rows, count, D, stride, out, 2 * kLanes, kLanes, kStep * kColumns, kColumns);
}

// The first 32 of count numbers of two rows, in pairs of the same column; zeros for a row that is not there.
TARGET INLINE void interleave(const uint16_t* upper, const uint16_t* lower, int64_t count, uint32_t* out) {
  const __mmask32 inside = count >= 32 ? 0xffffffffu : count <= 0 ? 0 : (1u << count) - 1;
  const __m512i a = upper ? _mm512_maskz_loadu_epi16(inside, upper) : _mm512_setzero_si512();
  const __m512i b = lower ? _mm512_maskz_loadu_epi16(inside, lower) : _mm512_setzero_si512();
  const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);  // in each quarter
  const __m512i x = _mm512_shuffle_i32x4(low, high, 0x44), y = _mm512_shuffle_i32x4(low, high, 0xee);
  _mm512_store_si512(out, _mm512_shuffle_i32x4(x, x, 0xd8));
  _mm512_store_si512(out + kLanes, _mm512_shuffle_i32x4(y, y, 0xd8));
}

// Prefetched: rows are pages apart, and the processor does not guess the next one.
TARGET void pack_panel_across(const uint16_t* columns, int64_t count, int64_t D, int64_t stride, uint32_t* out) {
  for (int64_t k = 0; k < 2 * pairs_of(D); k += 2, out += kColumns) {
    const uint16_t* upper = k < D ? columns + k * stride : nullptr;
    const uint16_t* lower = k + 1 < D ? upper + stride : nullptr;
    const uint16_t* later = columns + (k + kAhead) * stride;
    for (int g = 0; g < kColumns; g += 2 * kLanes) {
      _mm_prefetch((const char*)(later + g), _MM_HINT_T0);
      _mm_prefetch((const char*)(later + stride + g), _MM_HINT_T0);
      interleave(upper ? upper + g : nullptr, lower ? lower + g : nullptr, count - g, out + g);
    }
  }
}

// In stretches of D whose sums are added up. One running sum over D = 4096 would be wrong by 1e-5 where these are by
// 2e-6; they cost 1% of the time.
TARGET void multiply(const Rows& hidden, const uint32_t* panel, int64_t D, float* tile) {
  const uint16_t* rows[kRows];  // the last one again for those that are not there
  for (int r = 0; r < kRows; ++r) rows[r] = hidden.data + (r < hidden.count ? r : hidden.count - 1) * hidden.stride;
  const int64_t pairs = D / 2, stretches = ceil_div(pairs, kStretch);
  const int64_t length = stretches ? ceil_div(pairs, stretches) : 1;
  for (int64_t start = 0; start < pairs; start += length) {
    const int64_t end = start + length < pairs ? start + length : pairs;
    __m512 sum[kRows][kGroups];
    for (int r = 0; r < kRows; ++r)
      for (int g = 0; g < kGroups; ++g) sum[r][g] = _mm512_setzero_ps();
    for (int64_t k = start; k < end; ++k) {
      __m512i columns[kGroups];
      for (int g = 0; g < kGroups; ++g) columns[g] = _mm512_load_si512(panel + k * kColumns + g * kLanes);
      for (int r = 0; r < kRows; ++r) {
        int32_t pair;
        memcpy(&pair, rows[r] + 2 * k, 4);
        const __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
        for (int g = 0; g < kGroups; ++g) sum[r][g] = _mm512_dpbf16_ps(sum[r][g], row, (__m512bh)columns[g]);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int g = 0; g < kGroups; ++g) {
        float* out = tile + r * kColumns + g * kLanes;
        _mm512_store_ps(out, start ? _mm512_add_ps(_mm512_load_ps(out), sum[r][g]) : sum[r][g]);
      }
  }
  for (int r = 0; D % 2 && r < kRows; ++r)  // the last number by itself: little-endian, the other half is zero
    for (int g = 0; g < kGroups; ++g) {
      float* out = tile + r * kColumns + g * kLanes;
      const __m512bh row = (__m512bh)_mm512_set1_epi32(rows[r][D - 1]);
      const __m512bh columns = (__m512bh)_mm512_load_si512(panel + pairs * kColumns + g * kLanes);
      _mm512_store_ps(out, _mm512_dpbf16_ps(pairs ? _mm512_load_ps(out) : _mm512_setzero_ps(), row, columns));
    }
}

constexpr Product product = {kRows, 1, nullptr, pack_panel, pack_panel_across, multiply, nothing, nothing};

bool is_there() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16");
}

}  // namespace avx512

#if HAVE_AMX
namespace amx {

constexpr int kTile = 16 * 16;    // words
constexpr int64_t kStretch = 32;  // steps in one running sum

// [step][16 rows][row][pair of the step]
TARGET void pack_rows(const uint16_t* rows, int64_t count, int64_t D, int64_t stride, uint32_t* out) {
  for (int64_t k = 0; k < pairs_of(D); k += kStep)
    for (int r = 0; r < kMostRows; ++r, out += kStep)
      _mm512_store_si512(out, r < count ? load_step(rows + r * stride, k, D) : _mm512_setzero_si512());
}

// [32 rows of weight][step][16 of them][pair of the step][row]
TARGET void pack_panel(const uint16_t* rows, int64_t count, int64_t D, int64_t stride, uint32_t* out) {
  pack_columns(rows, count, D, stride, out, 2 * kLanes * pairs_of(D), kTile, 2 * kTile, kLanes);
}

// sums (32, 32) = block times half a panel, from one step to another.
AMX void multiply_steps(const uint32_t* block, const uint32_t* half, int64_t steps, float* sums, int64_t stride) {
  constexpr int line = kStep * sizeof(uint32_t);
  const int64_t bytes = stride * int64_t(sizeof(float));
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s, block += 2 * kTile, half += 2 * kTile) {
    for (int i = 0; i < 2 * kTile; i += kStep) _mm_prefetch((const char*)(half + 4 * kTile + i), _MM_HINT_T0);
    _tile_loadd(4, block, line);
    _tile_loadd(6, half, line);
    _tile_loadd(5, block + kTile, line);
    _tile_loadd(7, half + kTile, line);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, bytes);
  _tile_stored(1, sums + kLanes, bytes);
  _tile_stored(2, sums + 16 * stride, bytes);
  _tile_stored(3, sums + 16 * stride + kLanes, bytes);
}

// In stretches of D too, but longer ones: a step's 16 pairs are summed by themselves. One running sum over D = 4096 is
// 1.7 times as wrong.
AMX void multiply(const Rows& hidden, const uint32_t* panel, int64_t D, float* tile) {
  const uint32_t* block = hidden.block;
  const int64_t pairs = pairs_of(D), steps = pairs / kStep;
  const int64_t stretches = ceil_div(steps, kStretch), length = ceil_div(steps, stretches);
  for (int h = 0; h < kColumns; h += 2 * kLanes, panel += 2 * kLanes * pairs) {
    for (int64_t start = 0; start < steps; start += length) {
      const int64_t count = start + length < steps ? length : steps - start, offset = start * 2 * kTile;
      if (start == 0) {
        multiply_steps(block, panel, count, tile + h, kColumns);
        continue;
      }
      alignas(64) float sums[kMostRows * 2 * kLanes];
      multiply_steps(block + offset, panel + offset, count, sums, 2 * kLanes);
      for (int r = 0; r < kMostRows; ++r)
        for (int g = 0; g < 2 * kLanes; g += kLanes) {
          float* out = tile + r * kColumns + h + g;
          _mm512_store_ps(out, _mm512_add_ps(_mm512_load_ps(out), _mm512_load_ps(sums + r * 2 * kLanes + g)));
        }
    }
  }
}

// All eight tiles are 16 rows of 64 bytes. Not _tile_loadconfig: g++ 12 takes it to read 8 bytes, and drops the rest.
AMX void begin() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("ldtilecfg %0" ::"m"(config));
}

AMX void end() { _tile_release(); }

constexpr Product product = {kMostRows, 2, pack_rows, pack_panel, nullptr, multiply, begin, end};

// A process asks Linux once for the tiles' registers, of 8 KB a thread.
bool is_there() {
  static const bool found = [] {
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    if (!avx512::is_there() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool has = (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
    return has && syscall(SYS_arch_prctl, request, tile_data) == 0;
  }();
  return found;
}

}  // namespace amx
#endif

}  // namespace

const Product* bf16_product(int isa) {
#if HAVE_AMX
  if (isa == 2) return amx::is_there() ? &amx::product : nullptr;
#endif
  return isa == 1 && avx512::is_there() ? &avx512::product : nullptr;
}

#endif

// The best of this processor, system and build, for cream_linear_logp_statistics and cream_bf16_multiply; 0: none.
EXPORT int cream_bf16_isa() {
#if HAVE_BF16
  for (int isa = 2; isa > 0; --isa)
    if (bf16_product(isa)) return isa;
#endif
  return 0;
}
