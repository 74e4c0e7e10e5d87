// A tile of logits, hidden @ weight.T of bfloat16 kept in float32, which torch has not on CPUs.
// Meaning: logits_tile in linear_logp_native.py.

#include "bf16_product.h"

#if HAVE_BF16

namespace {

constexpr int64_t kTaskRows = 516;  // a task is so many rows by one panel

TARGET void put(const float* tile, int64_t rows, int64_t columns, float* out, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int g = 0; g < kGroups; ++g) {
      const int64_t left = columns - g * kLanes;
      const __mmask16 inside = left >= kLanes ? 0xffff : left <= 0 ? 0 : __mmask16((1u << left) - 1);
      _mm512_mask_storeu_ps(out + r * stride + g * kLanes, inside, _mm512_load_ps(tile + r * kColumns + g * kLanes));
    }
}

}  // namespace

#endif

// Returns 0, or -1 where there is no bf16_product of this isa, or -2 without memory.
EXPORT int cream_logits_tile(
    const uint16_t* hidden,  // (n, D) bfloat16, rows hidden_stride elements apart, columns dense
    int64_t n,
    int64_t D,
    int64_t hidden_stride,
    const uint16_t* weight,  // (c, D) bfloat16
    int64_t c,
    int64_t weight_stride,
    float* out,  // (n, c)
    int64_t out_stride,
    int threads,
    int isa
) {
#if HAVE_BF16
  const Product* product = bf16_product(isa);
  if (!product) return -1;
  const int64_t rows = product->rows, pairs = pairs_of(D), row_blocks = ceil_div(n, rows);
  const int64_t groups = ceil_div(n, kTaskRows), task_rows = ceil_div(row_blocks, groups ? groups : 1) * rows;
  const int64_t panels = ceil_div(c, kColumns);
  Buffer<uint32_t> blocks = allocate<uint32_t>(row_blocks * rows * pairs);
  if (!blocks) return -2;
  bool no_memory = false;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Buffer<uint32_t> panel = allocate<uint32_t>(pairs * kColumns);
    if (!panel) {
#pragma omp atomic write
      no_memory = true;
    }
#pragma omp for
    for (int64_t b = 0; b < row_blocks; ++b)
      product->pack_rows(hidden + b * rows * hidden_stride, n - b * rows, D, hidden_stride,
                         blocks.get() + b * rows * pairs);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < panels * groups; ++task) {
      if (!panel) continue;
      alignas(64) float tile[kMostRows * kColumns];
      const int64_t first = task % panels * kColumns, columns = c - first < kColumns ? c - first : kColumns;
      const int64_t start = task / panels * task_rows, end = start + task_rows < n ? start + task_rows : n;
      product->begin();
      product->pack_panel(weight + first * weight_stride, columns, D, weight_stride, panel.get());
      for (int64_t r = start; r < end; r += rows) {
        product->multiply(blocks.get() + r * pairs, panel.get(), pairs, tile);
        put(tile, end - r < rows ? end - r : rows, columns, out + r * out_stride + first, out_stride);
      }
      product->end();
    }
  }
  return no_memory ? -2 : 0;
#else
  (void)hidden, (void)n, (void)D, (void)hidden_stride, (void)weight, (void)c, (void)weight_stride, (void)out;
  (void)out_stride, (void)threads, (void)isa;
  return -1;
#endif
}
