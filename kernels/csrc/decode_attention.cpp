// Attention of one new token a row over a cache whose rows have lengths of their own.  Meaning: decode_attention in
// reference.py.
//
// A rows that are decoded, S slots of the cache, U columns of a slot, H query heads, K kv heads, G = H / K, E head size.
// A row's new key and value are written into its slot, then its columns are read once for all G query heads of a kv
// head, a block at a time: upcast, multiplied, summed in float32. The first columns are read from another slot that
// holds the same (the prompt, which several rows share), so that rows that follow each other find them in the cache of
// the processor: the cost is the traffic of the distinct columns. Nothing depends on A, on other rows or on threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "isa.h"
#include "scalars.h"

namespace {

constexpr int kBlock = 32;  // columns upcast at a time: 8 KiB at head size 64

struct Scratch {
  std::vector<float> query, block, score, sum;  // (G, E), (kBlock, E), (G, columns), (G, E)
};

struct Problem {
  const void *query, *key, *value;  // (A, H, E), (A, K, E), (A, K, E) dense
  void *keys, *values, *out;        // (S, K, U, E) dense, the same, (A, H, E) dense
  const int64_t* rows;              // (4, A): slot, slot of the shared columns, how many they are, columns in use
  int64_t A, H, K, U, E;
  float scale;  // log2(e) / sqrt(E), or whatever stands there
};

// 2^y for y <= 0, and 0 below the normal numbers; relative error 1e-7. A NaN stays one.
INLINE float exp2_nonpositive(float y) {
  const bool small = y < -126.0f;
  y = small ? -126.0f : y;
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
  return small ? 0.0f : p * power;
}

// `kE` is E where the compiler may know it, or 0.
template <typename X, int kE>
INLINE void attend(const Problem& p, int64_t row, int64_t head, Scratch& s) {
  const int64_t E = kE ? kE : p.E, G = p.H / p.K, A = p.A;
  const int64_t slot = p.rows[row], source = p.rows[A + row], shared = p.rows[2 * A + row], n = p.rows[3 * A + row];
  const int64_t own = (slot * p.K + head) * p.U * E, other = (source * p.K + head) * p.U * E;
  X* const keys = static_cast<X*>(p.keys);
  X* const values = static_cast<X*>(p.values);
  memcpy(keys + own + (n - 1) * E, static_cast<const X*>(p.key) + (row * p.K + head) * E, sizeof(X) * E);
  memcpy(values + own + (n - 1) * E, static_cast<const X*>(p.value) + (row * p.K + head) * E, sizeof(X) * E);

  const X* const q = static_cast<const X*>(p.query) + (row * p.H + head * G) * E;
  float* const query = s.query.data();
  float* const block = s.block.data();
  float* const sum = s.sum.data();
  float part[16 * kBlock];
  for (int64_t i = 0; i < G * E; ++i) query[i] = to_float(q[i]) * p.scale;

  // Columns begin, begin + 1, ... in float32, at most kBlock of them and all from one slot; how many.
  auto load = [&](const X* from, int64_t begin) __attribute__((always_inline)) {
    const int64_t end = begin < shared ? shared : n;
    const int64_t count = end - begin < kBlock ? end - begin : kBlock;
    const X* x = from + (begin < shared ? other : own) + begin * E;
    for (int64_t i = 0; i < count * E; ++i) block[i] = to_float(x[i]);
    return count;
  };

  for (int64_t begin = 0; begin < n;) {
    const int64_t count = load(keys, begin);
    for (int64_t g = 0; g < G; ++g) {
      const float* a = query + g * E;
      float* score = &s.score[g * n + begin];
      // Sums of every sixteenth product, then a tree over the sixteen: by itself the compiler adds them one by one.
      for (int64_t u = 0; u < count; ++u) {
        const float* b = block + u * E;
        float* to = part + 16 * u;
        for (int j = 0; j < 16; ++j) to[j] = 0;
        for (int64_t e = 0; e + 16 <= E; e += 16)
          for (int j = 0; j < 16; ++j) to[j] += a[e + j] * b[e + j];
        for (int64_t e = E / 16 * 16; e < E; ++e) to[e % 16] += a[e] * b[e];
      }
      for (int64_t u = 0; u < count; ++u)
        for (int j = 0; j < 8; ++j) part[16 * u + j] += part[16 * u + j + 8];
      for (int64_t u = 0; u < count; ++u)
        for (int j = 0; j < 4; ++j) part[16 * u + j] += part[16 * u + j + 4];
      for (int64_t u = 0; u < count; ++u)
        score[u] = (part[16 * u] + part[16 * u + 1]) + (part[16 * u + 2] + part[16 * u + 3]);
    }
    begin += count;
  }

  for (int64_t g = 0; g < G; ++g) {
    float* score = &s.score[g * n];
    float most = score[0], total = 0;
    for (int64_t u = 1; u < n; ++u) most = score[u] > most ? score[u] : most;
#pragma omp simd reduction(+ : total)
    for (int64_t u = 0; u < n; ++u) {
      score[u] = exp2_nonpositive(score[u] - most);
      total += score[u];
    }
    const float inverse = 1.0f / total;
    for (int64_t u = 0; u < n; ++u) score[u] *= inverse;
  }

  std::fill(sum, sum + G * E, 0.0f);
  for (int64_t begin = 0; begin < n;) {
    const int64_t count = load(values, begin);
    for (int64_t g = 0; g < G; ++g) {
      float* to = sum + g * E;
      const float* weight = &s.score[g * n + begin];
      if constexpr (kE != 0) {
        float x[kE];  // in registers
        for (int e = 0; e < kE; ++e) x[e] = to[e];
        for (int64_t u = 0; u < count; ++u)
          for (int e = 0; e < kE; ++e) x[e] += weight[u] * block[u * kE + e];
        for (int e = 0; e < kE; ++e) to[e] = x[e];
      } else {
        for (int64_t u = 0; u < count; ++u)
          for (int64_t e = 0; e < E; ++e) to[e] += weight[u] * block[u * E + e];
      }
    }
    begin += count;
  }
  X* const out = static_cast<X*>(p.out) + (row * p.H + head * G) * E;
  for (int64_t i = 0; i < G * E; ++i) from_float(sum[i], out[i]);
}

template <typename X>
INLINE void attend_sized(const Problem& p, int64_t row, int64_t head, Scratch& s) {
  if (p.E == 64) return attend<X, 64>(p, row, head, s);
  if (p.E == 128) return attend<X, 128>(p, row, head, s);
  attend<X, 0>(p, row, head, s);
}

typedef void Body(const Problem&, int is_bf16, int64_t, int64_t, Scratch&);

#define BODY(name, target)                                                                      \
  target void name(const Problem& p, int is_bf16, int64_t row, int64_t head, Scratch& s) {      \
    is_bf16 ? attend_sized<uint16_t>(p, row, head, s) : attend_sized<float>(p, row, head, s);   \
  }

EACH_ISA(BODY, body)

}  // namespace

// Returns 0, or -1 for an isa that is not there, or -2 without memory.
EXPORT int cream_decode_attention(
    const void* query,    // (A, H, E) float32, or bfloat16 as uint16, dense like all of them
    const void* key,      // (A, K, E)
    const void* value,    // (A, K, E)
    void* keys,           // (S, K, U, E), the new column is written
    void* values,         // (S, K, U, E), the same
    void* out,            // (A, H, E)
    const int64_t* rows,  // (4, A): a row's slot; a slot with the same first columns; how many; its columns with the new
    int is_bf16,
    int64_t A,
    int64_t H,
    int64_t K,
    int64_t U,
    int64_t E,
    double scale,
    int threads,
    int isa  // from cream_top_p_isa, or another one to test it
) {
  Body* body = FOR_ISA(body, isa);
  if (!body) return -1;
  const Problem p{query, key, value, keys, values, out, rows, A, H, K, U, E, float(scale * 1.4426950408889634)};
  int64_t most = 0;
  for (int64_t a = 0; a < A; ++a) most = std::max(most, rows[3 * A + a]);
  bool no_memory = false;
  // Four rows together, mostly of one prompt, on one thread; single heads where there are too few rows for that.
  const int64_t chunk = A >= 8 * threads ? 4 * K : 1;
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads) if (threads > 1 && A * K > 1)
  for (int64_t item = 0; item < A * K; ++item) {
    static thread_local Scratch s;
    const size_t heads = size_t(H / K);
    try {
      s.query.resize(heads * E);
      s.block.resize(kBlock * E);
      s.score.resize(heads * most);
      s.sum.resize(heads * E);
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      no_memory = true;
      continue;
    }
    body(p, is_bf16, item / K, item % K, s);
  }
  return no_memory ? -2 : 0;
}
