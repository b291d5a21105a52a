// Products of bf16 where the processor has no instruction for them. Contract: seqfuse/widened.h
//
// Floor: the multiplications, in fp32. A task is a block of y, whose sums stay in the worker's second-level cache while
// it goes through the terms in blocks: b's is widened into stripes of two vectors once for all rows of the task, a's
// for each tile of rows. A tile's sums lie in registers; a number of a is one broadcast. Rows beyond the last are zeros
// that are multiplied and not written. Blocks do not depend on the number of threads, so neither do results.
#include "seqfuse/widened.h"

#include "cpu/deal.h"
#include "cpu/scratch.h"

namespace seqfuse {
namespace SEQFUSE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int tile_rows = 12;  // with two vectors each: the sums, b and one number of a fit the registers
#else
constexpr int tile_rows = 6;
#endif
constexpr int stripe = 2 * VL;
constexpr int64_t block_rows = 192, block_cols = 256, block_terms = 256;  // 192, 256 and 12 KB of fp32

struct Work {
  const WidenedProduct& p;
  float* sums;  // [block_rows, block_cols]
  float* b;     // [stripes][terms][stripe]
  float* a;     // [terms][tile_rows]

  void take(Scratch& s) {
    s.take(sums, block_rows * block_cols);
    s.take(b, block_cols * block_terms);
    s.take(a, block_terms * tile_rows);
  }

  void widen_b(int64_t term, int64_t terms, int64_t col, int64_t cols) const {
    for (int64_t first = 0; first < cols; first += stripe)
      for (int64_t k = 0; k < terms; k++) {
        const bf16* from = (const bf16*)p.b + (term + k) * p.b_step + col + first;
        float* to = b + (first / stripe * terms + k) * stripe;
        for (int64_t v = 0; v < stripe; v += VL) {
          const int64_t left = cols - first - v;
          store(to + v, left <= 0 ? vf{} : take_some(from + v, left));
        }
      }
  }

  static SEQFUSE_INLINE vf take_some(const bf16* from, int64_t left) {
    return seqfuse::SEQFUSE_ISA::take(from, int(left < VL ? left : VL));
  }

  void widen_a(int64_t row, int64_t rows, int64_t term, int64_t terms) const {
    const bf16* from = (const bf16*)p.a + row * p.a_row + term * p.a_term;
    if (rows < tile_rows) memset(a, 0, sizeof(float) * size_t(terms * tile_rows));
    if (p.a_row == 1 && rows == tile_rows)
      for (int64_t k = 0; k < terms; k++)
        for (int r = 0; r < tile_rows; r++) a[k * tile_rows + r] = widen(from[k * p.a_term + r]);
    else
      for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < terms; k++) a[k * tile_rows + r] = widen(from[r * p.a_row + k * p.a_term]);
  }

  static SEQFUSE_INLINE void multiply(const float* a, const float* b, int64_t terms, float* sums) {
    vf t[tile_rows][2];
#pragma GCC unroll 12
    for (int r = 0; r < tile_rows; r++)
      t[r][0] = load(sums + r * block_cols), t[r][1] = load(sums + r * block_cols + VL);
    for (int64_t k = 0; k < terms; k++) {
      const vf x = load(b + k * stripe), z = load(b + k * stripe + VL);
#pragma GCC unroll 12
      for (int r = 0; r < tile_rows; r++) {
        const vf one = splat(a[k * tile_rows + r]);
        t[r][0] = t[r][0] + one * x, t[r][1] = t[r][1] + one * z;
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < tile_rows; r++)
      store(sums + r * block_cols, t[r][0]), store(sums + r * block_cols + VL, t[r][1]);
  }

  void block(int64_t row, int64_t rows, int64_t col, int64_t cols) const {
    for (int64_t r = 0; r < ceil_div(rows, tile_rows) * tile_rows; r++) {
      float* const to = sums + r * block_cols;
      for (int64_t n = 0; n < ceil_div(cols, stripe) * stripe; n += VL) {
        const bool given = p.c && r < rows && n < cols;
        store(to + n, given ? take_some((const bf16*)p.c + (row + r) * p.c_step + col + n, cols - n) : vf{});
      }
    }
    for (int64_t term = 0; term < p.terms; term += block_terms) {
      const int64_t terms = p.terms - term < block_terms ? p.terms - term : block_terms;
      widen_b(term, terms, col, cols);
      for (int64_t r = 0; r < rows; r += tile_rows) {
        widen_a(row + r, rows - r < tile_rows ? rows - r : tile_rows, term, terms);
        for (int64_t n = 0; n < cols; n += stripe)
          multiply(a, b + n / stripe * terms * stripe, terms, sums + r * block_cols + n);
      }
    }
    for (int64_t r = 0; r < rows; r++)
      for (int64_t n = 0; n < cols; n += VL)
        give((bf16*)p.y + (row + r) * p.y_step + col + n, load(sums + r * block_cols + n),
             int(cols - n < VL ? cols - n : VL));
  }
};

}  // namespace

void widened_product(const WidenedProduct& p, const Parallel& parallel) {
  const int64_t across = ceil_div(p.cols, block_cols), down = ceil_div(p.rows, block_rows);
  deal_rows(parallel, across * down, p.terms * 1024, [&](int64_t begin, int64_t end) {
    Work work{p, nullptr, nullptr, nullptr};
    Scratch scratch;
    work.take(scratch), scratch.allocate(), work.take(scratch);
    for (int64_t task = begin; task < end; task++) {
      const int64_t row = task / across * block_rows, col = task % across * block_cols;
      work.block(row, p.rows - row < block_rows ? p.rows - row : block_rows, col,
                 p.cols - col < block_cols ? p.cols - col : block_cols);
    }
  });
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
