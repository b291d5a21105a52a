// Who computes what: tiles of queries, in the order of the heads whose keys they share, shared out by work.
#pragma once
#include "cpu/attention_scores.h"

namespace seqfuse {
namespace SEQFUSE_ISA {

// multiply-adds that are worth waking a thread for; the tile unit is done with them sooner
constexpr int64_t least_work = has_tiles ? 1 << 20 : 1 << 18;

struct Unit {
  int64_t sequence, kv_head, member, tile;  // member: of the query heads that share kv_head
  bool first, last;                         // of its kv_head
};

// Workers get consecutive units of about equal cost, which is the number of keys that each strip of tile_rows queries
// sees. A unit belongs to the worker in whose share of the total cost it begins; so it is the same for any timing.
class Plan {
 public:
  // tile: queries in a unit
  Plan(const AttentionProblem& a, int64_t tile, int threads) : a_(a), tile_(tile), group_(a.Hkv ? a.Hq / a.Hkv : 0) {
    for (int64_t s = 0; s < a.sequences; s++) {
      const Sequence seq = sequence_at(a, s);
      total_ += head_cost(seq) * a.Hkv;
      if (seq.keys > most_keys_) most_keys_ = seq.keys;
    }
    const int64_t useful = total_ * tile_rows * (a.D + a.Dv) / least_work;
    workers_ = int(clamp(useful, 1, threads < 1 ? 1 : threads));
  }

  int workers() const { return workers_; }
  int64_t most_keys() const { return most_keys_; }  // of any sequence

  // f(unit, sequence) for each unit of a worker
  template <class F>
  void each(int64_t worker, F f) const {
    const int64_t begin = total_ * worker / workers_, end = total_ * (worker + 1) / workers_;
    int64_t at = 0;
    for (int64_t n = 0; n < a_.sequences * a_.Hkv && at < end; n++) {
      const Sequence seq = sequence_at(a_, n / a_.Hkv);
      const int64_t cost = head_cost(seq), tiles = tiles_of(seq);
      if (at + cost <= begin) {
        at += cost;
        continue;
      }
      for (int64_t i = 0; i < group_ * tiles; i++) {
        if (at >= begin && at < end)
          f(Unit{n / a_.Hkv, n % a_.Hkv, i / tiles, i % tiles, i == 0, i == group_ * tiles - 1}, seq);
        at += tile_cost(seq, i % tiles);
      }
    }
  }

 private:
  int64_t tiles_of(const Sequence& seq) const {  // one at least: somebody must write zeros to unseen keys' gradients
    return seq.queries > tile_ ? ceil_div(seq.queries, tile_) : 1;
  }
  int64_t tile_cost(const Sequence& seq, int64_t tile) const {
    const int64_t i = tile * tile_, end = clamp(i + tile_, 0, seq.queries);
    const Range seen = seq.seen_by(i, end);
    return (16 + (seen.empty() ? 0 : seen.end - seen.begin)) * (end > i ? ceil_div(end - i, tile_rows) : 1);
  }
  int64_t head_cost(const Sequence& seq) const {
    int64_t cost = 0;
    for (int64_t t = 0; t < tiles_of(seq); t++) cost += tile_cost(seq, t);
    return cost * group_;
  }

  const AttentionProblem& a_;
  int64_t tile_;
  int64_t group_, total_ = 0, most_keys_ = 0;
  int workers_ = 1;
};

// The keys and values of one head as the products want them, block by block, each packed when it is first needed.
template <class W>
struct PackedHead {
  typedef typename W::Word Word;
  bool backward;
  int64_t D, Dv, blocks;
  Word *keys_across, *values_across;  // transposed: for scores, and for the gradients of weights
  Word *keys, *values;                // row by row: for dq, and for out

  PackedHead(const AttentionProblem& a, int64_t most_keys, bool backward)
      : backward(backward), D(a.D), Dv(a.Dv), blocks(ceil_div(most_keys, block_keys)) {}

  void take(Scratch& scratch) {
    const int64_t n = blocks * block_keys;
    scratch.take(keys_across, n * depth<W>(D)), scratch.take(keys, backward ? words<W>(n) * leading(D) : 0);
    scratch.take(values_across, backward ? n * depth<W>(Dv) : 0);
    scratch.take(values, backward ? 0 : words<W>(n) * leading(Dv));
    scratch.take(packed_, blocks);
  }

  // where the block that begins with key `first` lies in keys or values
  static Word* rows_from(Word* packed, int64_t first, int64_t width) {
    return packed + words<W>(first) * leading(width);
  }

  template <class T>
  void ensure(const AttentionProblem& a, const Sequence& seq, int64_t kv_head, int64_t block) {
    if (seq.index != sequence_ || kv_head != kv_head_) {
      sequence_ = seq.index, kv_head_ = kv_head;
      memset(packed_, 0, size_t(blocks));
    }
    if (packed_[block]) return;
    packed_[block] = true;
    const int64_t first = block * block_keys, rows = clamp(seq.keys - first, 0, block_keys);
    const T* k = row_of<T>(a.k, seq.batch, kv_head, seq.k0 + first);
    const T* v = row_of<T>(a.v, seq.batch, kv_head, seq.k0 + first);
    const int64_t capacity = round_up(rows, tile_columns);
    pack_transposed<W>(k, a.k.row, rows, D, keys_across + first * depth<W>(D));
    if (backward) {
      pack_rows<W>(k, a.k.row, rows, capacity, D, rows_from(keys, first, D));
      pack_transposed<W>(v, a.v.row, rows, Dv, values_across + first * depth<W>(Dv));
    } else {
      pack_rows<W>(v, a.v.row, rows, capacity, Dv, rows_from(values, first, Dv));
    }
  }

 private:
  int64_t sequence_ = -1, kv_head_ = -1;  // whose blocks are packed
  bool* packed_;
};

// What the strips (tile_rows queries) of a tile see of one block of keys.
template <int64_t Rows, class W>
struct BlockView {
  typedef typename W::Word Word;
  static constexpr int64_t strips = Rows / tile_rows;
  int64_t first, keys;   // the block's first key, and how many of its keys exist
  Range seen[strips];    // columns of the block
  Range panels[strips];  // the same, widened to whole tiles
  bool whole;            // every query sees every column of a block that is full

  BlockView(const Sequence& seq, int64_t block, int64_t i0, int64_t rows) {
    first = block * block_keys, keys = clamp(seq.keys - first, 0, block_keys);
    whole = seq.seen(i0).end >= first + block_keys && seq.seen(i0 + rows - 1).begin <= first;
    for (int64_t s = 0; s < strips; s++) {
      const Range r = seq.seen_by(i0 + s * tile_rows, i0 + clamp((s + 1) * tile_rows, 0, rows));
      seen[s] = {clamp(r.begin - first, 0, keys), clamp(r.end - first, 0, keys)};
      if (s * tile_rows >= rows || seen[s].empty()) seen[s] = {0, 0};
      panels[s] = {seen[s].begin / tile_columns * tile_columns, round_up(seen[s].end, tile_columns)};
    }
  }

  // out[r][c] = x_r . w_c over n words for the rows of a group, whose first is row 0 of out, and what they see; x lies
  // along the words (pack_along), w is transposed (pack_transposed)
  void products(Range group, const Word* x, int64_t ldx, const Word* w, int64_t n, float* out) const {
    each_panel(group, [=, this](int64_t s, int64_t c) {
      float* to = out + (s * tile_rows - group.begin) * block_keys + c;
      if constexpr (has_tiles)
        panel_by_tiles(x + s * tile_rows * ldx, ldx, w + c * n, n, to, block_keys);
      else
        multiply_tile<W, false, 2>(x + s * tile_rows * ldx, ldx, w + c * n, tile_columns, n,
                                   [=](int r, int v, vf sum)
                                       __attribute__((always_inline)) { store(to + r * block_keys + v * VL, sum); });
    });
  }

  // The same for scores of the queries i0 .. i0 + rows, with the bias where the rule leaves it to the products.
  void scores(const ScoreRule& rule, int64_t i0, int64_t rows, Range group, const Word* x, int64_t ldx, const Word* w,
              int64_t n, float* out) const {
    if (!rule.bias_in_product) return products(group, x, ldx, w, n, out);
    rule.bias_wide ? biased_scores<float>(rule, i0, rows, group, x, ldx, w, n, out)
                   : biased_scores<bf16>(rule, i0, rows, group, x, ldx, w, n, out);
  }

  // out[r][0..n) += sum over the keys c that r's strip sees of weights[r][c] * w[c][0..n). Rows of weights have words
  // along them and lie ldx apart, the first is the group's; w is as pack_rows makes it. Weights of what a query doesn't
  // see are zero.
  void combine(Range group, const Word* weights, int64_t ldx, const Word* w, int64_t ld, int64_t n, float* out) const {
    if constexpr (has_tiles) {
      for (int64_t s = group.begin / tile_rows; s * tile_rows < group.end; s++) {
        if (panels[s].empty()) continue;
        const int64_t begin = panels[s].begin / W::per_word, K = panels[s].end / W::per_word - begin;
        add_row_by_tiles(weights + (s * tile_rows - group.begin) * ldx + begin, ldx, w + begin * ld, ld, K, n,
                         out + s * tile_rows * ld, ld);
      }
    } else {
      for (int64_t c = 0; c < n; c += tile_columns)
        for (int64_t s = group.begin / tile_rows; s * tile_rows < group.end; s++) {
          if (seen[s].empty()) continue;
          const int64_t begin = seen[s].begin / W::per_word, K = words<W>(seen[s].end) - begin;
          const Word* x = weights + (s * tile_rows - group.begin) * ldx + begin;
          const Word* from = w + begin * ld + c;
          float* to = out + s * tile_rows * ld + c;
          n - c > VL ? add_tile<W, false, 2>(x, ldx, from, ld, K, to, ld)
                     : add_tile<W, false, 1>(x, ldx, from, ld, K, to, ld);
        }
    }
  }

  // The products of spread by the tile unit, which wants its left operand along the sum: out, x and the result are
  // transposed. x holds words of queries along its n rows (pack_across), of which there are whole tile_columns.
  void spread_transposed(const Word* weights, const Word* x, int64_t ldx, int64_t n, float* out) const {
    for (int64_t c = 0; c < block_keys; c += tile_columns) {
      Range by{strips, 0};  // that see any of these keys
      for (int64_t s = 0; s < strips; s++)
        if (c >= panels[s].begin && c < panels[s].end) by = {s < by.begin ? s : by.begin, s + 1};
      if (by.empty()) continue;
      const int64_t begin = by.begin / 2 * tiles::words, K = round_up(by.end, 2) / 2 * tiles::words - begin;
      for (int64_t d = 0; d < n; d += tile_columns)
        add_square_by_tiles(x + d * ldx + begin, ldx, weights + begin * block_keys + c, block_keys, K,
                            out + d * block_keys + c, block_keys);
    }
  }

  // out[c][0..n) += sum over the queries r < rows whose strip sees c of weights[r][c] * x[r][0..n). Weights have words
  // across the rows: of pairs, those of rows r and r + 1 lie where the floats of row r would. x is as pack_rows makes
  // it.
  void spread(const Word* weights, int64_t rows, const Word* x, int64_t ld, int64_t n, float* out) const {
    Range by[block_keys / tile_rows];  // queries that see a strip of keys
    for (int64_t t = 0; t * tile_rows < keys; t++) {
      by[t] = {rows, 0};
      for (int64_t s = 0; s < strips; s++) {
        if (seen[s].end <= t * tile_rows || seen[s].begin >= (t + 1) * tile_rows) continue;
        if (s * tile_rows < by[t].begin) by[t].begin = s * tile_rows;
        by[t].end = clamp((s + 1) * tile_rows, 0, rows);
      }
    }
    for (int64_t c = 0; c < n; c += tile_columns)
      for (int64_t t = 0; t * tile_rows < keys; t++) {
        if (by[t].empty()) continue;
        const Word* w = weights + by[t].begin * block_keys + t * tile_rows;
        const Word* from = x + words<W>(by[t].begin) * ld + c;
        float* to = out + t * tile_rows * ld + c;
        const int64_t K = words<W>(by[t].end - by[t].begin), ldw = W::per_word * block_keys;
        n - c > VL ? add_tile<W, true, 2>(w, ldw, from, ld, K, to, ld)
                   : add_tile<W, true, 1>(w, ldw, from, ld, K, to, ld);
      }
  }

 private:
  // finish as in multiply_tile, with sums that the tile unit stores to `to` before
  template <class Finish>
  SEQFUSE_INLINE void panel(const Word* x, int64_t ldx, const Word* w, int64_t n, float* to, Finish finish) const {
    if constexpr (has_tiles) {
      panel_by_tiles(x, ldx, w, n, to, block_keys);
      for (int r = 0; r < tile_rows; r++)
        for (int v = 0; v < tile_columns / VL; v++) finish(r, v, load(to + r * block_keys + v * VL));
    } else {
      multiply_tile<W, false, 2>(x, ldx, w, tile_columns, n, finish);
    }
  }

  // f(strip, first column) for each tile of scores of a group of rows that is seen
  template <class F>
  SEQFUSE_INLINE void each_panel(Range group, F f) const {
    for (int64_t c = 0; c < block_keys; c += tile_columns)
      for (int64_t s = group.begin / tile_rows; s * tile_rows < group.end; s++)
        if (c >= panels[s].begin && c < panels[s].end) f(s, c);
  }

  // The bias is added, and both are brought to base 2, as the sums leave the registers. A row of the bias is a page or
  // more away from the next, where no hardware prefetcher follows: each tile fetches the lines of the same tile in the
  // next block, a block's time ahead.
  template <class B>
  void biased_scores(const ScoreRule& rule, int64_t i0, int64_t rows, Range group, const Word* x, int64_t ldx,
                     const Word* w, int64_t n, float* out) const {
    const int64_t row = rule.bias_row / int64_t(sizeof(B));
    const B* bias = reinterpret_cast<const B*>(rule.bias) + i0 * row + first;
    const vf f = splat(float(rule.scale * log2_e)), base2 = splat(float(log2_e));
    each_panel(group, [=, this](int64_t s, int64_t c) {
      const B* from = bias + s * tile_rows * row + c;
      constexpr int line = 64 / sizeof(B);
      for (int r = 0; r < tile_rows; r++)
        for (int l = 0; l < tile_columns; l += line) __builtin_prefetch(from + r * row + block_keys + l, 0, 2);
      int64_t ld = row;
      B edge[tile_rows * tile_columns];  // what lies beyond the last query or key is not the bias's
      if ((s + 1) * tile_rows > rows || c + tile_columns > keys) {
        memset(edge, 0, sizeof(edge));
        for (int64_t r = 0; r < clamp(rows - s * tile_rows, 0, tile_rows); r++)
          memcpy(edge + r * tile_columns, from + r * row, sizeof(B) * size_t(clamp(keys - c, 0, tile_columns)));
        from = edge, ld = tile_columns;
      }
      float* to = out + (s * tile_rows - group.begin) * block_keys + c;
      panel(x + s * tile_rows * ldx, ldx, w + c * n, n, to, [=](int r, int v, vf sum) __attribute__((always_inline)) {
        store(to + r * block_keys + v * VL, sum * f + load(from + r * ld + v * VL) * base2);
      });
    });
  }
};

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
