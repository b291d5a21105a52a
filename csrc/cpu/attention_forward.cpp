// Attention on the CPU, forward. Contract: seqfuse/attention.h
//
// Flash attention (Dao et al. 2022, arXiv:2205.14135): a tile of queries meets the keys block by block. Of a block's
// scores s (in the first-level cache) a row keeps its running maximum m and sum l, to base 2:
//
//   m' = max(m, max_j s_j),  w_j = 2^(s_j - m'),  l' = l 2^(m - m') + sum_j w_j,  out' = out 2^(m - m') + w v
//
// Floor: 2 (D + Dv) operations a score seen, 16 a cycle and core with AVX2, and about one cycle for its exponential.
// Memory: q and out once; keys and values are packed once for each head and worker and then read once for each tile.
#include "cpu/attention_plan.h"

namespace seqfuse {
namespace SEQFUSE_ISA {
namespace {

constexpr int64_t tile = SEQFUSE_VBYTES == 64 || has_tiles ? 96 : 48;
constexpr int64_t at_once = has_tiles ? tile_rows : tile;  // rows whose scores are held at a time

template <class W>
struct ForwardScratch {
  PackedHead<W> head;
  typename W::Word* q;
  float *weights, *out, *kept;
  float m[tile], l[tile * VL];  // of a row's sum the lanes, see softmax_rows

  ForwardScratch(const AttentionForward& a, int64_t most_keys) : head(a, most_keys, false) {}
  void take(Scratch& scratch) {
    head.take(scratch);
    scratch.take(q, tile * leading(words<W>(head.D))), scratch.take(out, tile * leading(head.Dv));
    scratch.take(weights, at_once * block_keys), scratch.take(kept, block_keys + 4 * VL);
  }
};

template <class T>
void forward_tile(const AttentionForward& a, const Dropout& dropout, const Sequence& seq, const Unit& u,
                  ForwardScratch<WordsOf<T>>& w) {
  using W = WordsOf<T>;
  const int64_t h = u.kv_head * (a.Hq / a.Hkv) + u.member, i0 = u.tile * tile;
  const int64_t rows = clamp(seq.queries - i0, 0, tile), D = depth<W>(a.D), ldq = leading(D), ldo = leading(a.Dv);
  if (rows == 0) return;
  const ScoreRule rule(a, seq, h);
  pack_along<W>(row_of<T>(a.q, seq.batch, h, seq.q0 + i0), a.q.row, rows, round_up(rows, tile_rows), a.D, w.q);
  memset(w.out, 0, sizeof(float) * size_t(round_up(rows, tile_rows) * ldo));
  for (int64_t r = 0; r < tile; r += VL) store(w.m + r, splat(-__builtin_inff()));
  memset(w.l, 0, sizeof(w.l));
  const int64_t padded = round_up(a.Dv, VL);

  const Range keys = seq.seen_by(i0, i0 + rows);
  for (int64_t block = keys.begin / block_keys; block * block_keys < keys.end && !keys.empty(); block++) {
    const BlockView<tile, W> view(seq, block, i0, rows);
    if (!rule.any(i0, i0 + rows, {view.first, view.first + view.keys})) continue;
    w.head.template ensure<T>(a, seq, u.kv_head, block);
    const auto *across = w.head.keys_across + view.first * D,
               *values = w.head.rows_from(w.head.values, view.first, a.Dv);
    for (int64_t begin = 0; begin < rows; begin += at_once) {
      const Range group{begin, clamp(begin + at_once, 0, rows)};
      view.scores(rule, i0, rows, group, w.q, ldq, across, D, w.weights);
      for (int64_t r = group.begin; r < group.end; r++) {
        const Range columns = view.panels[r / tile_rows];
        if (columns.empty()) continue;
        float* s = w.weights + (r - begin) * block_keys;
        if (!rule.plain) rule.apply(s, i0 + r, i0 + r + seq.shift, view.first, columns, seq.keys, nullptr);
        if (view.whole) continue;
        const Range seen = seq.seen(i0 + r);
        hide(s, columns, {seen.begin - view.first, seen.end - view.first});
      }
      for (int64_t first = begin; first < group.end; first += VL) {
        auto columns = [&](int64_t r) { return view.panels[(first + r) / tile_rows]; };
        auto kept = [&](int64_t r) -> const float* {
          if (a.dropout_p == 0.0) return nullptr;
          const Range c = columns(r);
          dropout.row(seq.index, h, i0 + first + r, view.first + c.begin, c.end - c.begin, w.kept);
          return w.kept;
        };
        softmax_rows<W>(w.weights + (first - begin) * block_keys, block_keys, clamp(group.end - first, 0, VL), columns,
                        rule.factor, w.m + first, w.l + first * VL, w.out + first * ldo, ldo, padded, kept);
      }
      view.combine(group, reinterpret_cast<const typename W::Word*>(w.weights), block_keys, values, ldo, a.Dv, w.out);
    }
  }

  for (int64_t r = 0; r < rows; r++) {
    const float l = sum(load(w.l + r * VL));
    const bool none = w.m[r] == -__builtin_inff() && l == 0.0f;
    write_row(w.out + r * ldo, a.Dv, none ? 1.0f : 1.0f / l, row_to_write<T>(a.out, seq.batch, h, seq.q0 + i0 + r));
    a.lse[(seq.batch * a.Hq + h) * a.Tq + seq.q0 + i0 + r] = none ? w.m[r] : natural(w.m[r], l);
  }
}

template <class T>
void forward(const AttentionForward& a, const Parallel& parallel) {
  const Plan plan(a, tile, parallel.threads);
  const Dropout dropout(a.seed, a.dropout_p);
  auto job = [&](int64_t begin, int64_t end) {
    Scratch scratch;
    ForwardScratch<WordsOf<T>> w(a, plan.most_keys());
    w.take(scratch), scratch.allocate(), w.take(scratch);
    [[maybe_unused]] const tiles::InUse in_use;
    for (int64_t worker = begin; worker < end; worker++)
      plan.each(worker, [&](const Unit& u, const Sequence& seq) { forward_tile<T>(a, dropout, seq, u, w); });
  };
  parallel(plan.workers(), job);
  if (a.cu_seqlens_q.data)  // rows behind the last sequence
    for (int64_t h = 0; h < a.Hq; h++)
      for (int64_t i = a.sequences ? clamp(index_at(a.cu_seqlens_q, a.sequences), 0, a.Tq) : 0; i < a.Tq; i++) {
        memset(row_to_write<T>(a.out, 0, h, i), 0, sizeof(T) * size_t(a.Dv));
        a.lse[h * a.Tq + i] = -__builtin_inff();
      }
}

}  // namespace

void attention_forward(const AttentionForward& a, const Parallel& p) {
  if (a.dtype == DType::bf16) return forward<bf16>(a, p);
  if constexpr (!has_dot) forward<float>(a, p);  // see dispatch.cpp
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
