// Products of matrices where the processor's library does not use its widest vectors, or has no instruction for bf16.
// Contract: seqfuse/matrix_product.h
//
// Floor: the multiplications, in fp32. A task is a block of y, whose sums stay in the worker's second-level cache while
// it goes through the terms in blocks: b's is laid out in panels of two vectors once for all rows of the task, a's in
// panels of a tile's rows for some tiles at a time. A tile's sums lie in registers; a number of a is one broadcast.
// Rows beyond the last are zeros that are multiplied and not written. A sum is one of sums over blocks of terms, so
// that its rounding grows with their number, and its order depends on nothing but the number of terms.
#include "seqfuse/matrix_product.h"

#include "cpu/deal.h"
#include "cpu/scratch.h"
#include "cpu/turn.h"

namespace seqfuse {
namespace SEQFUSE_ISA {
namespace {

// Rows of a tile: with two vectors each, the sums, b and one number of a fit the registers. A panel of a has room for
// VL.
constexpr int tile_rows = VL == 16 ? 12 : VL == 8 ? 6 : 4;
constexpr int tile_cols = 2 * VL;
constexpr int64_t group_rows = 4 * tile_rows;                             // whose numbers of a are laid out together
constexpr int64_t block_rows = 384, block_cols = 256, block_terms = 128;  // 384, 128 and 32 KB of fp32
constexpr int64_t a_panel = block_terms * VL, b_panel = block_terms * tile_cols;

// to[lane / width * panel + line * room + lane % width] = from[line * line_step + lane * lane_step], and zeros up to a
// whole panel. room: width up to whole vectors.
template <int width, class T>
void lay_out(const T* from, int64_t line_step, int64_t lane_step, int64_t lanes, int64_t lines, float* to,
             int64_t panel) {
  constexpr int most = width < VL ? width : VL, room = (width + VL - 1) / VL * VL;
  const auto lanes_from = [=](int64_t lane) {
    return int(lane >= lanes ? 0 : lanes - lane < most ? lanes - lane : most);
  };
  if (lane_step == 1) {
    for (int64_t k = 0; k < lines; k++, from += line_step, to += room)
      for (int64_t lane = 0, at = 0; lane < lanes; lane += width, at += panel)
#pragma GCC unroll 2
        for (int v = 0; v < room; v += VL) {
          const int n = lanes_from(lane + v);
          store(to + at + v, n ? take(from + lane + v, n) : vf{});
        }
    return;
  }
  for (int64_t lane = 0; lane < lanes; lane += width, to += panel)
#pragma GCC unroll 2
    for (int v = 0; v < room; v += VL) {
      const int n = lanes_from(lane + v);
      const T* at = from + (lane + v) * lane_step;
      for (int64_t k = 0; k < lines; k += VL, at += VL * line_step) {
        const int m = int(lines - k < VL ? lines - k : VL);
        vf rows[VL] = {};
        if (line_step != 1)
          for (int i = 0; i < n; i++)
            for (int l = 0; l < m; l++) rows[i][l] = widen(at[i * lane_step + l * line_step]);
        else if (n == most && m == VL)
#pragma GCC unroll 16
          for (int i = 0; i < most; i++) rows[i] = load(at + i * lane_step);
        else
          for (int i = 0; i < n; i++) rows[i] = take(at + i * lane_step, m);
        turn(rows);
        float* const square = to + k * room + v;
        if (m == VL)
#pragma GCC unroll 16
          for (int i = 0; i < VL; i++) store(square + i * room, rows[i]);
        else
          for (int i = 0; i < m; i++) store(square + i * room, rows[i]);
      }
    }
}

template <class T>
struct Work {
  const MatrixProduct& p;
  float* sums;  // [block_rows, block_cols]
  float* b;     // panels of [terms][tile_cols]
  float* a;     // panels of [terms][VL], of a group

  void take_from(Scratch& s) {
    s.take(sums, block_rows * block_cols);
    s.take(b, block_cols / tile_cols * b_panel);
    s.take(a, group_rows / tile_rows * a_panel);
  }

  static SEQFUSE_INLINE void multiply(const float* a, const float* b, int64_t terms, float* sums) {
    vf t[tile_rows][2];
#pragma GCC unroll 12
    for (int r = 0; r < tile_rows; r++) t[r][0] = t[r][1] = vf{};
    for (int64_t k = 0; k < terms; k++) {
      const vf x = load(b + k * tile_cols), z = load(b + k * tile_cols + VL);
#pragma GCC unroll 12
      for (int r = 0; r < tile_rows; r++) {
        const vf one = splat(a[k * VL + r]);
        t[r][0] = t[r][0] + one * x, t[r][1] = t[r][1] + one * z;
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < tile_rows; r++) {
      float* const to = sums + r * block_cols;
      store(to, load(to) + t[r][0]), store(to + VL, load(to + VL) + t[r][1]);
    }
  }

  void begin(int64_t row, int64_t rows, int64_t col, int64_t cols) const {
    for (int64_t r = 0; r < ceil_div(rows, tile_rows) * tile_rows; r++)
      for (int64_t n = 0; n < ceil_div(cols, tile_cols) * tile_cols; n += VL) {
        const bool given = p.c && r < rows && n < cols;
        const T* const c = (const T*)p.c + (row + r) * p.c_row + col + n;
        store(sums + r * block_cols + n, given ? take(c, int(cols - n < VL ? cols - n : VL)) : vf{});
      }
  }

  void block(int64_t row, int64_t rows, int64_t col, int64_t cols) const {
    begin(row, rows, col, cols);
    for (int64_t term = 0; term < p.terms; term += block_terms) {
      const int64_t terms = p.terms - term < block_terms ? p.terms - term : block_terms;
      const T* const right = (const T*)p.b + col * p.b_col + term * p.b_term;
      lay_out<tile_cols>(right, p.b_term, p.b_col, cols, terms, b, b_panel);
      for (int64_t g = 0; g < rows; g += group_rows) {
        const T* const left = (const T*)p.a + (row + g) * p.a_row + term * p.a_term;
        const int64_t group = rows - g < group_rows ? rows - g : group_rows;
        lay_out<tile_rows>(left, p.a_term, p.a_row, group, terms, a, a_panel);
        for (int64_t n = 0; n < cols; n += tile_cols)
          for (int64_t r = 0; r < group; r += tile_rows)
            multiply(a + r / tile_rows * a_panel, b + n / tile_cols * b_panel, terms, sums + (g + r) * block_cols + n);
      }
    }
    for (int64_t r = 0; r < rows; r++)
      for (int64_t n = 0; n < cols; n += VL)
        give((T*)p.y + (row + r) * p.y_row + col + n, load(sums + r * block_cols + n),
             int(cols - n < VL ? cols - n : VL));
  }
};

// How long a part is when `size` is cut into equal parts of whole `unit`s, none longer than `most`, at least `parts`.
int64_t part_of(int64_t size, int64_t unit, int64_t most, int64_t parts) {
  const int64_t least = ceil_div(size, most);
  return ceil_div(ceil_div(size, parts > least ? parts : least), unit) * unit;
}

template <class T>
void product(const MatrixProduct& p, const Parallel& parallel) {
  const int64_t across = ceil_div(p.cols, block_cols), each = part_of(p.cols, tile_cols, block_cols, across);
  const int64_t rows_each = part_of(p.rows, tile_rows, block_rows, ceil_div(2 * parallel.threads, across));
  const int64_t down = ceil_div(p.rows, rows_each);
  deal_rows(parallel, across * down, p.terms * 1024, [&](int64_t begin, int64_t end) {
    Work<T> work{p, nullptr, nullptr, nullptr};
    Scratch scratch;
    work.take_from(scratch), scratch.allocate(), work.take_from(scratch);
    for (int64_t task = begin; task < end; task++) {
      const int64_t row = task / across * rows_each, col = task % across * each;
      work.block(row, p.rows - row < rows_each ? p.rows - row : rows_each, col,
                 p.cols - col < each ? p.cols - col : each);
    }
  });
}

}  // namespace

void matrix_product(const MatrixProduct& p, const Parallel& parallel) {
  p.dtype == DType::bf16 ? product<bf16>(p, parallel) : product<float>(p, parallel);
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
