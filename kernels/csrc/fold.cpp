// One step of the online logsumexp over a tile of float32 logits, in place or rounded to bfloat16 elsewhere; all of its
// steps over rows of logits that are only read, and the gradient of those; what a tile's rows are scaled by once the
// whole is known; and a product's bfloat16 rows added into float32 ones.
// Meaning: fold_tile_, read_rows, write_gradient, scale_rows and add_rows_ in linear_logp_native.py.
//
// A row of a tile fits into the first level cache, so that its passes (maximum, exponentials and their sum)
// cost one pass over memory, where torch's cost six. The loops are `omp simd`, as in top_p.cpp, and are compiled for
// the compiler's default target, AVX2 and AVX-512; the processor chooses. Nothing depends on the number of threads.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "isa.h"
#include "scalars.h"

namespace {

constexpr float kLeast = -87.0f;  // exp below it is taken for 0: the end of float32's normal numbers

// exp(x), x <= 0; relative error 1e-7. A NaN comes out as one.
INLINE float exp_nonpositive(float x) {
  const bool gone = x < kLeast;
  x = gone ? kLeast : x;
  const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  x = x - n * 0.693359375f;
  x = x + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;  // Cephes' expf
  p = p * x + 1.3981999507e-3f;
  p = p * x + 8.3334519073e-3f;
  p = p * x + 4.1665795894e-2f;
  p = p * x + 1.6666665459e-1f;
  p = p * x + 5.0000001201e-1f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  memcpy(&power, &bits, 4);
  return gone ? 0.0f : (p * x * x + x) * power + power;
}

// x (c,) logits become exp(logit - maximum), in rounded too if it is not null; returns what the earlier tiles' sums
// shrink by.
INLINE float fold_row(float* x, uint16_t* rounded, int64_t c, int64_t own, float& maximum, float& others,
                      float& target_logit, float* moment) {
  if (uint64_t(own) < uint64_t(c)) {
    target_logit = x[own];
    x[own] = -std::numeric_limits<float>::infinity();
  }
  int32_t most = ordered(maximum);
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < c; ++i) {
    const int32_t key = ordered(x[i]);
    most = key > most ? key : most;
  }
  const float top = from_ordered(most);
  float sum = 0, first_moment = 0;
  if (moment) {
#pragma omp simd reduction(+ : sum, first_moment)
    for (int64_t i = 0; i < c; ++i) {
      const float d = x[i] - top, e = exp_nonpositive(d);
      x[i] = e;
      sum += e;
      first_moment += e * (d < kLeast ? kLeast : d);
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < c; ++i) {
      const float e = exp_nonpositive(x[i] - top);
      x[i] = e;
      sum += e;
    }
  }
  if (rounded) {
#pragma omp simd
    for (int64_t i = 0; i < c; ++i) from_float(x[i], rounded[i]);
  }
  const float fall = maximum - top, shrink = exp_nonpositive(fall);
  if (moment) *moment = shrink * (*moment + (fall < kLeast ? kLeast : fall) * others) + first_moment;
  others = others * shrink + sum;
  maximum = std::isnan(others) ? others : top;
  return shrink;
}

typedef float Row(float*, uint16_t*, int64_t, int64_t, float&, float&, float&, float*);

#define ROW(name, target)                                                                                \
  target float name(float* x, uint16_t* rounded, int64_t c, int64_t own, float& maximum, float& others, float& logit, \
                    float* moment) {                                                                     \
    return fold_row(x, rounded, c, own, maximum, others, logit, moment);                                 \
  }

EACH_ISA(ROW, row)

constexpr int64_t kPiece = 2048;  // logits of a row that are read at once: 8 KB of float32

// All of a row of logits x * factor, piece by piece.
template <typename T>
INLINE void read_row(const T* x, int64_t c, int64_t own, float factor, float& maximum, float& others,
                     float& target_logit) {
  alignas(64) float piece[kPiece];
  for (int64_t first = 0; first < c; first += kPiece) {
    const int64_t count = c - first < kPiece ? c - first : kPiece;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) piece[i] = to_float(x[first + i]) * factor;
    fold_row(piece, nullptr, count, own - first, maximum, others, target_logit, nullptr);
  }
}

typedef void Read(const void*, bool, int64_t, int64_t, int64_t, float, float&, float&, float&);

#define READ(name, target)                                                                                       \
  target void name(const void* x, bool is_bf16, int64_t at, int64_t c, int64_t own, float factor, float& maximum, \
                   float& others, float& logit) {                                                                \
    if (is_bf16)                                                                                                 \
      read_row(static_cast<const uint16_t*>(x) + at, c, own, factor, maximum, others, logit);                    \
    else                                                                                                         \
      read_row(static_cast<const float*>(x) + at, c, own, factor, maximum, others, logit);                       \
  }

EACH_ISA(READ, read)

// The gradient of a row of logits x * factor, into out, which may be x.
template <typename T>
INLINE void gradient_row(const T* x, T* out, int64_t c, int64_t own, float factor, float maximum, float at_others,
                         float at_target) {
#pragma omp simd
  for (int64_t i = 0; i < c; ++i) {
    const float d = to_float(x[i]) * factor - maximum;  // the target's alone may be above 0
    from_float(exp_nonpositive(d > 0 ? 0.0f : d) * at_others, out[i]);
  }
  if (uint64_t(own) < uint64_t(c)) from_float(at_target, out[own]);
}

typedef void Gradient(const void*, void*, bool, int64_t, int64_t, int64_t, int64_t, float, float, float, float);

#define GRADIENT(name, target)                                                                                     \
  target void name(const void* x, void* out, bool is_bf16, int64_t at, int64_t out_at, int64_t c, int64_t own,     \
                   float factor, float maximum, float at_others, float at_target) {                                \
    if (is_bf16)                                                                                                   \
      gradient_row(static_cast<const uint16_t*>(x) + at, static_cast<uint16_t*>(out) + out_at, c, own, factor,     \
                   maximum, at_others, at_target);                                                                 \
    else                                                                                                           \
      gradient_row(static_cast<const float*>(x) + at, static_cast<float*>(out) + out_at, c, own, factor, maximum, \
                   at_others, at_target);                                                                          \
  }

EACH_ISA(GRADIENT, gradient)

INLINE void scale_row(const uint16_t* x, uint16_t* out, int64_t c, float scale) {
#pragma omp simd
  for (int64_t i = 0; i < c; ++i) from_float(to_float(x[i]) * scale, out[i]);
}

typedef void Scale(const uint16_t*, uint16_t*, int64_t, float);

#define SCALE(name, target) \
  target void name(const uint16_t* x, uint16_t* out, int64_t c, float scale) { scale_row(x, out, c, scale); }

EACH_ISA(SCALE, scaled)

INLINE void add_row(float* total, const uint16_t* x, int64_t c, float shrink) {
#pragma omp simd
  for (int64_t i = 0; i < c; ++i) total[i] = total[i] * shrink + to_float(x[i]);
}

typedef void Add(float*, const uint16_t*, int64_t, float);

#define ADD(name, target) \
  target void name(float* total, const uint16_t* x, int64_t c, float shrink) { add_row(total, x, c, shrink); }

EACH_ISA(ADD, added)

}  // namespace

// Returns 0, or -1 for an isa that is not there.
EXPORT int cream_fold_tile(
    float* tile,  // (n, c) logits, rows stride elements apart, columns dense; exp(logit - maximum) out
    int64_t n,
    int64_t c,
    int64_t stride,
    const int64_t* columns,  // (n,) target less the tile's first column; outside [0, c) for most rows
    float* maximum,       // (n,) in and out, as the next three
    float* others,        // (n,)
    float* target_logit,  // (n,)
    float* moment,        // (n,) or null
    float* shrink,        // (n,) out: exp(old maximum - new maximum)
    uint16_t* rounded,    // (n, c) bfloat16 out, the same as tile's; or null
    int64_t rounded_stride,
    int threads,
    int isa               // from cream_top_p_isa, or another one to test it
) {
  Row* row = FOR_ISA(row, isa);
  if (!row) return -1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < n; ++r)
    shrink[r] = row(tile + r * stride, rounded ? rounded + r * rounded_stride : nullptr, c, columns[r], maximum[r],
                    others[r], target_logit[r], moment ? moment + r : nullptr);
  return 0;
}

// Returns 0, or -1 for an isa that is not there.
EXPORT int cream_read_rows(
    const void* logits,  // (N, V) float32 or bfloat16, rows stride elements apart, columns dense
    int is_bf16,
    int64_t V,
    int64_t stride,
    const int64_t* rows,  // (n,) which of them, or null: the first n
    int64_t n,
    const int64_t* targets,  // (n,)
    double factor,           // of the logits
    float* maximum,       // (n,) in and out, as the next two: see cream_fold_tile
    float* others,        // (n,)
    float* target_logit,  // (n,)
    int threads,
    int isa
) {
  Read* read = FOR_ISA(read, isa);
  if (!read) return -1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < n; ++r)
    read(logits, is_bf16, (rows ? rows[r] : r) * stride, V, targets[r], float(factor), maximum[r], others[r],
         target_logit[r]);
  return 0;
}

// Returns 0, or -1 for an isa that is not there.
EXPORT int cream_write_gradient(
    const void* logits,  // (N, V), as in cream_read_rows, as the next five
    int is_bf16,
    int64_t V,
    int64_t stride,
    const int64_t* rows,
    int64_t n,
    const int64_t* targets,  // (n,)
    double factor,
    const float* maximum,    // (n,), as the next two
    const float* at_others,  // of exp(logit - maximum)
    const float* at_target,  // the gradient itself
    void* out,               // (N, V), of which the rows asked for are written; may be the logits
    int64_t out_stride,
    int threads,
    int isa
) {
  Gradient* gradient = FOR_ISA(gradient, isa);
  if (!gradient) return -1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < n; ++r) {
    const int64_t row = rows ? rows[r] : r;
    gradient(logits, out, is_bf16, row * stride, row * out_stride, V, targets[r], float(factor), maximum[r],
             at_others[r], at_target[r]);
  }
  return 0;
}

// Returns 0, or -1 for an isa that is not there.
EXPORT int cream_scale_rows(
    const uint16_t* tile,  // (n, c) bfloat16, rows stride elements apart, columns dense
    int64_t n,
    int64_t c,
    int64_t stride,
    const float* scale,  // (n,)
    uint16_t* out,       // (n, c), may be the tile
    int64_t out_stride,
    int threads,
    int isa              // from cream_top_p_isa, or another one to test it
) {
  Scale* row = FOR_ISA(scaled, isa);
  if (!row) return -1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < n; ++r) row(tile + r * stride, out + r * out_stride, c, scale[r]);
  return 0;
}

// Returns 0, or -1 for an isa that is not there.
EXPORT int cream_add_rows(
    float* total,  // (n, c), rows stride elements apart, columns dense
    int64_t n,
    int64_t c,
    int64_t stride,
    const uint16_t* x,  // (n, c) bfloat16
    int64_t x_stride,
    const float* shrink,  // (n,) what total's rows are multiplied by first, or null: 1
    int threads,
    int isa               // from cream_top_p_isa, or another one to test it
) {
  Add* row = FOR_ISA(added, isa);
  if (!row) return -1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < n; ++r) row(total + r * stride, x + r * x_stride, c, shrink ? shrink[r] : 1.0f);
  return 0;
}
