// Nucleus (top-p) sampling over rows of logits, without a sort.  Meaning: top_p_sample_reference in top_p.py.
//
// N rows, V vocabulary, T temperature, w = exp((l - max) / T) the weight of a token, so Z = sum w is at least 1.
// A row takes two passes over the vocabulary (maximum; weights and their sum) and then works on a few candidates,
// a set of largest logits that is known to hold the nucleus. The nucleus' last logit is found among them by a radix
// select over their bits, weighted by w, and the token by walking the nucleus in id order. Nothing depends on N, on
// the other rows or on the number of threads.
//
// The loops that matter are `omp simd`, which lets the compiler reorder just their reductions without -ffast-math;
// they are compiled for the compiler's default target, AVX2 and AVX-512, and the processor chooses.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "isa.h"
#include "scalars.h"

namespace {

constexpr int kBlock = 128;  // tokens whose maximum and weight are kept, so that later passes can step over them
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kHeavy = 1.0f / 8192;  // of the most probable token's weight; p = 0.95 seldom needs lighter ones
constexpr float kMost = std::numeric_limits<float>::max();

struct Scratch {
  std::vector<float> weight, block_max;  // (V padded), (blocks)
  std::vector<double> block_sum, bins;   // (blocks), (2048)
  std::vector<int32_t> ids, subset;      // candidates in id order; those that share the selected leading bits
  std::vector<uint32_t> keys;            // their logits' bits, in an order that unsigned comparison respects
};

// `ordered` for unsigned comparison, and one key for -0 and +0, which are the same logit.
INLINE uint32_t order_key(float x) { return uint32_t(ordered(x + 0.0f)) ^ 0x80000000u; }

// 2^y for y <= 0, and 0 below the normal numbers and for NaN; relative error 1e-7.
INLINE float exp2_nonpositive(float y) {
  const bool normal = y > -126.0f;
  y = normal ? y : -126.0f;
  const float n = (y + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const float f = y - n;
  float p = f * 1.535335886e-04f + 1.339887446e-03f;
  p = p * f + 9.618437370e-03f;
  p = p * f + 5.550332471e-02f;
  p = p * f + 2.402264791e-01f;
  p = p * f + 6.931472029e-01f;
  p = p * f + 1.0f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  memcpy(&power, &bits, 4);
  return normal ? p * power : 0.0f;
}

// The logit of the nucleus' last token, as a key, and how many tokens with just that logit belong to it.
INLINE void select(Scratch& s, int32_t count, double target, uint32_t& last_key, int32_t& ties) {
  const float* weight = s.weight.data();
  double* bins = s.bins.data();
  int32_t* subset = s.subset.data();
  for (int32_t i = 0; i < count; ++i) subset[i] = i;
  double above = 0;
  last_key = 0;
  for (int shift : {21, 10, 0}) {
    const int width = shift == 0 ? 10 : 11;
    const uint32_t mask = (1u << width) - 1;
    memset(bins, 0, sizeof(double) << width);
    for (int32_t i = 0; i < count; ++i) bins[(s.keys[subset[i]] >> shift) & mask] += weight[s.ids[subset[i]]];
    int64_t chosen = -1;
    double above_chosen = above;
    for (int64_t b = mask; b >= 0; --b) {
      if (bins[b] == 0) continue;
      chosen = b;
      above_chosen = above;
      if (above + bins[b] >= target) break;
      above += bins[b];
    }
    above = above_chosen;  // where rounding kept the target out of reach, the lowest bin is the last
    last_key |= uint32_t(chosen) << shift;
    int32_t kept = 0;
    for (int32_t i = 0; i < count; ++i) {
      subset[kept] = subset[i];
      kept += ((s.keys[subset[i]] >> shift) & mask) == uint32_t(chosen);
    }
    count = kept;
  }
  const double w = weight[s.ids[subset[0]]];
  for (ties = 1, above += w; above < target && ties < count; ++ties) above += w;
}

// The token, or -1 for a row that has no distribution (a NaN, a +inf, or nothing above -inf).
template <typename X>
INLINE int64_t sample_row(const X* row, int64_t V, double uniform, double temperature, double top_p, Scratch& s) {
  const int64_t blocks = (V + kBlock - 1) / kBlock;
  const int64_t whole = V / kBlock;
  X tail[kBlock];  // the last, incomplete block, filled up with -inf
  for (int64_t i = 0; i < kBlock; ++i) {
    const uint32_t bits = sizeof(X) == 2 ? 0xff80u : 0xff800000u;
    memcpy(&tail[i], &bits, sizeof(X));  // little-endian, as everything here
    if (whole * kBlock + i < V) tail[i] = row[whole * kBlock + i];
  }
  auto block = [&](int64_t b) __attribute__((always_inline)) { return b < whole ? row + b * kBlock : tail; };

  int32_t lowest = ordered(kInf), highest = ordered(-kInf);
  for (int64_t b = 0; b < blocks; ++b) {
    const X* p = block(b);
    int32_t most = ordered(-kInf);
#pragma omp simd reduction(max : most) reduction(min : lowest)
    for (int i = 0; i < kBlock; ++i) {
      const int32_t x = ordered(to_float(p[i]));
      lowest = x < lowest ? x : lowest;
      most = x > most ? x : most;
    }
    s.block_max[b] = from_ordered(most);
    highest = most > highest ? most : highest;
  }
  // NaNs lie beyond the infinities, above or below by their sign bit.
  if (lowest < ordered(-kInf) || highest >= ordered(kInf) || highest == ordered(-kInf)) return -1;
  const float max = from_ordered(highest);

  if (temperature == 0) {
    for (int64_t b = 0; b < blocks; ++b) {
      if (s.block_max[b] != max) continue;
      for (int64_t i = b * kBlock; i < V; ++i)
        if (to_float(row[i]) == max) return i;
    }
  }

  const double exact_scale = 1.4426950408889634 / temperature;  // log2(e) / T
  const float scale = exact_scale < kMost ? float(exact_scale) : kMost;
  double Z = 0, heavy = 0;  // heavy: the mass of tokens not lighter than kHeavy
  for (int64_t b = 0; b < blocks; ++b) {
    float* w = &s.weight[b * kBlock];
    const X* p = block(b);
    float sum = 0, sum_heavy = 0;
#pragma omp simd reduction(+ : sum, sum_heavy)
    for (int i = 0; i < kBlock; ++i) {
      const float e = exp2_nonpositive((to_float(p[i]) - max) * scale);
      w[i] = e;
      sum += e;
      sum_heavy += e >= kHeavy ? e : 0.0f;
    }
    s.block_sum[b] = sum;
    Z += sum;
    heavy += sum_heavy;
  }

  if (top_p >= 1) {
    const double wanted = uniform * Z;
    double below = 0;
    int64_t last = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      if (below + s.block_sum[b] > wanted || b == blocks - 1) {
        double mass = below;
        for (int64_t i = b * kBlock; i < V && i < (b + 1) * kBlock; ++i) {
          if (s.weight[i] == 0) continue;
          last = i;
          mass += s.weight[i];
          if (mass > wanted) return i;
        }
        if (below + s.block_sum[b] > wanted) return last;  // the block's sum rounded the other way
      }
      below += s.block_sum[b];
    }
    return last;
  }

  // Lighter tokens are out: the heavy ones alone hold the nucleus, or else those lighter than (1 - top_p) Z / V weigh
  // less than (1 - top_p) Z together. 1e-3 in log2 covers every rounding. Logits are compared, so that ties stay ties.
  const double lightest = heavy * (1 - 1e-6) >= top_p * Z ? kHeavy : (1 - top_p) * Z / double(V);
  float least = float(max + (std::log2(lightest) - 1e-3) / scale);
  if (!(least > -kMost)) least = -kMost;
  int32_t count = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    if (s.block_max[b] < least) continue;
    for (int64_t i = b * kBlock; i < V && i < (b + 1) * kBlock; ++i) {
      s.ids[count] = int32_t(i);
      s.keys[count] = order_key(to_float(row[i]));
      count += to_float(row[i]) >= least;
    }
  }
  uint32_t last_key;
  int32_t ties;
  select(s, count, top_p * Z, last_key, ties);

  int32_t kept = 0;
  double mass = 0;
  for (int32_t i = 0; i < count; ++i) {
    if (s.keys[i] < last_key || (s.keys[i] == last_key && ties-- <= 0)) continue;
    s.ids[kept++] = s.ids[i];
    mass += s.weight[s.ids[i]];
  }
  const double wanted = uniform * mass;
  mass = 0;
  for (int32_t i = 0; i < kept; ++i) {
    mass += s.weight[s.ids[i]];
    if (mass > wanted) return s.ids[i];
  }
  return s.ids[kept - 1];
}

typedef int64_t Row(const void*, int is_bf16, int64_t, double, double, double, Scratch&);

#define ROW(name, target)                                                                                     \
  target int64_t name(const void* row, int is_bf16, int64_t V, double uniform, double T, double p, Scratch& s) { \
    return is_bf16 ? sample_row(static_cast<const uint16_t*>(row), V, uniform, T, p, s)                        \
                   : sample_row(static_cast<const float*>(row), V, uniform, T, p, s);                          \
  }

EACH_ISA(ROW, row)

}  // namespace

EXPORT int cream_native_abi() { return 9; }  // native.py refuses a library of another number

EXPORT int cream_top_p_isa() {
  for (int isa : {2, 1})
    if (FOR_ISA(row, isa)) return isa;
  return 0;
}

// Returns N, or the first row that has no distribution, or -1 for an isa that is not there, or -2 without memory.
EXPORT int64_t cream_top_p_sample(
    const void* logits,     // (N, V) float32, or bfloat16 as uint16; rows row_stride elements apart, columns dense
    int is_bf16,
    int64_t N,
    int64_t V,
    int64_t row_stride,
    const double* uniform,  // (N,) in [0, 1)
    double temperature,     // 0 takes the largest logit
    double top_p,           // in [0, 1]
    int64_t* tokens,        // (N,) out
    int threads,
    int isa                 // from cream_top_p_isa, or another one to test it
) {
  Row* row = FOR_ISA(row, isa);
  if (!row) return -1;
  const int64_t bytes = is_bf16 ? 2 : 4;
  const int64_t blocks = (V + kBlock - 1) / kBlock;
  bool no_memory = false;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && N > 1)
  for (int64_t n = 0; n < N; ++n) {
    static thread_local Scratch s;
    try {
      s.weight.resize(blocks * kBlock);
      s.block_max.resize(blocks);
      s.block_sum.resize(blocks);
      s.bins.resize(2048);
      s.ids.resize(V + 1);  // one is written past those that count
      s.keys.resize(V + 1);
      s.subset.resize(V);
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      no_memory = true;
      continue;
    }
    tokens[n] = row(static_cast<const char*>(logits) + n * row_stride * bytes, is_bf16, V, uniform[n], temperature,
                    top_p, s);
  }
  if (no_memory) return -2;
  for (int64_t n = 0; n < N; ++n)
    if (tokens[n] < 0) return n;
  return N;
}
