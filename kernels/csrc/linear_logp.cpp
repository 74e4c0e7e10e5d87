// The statistics of log softmax(hidden @ weight.T) for bfloat16 on CPUs that multiply it in hardware.
// Meaning: statistics in linear_logp_native.py; the algebra stands at the head of linear_logp.py.
//
// N rows, D hidden size, V vocabulary. Each lane keeps its own maximum and sum while a chunk of the vocabulary
// goes by. Chunks are of one size and are added up in order, so nothing depends on the number of threads, and a row not
// on any other row.

#include <cmath>
#include <limits>

#include "bf16_product.h"

#if HAVE_BF16

namespace {

constexpr int64_t kChunk = 8;        // panels whose statistics are kept apart
constexpr int64_t kTaskRows = 1536;  // and so many rows of them are one thread's at a time
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kMost = std::numeric_limits<float>::max();

// In what follows a max or min takes its second operand where that is NaN, and so hands a NaN on.

// exp(x) = 2^power * (1 + f p), |x| < 1000, from 2^f = 1 + f p, |f| <= 1/2.
INLINE __m512 split_exp(__m512 x, __m512& power, __m512& f) {
  const __m512 log2e = _mm512_set1_ps(1.44269504f);
  power = _mm512_roundscale_ps(_mm512_mul_ps(x, log2e), 8);
  f = _mm512_fmsub_ps(x, log2e, power);
  __m512 p = _mm512_set1_ps(1.535335886e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.339887446e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.618437370e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550332471e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402264791e-1f));
  return _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931472029e-1f));
}

// exp(x) for x of at most 100 and not below -200, where it is 0; relative error 1e-7 + 2e-8 |x|.
INLINE __m512 exp(__m512 x) {
  __m512 power, f;
  const __m512 p = split_exp(x, power, f);
  return _mm512_scalef_ps(_mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f)), power);
}

INLINE __m512 above_200_below(__m512 x) { return _mm512_max_ps(_mm512_set1_ps(-200.0f), x); }

// tanh(x) = (exp(2x) - 1) / (exp(2x) + 1), with no 1 taken from an exp(2x) near it; relative error 3e-7.
INLINE __m512 tanh(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 size = _mm512_min_ps(_mm512_set1_ps(20.0f), _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(2.0f)));
  __m512 power, f;
  const __m512 p = split_exp(size, power, f), rest = _mm512_mul_ps(p, f);
  const __m512 below = _mm512_add_ps(_mm512_scalef_ps(rest, power), _mm512_sub_ps(_mm512_scalef_ps(one, power), one));
  const __m512 t = _mm512_div_ps(below, _mm512_add_ps(below, _mm512_set1_ps(2.0f)));
  return _mm512_or_ps(t, _mm512_and_ps(x, _mm512_set1_ps(-0.0f)));
}

struct Squash {
  __m512 factor, ceiling;  // logit = factor * x without a ceiling, ceiling * tanh(factor * x) with one
};

template <bool CAPPED>
INLINE __m512 squash(__m512 x, const Squash& s) {
  x = _mm512_mul_ps(x, s.factor);
  return CAPPED ? _mm512_mul_ps(tanh(x), s.ceiling) : x;
}

struct Problem {
  const Product* product;
  const Left& hidden;
  int64_t N, D;
  const uint16_t* weight;
  int64_t V, stride;
  const int64_t* targets;
  const float* bias;
  float factor, ceiling;
  bool capped;
  float *target_logit, *parts;  // parts (chunks, 3, N): maximum, sum, moment
  bool want_moment;
};

// The 16 lanes' running maximum, sum of exp(z - maximum) and of exp(z - maximum) * (z - maximum), of one row.
struct Lanes {
  float maximum[kLanes], sum[kLanes], moment[kLanes];
};

// Take a tile of products into the rows' lanes.
template <bool CAPPED, bool MOMENT>
TARGET void fold(const float* tile, int64_t first, const float* bias, const __mmask16* missing, const Squash& s,
                 int64_t rows, const int64_t* targets, float* target_logit, Lanes* lanes) {
  const __m512 nothing = _mm512_set1_ps(-kInf);
  for (int64_t r = 0; r < rows; ++r, ++lanes) {
    __m512 z[kGroups];
    for (int g = 0; g < kGroups; ++g) {
      const __m512 x = _mm512_load_ps(tile + r * kColumns + g * kLanes);
      z[g] = squash<CAPPED>(_mm512_add_ps(x, _mm512_load_ps(bias + g * kLanes)), s);
      z[g] = _mm512_mask_mov_ps(z[g], missing[g], nothing);
    }
    const int64_t own = targets[r] - first;
    if (uint64_t(own) < uint64_t(kColumns)) {
      for (int g = 0; g < kGroups; ++g) {
        const __mmask16 at = own / kLanes == g ? __mmask16(__mmask16(1u << own % kLanes) & ~missing[g]) : __mmask16(0);
        _mm512_mask_compressstoreu_ps(target_logit + r, at, z[g]);
        z[g] = _mm512_mask_mov_ps(z[g], at, nothing);
      }
    }
    const __m512 old = _mm512_load_ps(lanes->maximum);
    __m512 top = old, sum = _mm512_load_ps(lanes->sum), moment = _mm512_setzero_ps();
    for (int g = 0; g < kGroups; ++g) top = _mm512_max_ps(z[g], top);
    if (MOMENT) moment = _mm512_load_ps(lanes->moment);
    if (_mm512_cmp_ps_mask(old, top, _CMP_NEQ_UQ)) {
      const __m512 fall = above_200_below(_mm512_sub_ps(old, top)), shrink = exp(fall);
      if (MOMENT) moment = _mm512_mul_ps(shrink, _mm512_fmadd_ps(fall, sum, moment));
      sum = _mm512_mul_ps(sum, shrink);
      _mm512_store_ps(lanes->maximum, top);
    }
    for (int g = 0; g < kGroups; ++g) {
      const __m512 d = above_200_below(_mm512_sub_ps(z[g], top)), e = exp(d);
      sum = _mm512_add_ps(sum, e);
      if (MOMENT) moment = _mm512_fmadd_ps(e, d, moment);
    }
    _mm512_store_ps(lanes->sum, sum);
    if (MOMENT) _mm512_store_ps(lanes->moment, moment);
  }
}

// One chunk of the vocabulary for some rows.
template <bool CAPPED, bool MOMENT>
TARGET void run_task(const Problem& p, int64_t chunk, int64_t start, int64_t end, uint32_t* panel, Lanes* lanes) {
  const int64_t rows = p.product->rows;
  const Squash s = {_mm512_set1_ps(p.factor), _mm512_set1_ps(p.ceiling)};
  alignas(64) float tile[kMostRows * kColumns], bias[kColumns];
  for (int64_t n = 0; n < end - start; ++n)
    for (int i = 0; i < kLanes; ++i) {
      lanes[n].maximum[i] = -kMost;  // as empty_statistics has it
      lanes[n].sum[i] = lanes[n].moment[i] = 0;
    }
  const int64_t last = (chunk + 1) * kChunk * kColumns;
  for (int64_t first = chunk * kChunk * kColumns; first < p.V && first < last; first += kColumns) {
    const int64_t count = p.V - first < kColumns ? p.V - first : kColumns;
    __mmask16 missing[kGroups];
    for (int g = 0; g < kGroups; ++g) {
      const int64_t inside = count - g * kLanes;
      missing[g] = inside >= kLanes ? 0 : inside <= 0 ? 0xffff : __mmask16(0xffffu << inside);
    }
    for (int i = 0; i < kColumns; ++i) bias[i] = p.bias && i < count ? p.bias[first + i] : 0;
    p.product->pack_panel(p.weight + first * p.stride, count, p.D, p.stride, panel);
    for (int64_t n = start; n < end; n += rows) {
      p.product->multiply(p.hidden.from(n), panel, p.D, tile);
      fold<CAPPED, MOMENT>(tile, first, bias, missing, s, end - n < rows ? end - n : rows, p.targets + n,
                            p.target_logit + n, lanes + (n - start));
    }
  }
  float* part = p.parts + chunk * 3 * p.N;
  for (int64_t n = start; n < end; ++n) {
    const Lanes& lane = lanes[n - start];
    const __m512 maximum = _mm512_load_ps(lane.maximum), sum = _mm512_load_ps(lane.sum);
    const float top = _mm512_reduce_max_ps(maximum);
    const __m512 fall = above_200_below(_mm512_sub_ps(maximum, _mm512_set1_ps(top))), shrink = exp(fall);
    part[n] = top;
    part[p.N + n] = _mm512_reduce_add_ps(_mm512_mul_ps(sum, shrink));
    if (MOMENT) {
      const __m512 moment = _mm512_fmadd_ps(fall, sum, _mm512_load_ps(lane.moment));
      part[2 * p.N + n] = _mm512_reduce_add_ps(_mm512_mul_ps(moment, shrink));
    }
  }
}

void run(const Problem& p, int64_t chunk, int64_t start, int64_t end, uint32_t* panel, Lanes* lanes) {
  p.product->begin();
  if (p.capped)
    (p.want_moment ? run_task<true, true> : run_task<true, false>)(p, chunk, start, end, panel, lanes);
  else
    (p.want_moment ? run_task<false, true> : run_task<false, false>)(p, chunk, start, end, panel, lanes);
  p.product->end();
}

}  // namespace

#endif

// Returns 0, or -1 where there is no bf16_product of this isa, or -2 without memory.
EXPORT int cream_linear_logp_statistics(
    const uint16_t* hidden,  // (N, D) bfloat16, rows hidden_stride elements apart, columns dense
    int64_t N,
    int64_t D,
    int64_t hidden_stride,
    const uint16_t* weight,  // (V, D) bfloat16
    int64_t V,
    int64_t weight_stride,
    const int64_t* targets,  // (N,)
    const float* bias,       // (V,) or null
    double factor,   // logit = factor * product,
    double ceiling,  // or where this is above 0 ceiling * tanh(factor * product)
    float* maximum,       // (N,) out, over the other tokens
    float* others,        // (N,) out, their sum of exp(z - maximum)
    float* target_logit,  // (N,) out, NaN for a target outside [0, V)
    float* moment,        // (N,) out, the others' sum of exp(z - maximum) * (z - maximum); null: not wanted
    int threads,
    int isa
) {
#if HAVE_BF16
  const Product* product = bf16_product(isa);
  if (!product) return -1;
  Left left(*product, hidden, N, D, hidden_stride);
  const int64_t chunks = ceil_div(V, kChunk * kColumns), groups = ceil_div(N, kTaskRows);
  const int64_t task_rows = ceil_div(left.blocks(), groups ? groups : 1) * product->rows;
  Buffer<float> parts = allocate<float>(chunks * 3 * N);
  if (left.no_memory() || !parts) return -2;
  const Problem p = {product,
                     left,
                     N,
                     D,
                     weight,
                     V,
                     weight_stride,
                     targets,
                     bias,
                     float(factor),
                     float(ceiling),
                     ceiling > 0,
                     target_logit,
                     parts.get(),
                     moment != nullptr};
  bool no_memory = false;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Buffer<uint32_t> panel = allocate<uint32_t>(pairs_of(D) * kColumns);
    Buffer<Lanes> lanes = allocate<Lanes>(task_rows);
    if (!panel || !lanes) {
#pragma omp atomic write
      no_memory = true;
    }
#pragma omp for
    for (int64_t b = 0; b < left.blocks(); ++b) left.pack(b);
#pragma omp for
    for (int64_t n = 0; n < N; ++n) target_logit[n] = kNaN;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < chunks * groups; ++task) {
      if (!panel || !lanes) continue;
      const int64_t start = task / chunks * task_rows, end = start + task_rows < N ? start + task_rows : N;
      run(p, task % chunks, start, end, panel.get(), lanes.get());
    }
#pragma omp for
    for (int64_t n = 0; n < N; ++n) {
      double top = -kMost, sum = 0, first_moment = 0;
      for (int64_t c = 0; c < chunks; ++c) top = std::fmax(top, parts[c * 3 * N + n]);
      for (int64_t c = 0; c < chunks; ++c) {
        const float* part = parts.get() + c * 3 * N + n;
        const double fall = part[0] - top, shrink = std::exp(fall);
        sum += shrink * part[N];
        if (moment) first_moment += shrink * (part[2 * N] + fall * part[N]);
      }
      maximum[n] = std::isnan(sum) ? kNaN : float(top);
      others[n] = float(sum);
      if (moment) moment[n] = float(first_moment);
    }
  }
  return no_memory ? -2 : 0;
#else
  (void)hidden, (void)N, (void)D, (void)hidden_stride, (void)weight, (void)V, (void)weight_stride, (void)targets;
  (void)bias, (void)factor, (void)ceiling, (void)maximum, (void)others, (void)target_logit;
  (void)moment, (void)threads, (void)isa;
  return -1;
#endif
}
