// A tile of logits, hidden @ weight.T of bfloat16 kept in float32, which torch has not on CPUs.
// Meaning: logits_tile in linear_logp_native.py.

#include <algorithm>

#include "bf16_product.h"

#if HAVE_BF16

namespace {

constexpr int64_t kTaskRows = 1032;  // a task is so many rows, or fewer where threads are many, by some panels

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
  const int64_t at_once = product->panels, strips = ceil_div(c, at_once * kColumns);
  const int64_t enough = std::min(row_blocks, ceil_div(4 * threads, std::max<int64_t>(strips, 1)));
  const int64_t groups = std::max({ceil_div(n, kTaskRows), enough, int64_t(1)});
  const int64_t task_rows = ceil_div(row_blocks, groups) * rows;
  Buffer<uint32_t> blocks = allocate<uint32_t>(row_blocks * rows * pairs);
  if (!blocks) return -2;
  bool no_memory = false;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Buffer<uint32_t> panels = allocate<uint32_t>(at_once * pairs * kColumns);
    if (!panels) {
#pragma omp atomic write
      no_memory = true;
    }
#pragma omp for
    for (int64_t b = 0; b < row_blocks; ++b)
      product->pack_rows(hidden + b * rows * hidden_stride, n - b * rows, D, hidden_stride,
                         blocks.get() + b * rows * pairs);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < strips * groups; ++task) {
      if (!panels) continue;
      alignas(64) float tile[kMostRows * kColumns];
      const int64_t first = task % strips * at_once * kColumns, last = std::min(c, first + at_once * kColumns);
      const int64_t start = task / strips * task_rows, end = std::min(n, start + task_rows);
      product->begin();
      uint32_t* panel = panels.get();
      for (int64_t v = first; v < last; v += kColumns, panel += pairs * kColumns)
        product->pack_panel(weight + v * weight_stride, last - v, D, weight_stride, panel);
      for (int64_t r = start; r < end; r += rows) {
        panel = panels.get();
        for (int64_t v = first; v < last; v += kColumns, panel += pairs * kColumns) {
          product->multiply(blocks.get() + r * pairs, panel, pairs, tile);
          put(tile, std::min(rows, end - r), last - v, out + r * out_stride + v, out_stride);
        }
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
