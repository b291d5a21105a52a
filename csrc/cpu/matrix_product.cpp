// Products of matrices where the processor's library does not use its widest vectors, or has no instruction for bf16.
// Contract: seqfuse/matrix_product.h
//
// Floor: the multiplications, in fp32. A task is a block of y, whose sums stay in the worker's second-level cache while
// it goes through the terms in blocks: b's is laid out in panels of two vectors once for all rows of the task, a's in
// panels of a tile's rows for two tiles at a time, which leaves the first level room for a panel of b. A tile's sums
// lie in registers; a number of a is one broadcast. Meanwhile the lines that will be laid out next are asked for, and
// those that the tile will end in. Rows beyond the last are zeros that are multiplied and not written. A sum is one of
// sums over blocks of terms, so that its rounding grows with their number, and its order depends on nothing but the
// number of terms.
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
constexpr int64_t group_rows = 2 * tile_rows;                             // whose numbers of a are laid out together
constexpr int64_t block_rows = 384, block_cols = 256, block_terms = 128;  // 384, 128 and 16 KB of fp32
constexpr int64_t chunk = 16, chunks = block_terms / chunk;               // terms between which lines are asked for
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

// Lines that will be laid out next, of which a tile asks for three between chunks of its terms: all at once would fill
// the few places that a core has for lines on their way, and the tile's own would wait behind them.
struct Ahead {
  const char *b, *a, *a_too;
  int64_t a_step;  // from chunk to chunk; b's is a line
};

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

  struct Place {  // a tile, in y
    int64_t row, col;
    int rows, cols;  // that there are
  };

  // A block of terms of a tile: added to `sums` unless it is the first, and given to y if it is the last.
  void multiply(const float* a, const float* b, int64_t terms, float* sums, bool first, bool last, Place at,
                Ahead next) const {
    T* const y = (T*)p.y + at.row * p.y_row + at.col;
    const char* end = last ? (const char*)y : (const char*)sums;  // where the sums will be needed, two rows a chunk
    const int64_t end_row = last ? p.y_row * int64_t(sizeof(T)) : block_cols * int64_t(sizeof(float));
    vf t[tile_rows][2];
#pragma GCC unroll 12
    for (int r = 0; r < tile_rows; r++) t[r][0] = t[r][1] = vf{};
    for (int64_t from = 0; from < terms; from += chunk, end += 2 * end_row) {
      __builtin_prefetch(next.b, 0, 2), __builtin_prefetch(next.a, 0, 2), __builtin_prefetch(next.a_too, 0, 2);
      next.b += 64, next.a += next.a_step, next.a_too += next.a_step;
      __builtin_prefetch(end, 1, 3), __builtin_prefetch(end + end_row, 1, 3);
      if (sizeof(T) == 4) __builtin_prefetch(end + 64, 1, 3), __builtin_prefetch(end + end_row + 64, 1, 3);
      const int64_t to = from + chunk < terms ? from + chunk : terms;
      for (int64_t k = from; k < to; k++) {
        const vf x = load(b + k * tile_cols), z = load(b + k * tile_cols + VL);
#pragma GCC unroll 12
        for (int r = 0; r < tile_rows; r++) {
          const vf one = splat(a[k * VL + r]);
          t[r][0] = t[r][0] + one * x, t[r][1] = t[r][1] + one * z;
        }
      }
    }
    if (!first)
#pragma GCC unroll 12
      for (int r = 0; r < tile_rows; r++) {
        const float* const before = sums + r * block_cols;
        t[r][0] = load(before) + t[r][0], t[r][1] = load(before + VL) + t[r][1];
      }
    if (!last)
#pragma GCC unroll 12
      for (int r = 0; r < tile_rows; r++) {
        float* const to = sums + r * block_cols;
        store(to, t[r][0]), store(to + VL, t[r][1]);
      }
    else if (at.rows == tile_rows && at.cols == tile_cols && !p.c)
#pragma GCC unroll 12
      for (int r = 0; r < tile_rows; r++) store(y + r * p.y_row, t[r][0]), store(y + r * p.y_row + VL, t[r][1]);
    else
      finish(t, y, at);
  }

  // The last tile of a row or column, or one with c.
  SEQFUSE_INLINE void finish(const vf (&t)[tile_rows][2], T* y, Place at) const {
    float sums[tile_rows][tile_cols];
#pragma GCC unroll 12
    for (int r = 0; r < tile_rows; r++) store(sums[r], t[r][0]), store(sums[r] + VL, t[r][1]);
    const T* const c = (const T*)p.c + at.row * p.c_row + at.col;
    for (int r = 0; r < at.rows; r++)
      for (int n = 0; n < at.cols; n += VL) {
        const int m = at.cols - n < VL ? at.cols - n : VL;
        const vf sum = load(sums[r] + n);
        give(y + r * p.y_row + n, p.c ? take(c + r * p.c_row + n, m) + sum : sum, m);
      }
  }

  // What tile `i` of a block of terms asks for of the next block of b, and tile `j` of a group of the next group of a.
  // There are as many tiles as rows of lines, or more: those repeat the first.
  Ahead ahead(const T* next_b, int64_t i, const T* next_a, int64_t j) const {
    constexpr int64_t in_row = block_cols / block_terms;
    i = i < block_cols ? i : 0, j = j < (p.a_row == 1 ? block_terms / chunks : group_rows / 2) ? j : 0;
    const T* const b = p.b_col == 1 ? next_b + i / in_row * p.b_term + i % in_row * block_terms : next_b + i * p.b_col;
    if (p.a_row == 1) {
      const T* const a = next_a + j * chunks * p.a_term;
      return {(const char*)b, (const char*)a, (const char*)(a + group_rows - 1), p.a_term * int64_t(sizeof(T))};
    }
    const T* const a = next_a + j * 2 * p.a_row;
    return {(const char*)b, (const char*)a, (const char*)(a + p.a_row), 64};
  }

  void block(int64_t row, int64_t rows, int64_t col, int64_t cols) const {
    const T *const left = (const T*)p.a + row * p.a_row, *const right = (const T*)p.b + col * p.b_col;
    for (int64_t term = 0; term == 0 || term < p.terms; term += block_terms) {
      const bool first = term == 0, last = term + block_terms >= p.terms;
      const int64_t terms = last ? p.terms - term : block_terms, after = last ? 0 : term + block_terms;
      lay_out<tile_cols>(right + term * p.b_term, p.b_term, p.b_col, cols, terms, b, b_panel);
      int64_t i = 0;
      for (int64_t g = 0; g < rows; g += group_rows) {
        const int64_t group = rows - g < group_rows ? rows - g : group_rows;
        lay_out<tile_rows>(left + g * p.a_row + term * p.a_term, p.a_term, p.a_row, group, terms, a, a_panel);
        const bool more = g + group_rows < rows;
        const T* const next_a = more ? left + (g + group_rows) * p.a_row + term * p.a_term : left + after * p.a_term;
        int64_t j = 0;
        for (int64_t n = 0; n < cols; n += tile_cols)
          for (int64_t r = 0; r < group; r += tile_rows) {
            const Place at{row + g + r, col + n, int(group - r < tile_rows ? group - r : tile_rows),
                           int(cols - n < tile_cols ? cols - n : tile_cols)};
            multiply(a + r / tile_rows * a_panel, b + n / tile_cols * b_panel, terms, sums + (g + r) * block_cols + n,
                     first, last, at, ahead(right + after * p.b_term, i++, next_a, j++));
          }
      }
    }
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
