// Attention on the CPU, backward. Contract: seqfuse/attention.h
//
// Nothing but lse and out is kept from forward: the weights w of a block are computed again. With delta_i = dout_i .
// out_i
// - dlse_i and, for every score seen,
//
//   w = exp(s - lse),  dw = dout v^T,  ds = w (dw - delta),  dv += w^T dout,  dq += scale ds k,  dk += scale ds^T q
//
// ds is the gradient of the bias. Dropout multiplies w in dv, and dw, by its factor. Softcap multiplies ds by its
// slope. Floor: 2 (3 D + 2 Dv) operations a score seen, and its exponential.
//
// A tile of queries meets the keys block by block and sums its dq; dk and dv of a whole head are summed in fp32 by the
// worker that has the head. Where workers share a head, each sums its own tiles, and the sums are added in the order of
// the workers: no atomics, and the same bits every time. A bias gradient that several heads share is summed tile by
// tile over these heads, by one worker; in a pass of its own where whole groups of heads would leave workers idle.
#include "cpu/attention_plan.h"

namespace seqfuse {
namespace SEQFUSE_ISA {
namespace {

constexpr int64_t tile = 96;
constexpr int64_t at_once = has_tiles ? tile_rows : tile;  // rows whose scores are held at a time

// dk and dv of one head, in fp32: rows, `leading` apart, or of the tile unit's sums (View::spread_transposed) a block
// of keys after another, each transposed.
SEQFUSE_INLINE int64_t sums_width(int64_t D) {
  return has_tiles ? round_up(D, tile_columns) : leading(D);
}
struct KeySums {
  float *dk, *dv;
  int64_t sequence = -1, kv_head = -1;

  bool of(const KeySums& other) const { return sequence == other.sequence && kv_head == other.kv_head; }
};

template <class W>
struct BackwardScratch {
  typedef typename W::Word Word;
  PackedHead<W> head;
  Word *q = nullptr, *dout = nullptr, *q_rows = nullptr,
       *dout_rows = nullptr;   // along the rows, and as spread wants them; of floats the same
  Word* grad_along = nullptr;  // as combine wants it; of floats grad itself
  Word *weights_across = nullptr, *grad_across = nullptr;  // as spread wants them; without a tile unit weights and grad
  float *dq, *weights, *grad = nullptr, *cap_slope, *kept;
  float delta[tile];
  double lse[tile];  // to base 2

  BackwardScratch(const AttentionBackward& a, int64_t most_keys) : head(a, most_keys, true) {}
  void take(Scratch& scratch) {
    head.take(scratch);
    scratch.take(q, tile * leading(words<W>(head.D))), scratch.take(dq, tile * leading(head.D));
    scratch.take(dout, tile * leading(words<W>(head.Dv)));
    scratch.take(weights, at_once * block_keys), scratch.take(grad, at_once * block_keys);
    if constexpr (W::per_word == 1) {
      q_rows = q, dout_rows = dout, grad_along = grad;
    } else {
      scratch.take(q_rows, words<W>(tile) * leading(head.D)),
          scratch.take(dout_rows, words<W>(tile) * leading(head.Dv));
      scratch.take(grad_along, tile * words<W>(block_keys));
    }
    if constexpr (has_tiles) {
      scratch.take(weights_across, words<W>(tile) * block_keys), scratch.take(grad_across, words<W>(tile) * block_keys);
    } else {
      weights_across = reinterpret_cast<Word*>(weights), grad_across = reinterpret_cast<Word*>(grad);
    }
    scratch.take(cap_slope, at_once * block_keys), scratch.take(kept, block_keys + 4 * VL);
  }
};

// The gradient of the bias: where this head's rows of it lie, and whether they hold something already.
struct BiasRows {
  char* rows;   // null: not wanted
  int64_t row;  // bytes from one to the next
  bool wide, add;

  template <class B>
  SEQFUSE_INLINE void put(int64_t r, int64_t first, const float* ds, int64_t n) const {
    B* out = reinterpret_cast<B*>(rows + r * row) + first;
    for_vectors(0, n, [=, this](int64_t c, int m) {
      const vf x = ds ? take(ds + c, m) : vf{};
      give(out + c, add ? x + take(out + c, m) : x, m);
    });
  }
  // row r of the tile gets the gradients of n keys, or zeros
  SEQFUSE_INLINE void put(int64_t r, int64_t first, const float* ds, int64_t n) const {
    if (!rows || n <= 0 || (add && !ds)) return;
    wide ? put<float>(r, first, ds, n) : put<bf16>(r, first, ds, n);
  }
  // the lines that the same rows take in the next block: every row is on another page
  SEQFUSE_INLINE void fetch_next(int64_t r, int64_t first) const {
    if (!rows) return;
    const int64_t size = wide ? 4 : 2;
    const char* next = rows + r * row + (first + block_keys) * size;
    for (int64_t n = 0; n < block_keys * size; n += 64) prefetch_to_write(next + n);
  }
};

// Scores and dw of a row become weights (what multiplies dout in dv) and gradients of scores.
SEQFUSE_INLINE void gradient_row(float* __restrict s, float* __restrict g, const float* __restrict kept, Range c,
                                 float factor, double lse, float delta) {
  const vf f = splat(factor), high = splat(float(lse)), low = splat(float(lse - float(lse))), d = splat(delta);
  for (int64_t j = c.begin; j < c.end; j += VL) {
    const vf w = exp2((load(s + j) * f - high) - low);
    if (kept) {
      const vf k = load(kept + j - c.begin);
      store(s + j, w * k), store(g + j, w * (load(g + j) * k - d));
    } else {
      store(s + j, w), store(g + j, w * (load(g + j) - d));
    }
  }
}

template <class T>
struct Backward {
  using W = WordsOf<T>;
  using View = BlockView<tile, W>;
  typedef typename W::Word Word;
  const AttentionBackward& a;
  const Dropout dropout;
  const int64_t group, ldq, ldv;
  const int64_t D, Dv;  // words
  const int64_t sums_q, sums_v;

  explicit Backward(const AttentionBackward& a)
      : a(a),
        dropout(a.seed, a.dropout_p),
        group(a.Hq / a.Hkv),
        ldq(leading(a.D)),
        ldv(leading(a.Dv)),
        D(depth<W>(a.D)),
        Dv(depth<W>(a.Dv)),
        sums_q(sums_width(a.D)),
        sums_v(sums_width(a.Dv)) {}

  // q, dout, delta and lse of a tile
  void load_tile(const Sequence& seq, int64_t h, int64_t i0, int64_t rows, BackwardScratch<W>& w) const {
    const int64_t capacity = round_up(rows, tile_rows);
    const T *q = row_of<T>(a.q, seq.batch, h, seq.q0 + i0), *douts = row_of<T>(a.dout, seq.batch, h, seq.q0 + i0);
    pack_along<W>(q, a.q.row, rows, capacity, a.D, w.q);
    pack_along<W>(douts, a.dout.row, rows, capacity, a.Dv, w.dout);
    if constexpr (has_tiles) {
      pack_across(q, a.q.row, rows, round_up(rows, 2 * tile_rows), a.D, w.q_rows, words<W>(tile));
      pack_across(douts, a.dout.row, rows, round_up(rows, 2 * tile_rows), a.Dv, w.dout_rows, words<W>(tile));
    } else if constexpr (W::per_word == 2) {
      pack_rows<W>(q, a.q.row, rows, capacity, a.D, w.q_rows);
      pack_rows<W>(douts, a.dout.row, rows, capacity, a.Dv, w.dout_rows);
    }
    for (int64_t r = 0; r < rows; r++) {
      const int64_t at = (seq.batch * a.Hq + h) * a.Tq + seq.q0 + i0 + r;
      const T* out = row_of<T>(a.out, seq.batch, h, seq.q0 + i0 + r);
      const T* dout = douts + r * a.dout.row;
      vf products{};
      for_vectors(0, a.Dv, [&](int64_t c, int n) { products += take(dout + c, n) * take(out + c, n); });
      w.delta[r] = sum(products) - (a.dlse ? a.dlse[at] : 0.0f);
      w.lse[r] = a.lse[at] * log2_e;
    }
  }

  // weights and gradients of scores of a group of rows and one block, zero where a query doesn't see a key
  void block_gradients(const Sequence& seq, const ScoreRule& rule, int64_t h, int64_t i0, int64_t rows, Range group,
                       const View& view, const BiasRows& bias, BackwardScratch<W>& w) const {
    view.scores(rule, i0, rows, group, w.q, leading(D), w.head.keys_across + view.first * D, D, w.weights);
    view.products(group, w.dout, leading(Dv), w.head.values_across + view.first * Dv, Dv, w.grad);
    for (int64_t r = group.begin; r < group.end; r++) {
      Range c = view.panels[r / tile_rows];
      const int64_t at = (r - group.begin) * block_keys;
      float *s = w.weights + at, *g = w.grad + at, *slope = w.cap_slope + at;
      if (w.lse[r] == -__builtin_inff()) c = {0, 0};
      if (!view.whole || c.empty()) {
        memset(s, 0, sizeof(float) * size_t(c.begin)), memset(g, 0, sizeof(float) * size_t(c.begin));
        memset(s + c.end, 0, sizeof(float) * size_t(block_keys - c.end));
        memset(g + c.end, 0, sizeof(float) * size_t(block_keys - c.end));
      }
      if (!c.empty()) {
        const int64_t i = i0 + r;
        if (!rule.plain) rule.apply(s, i, i + seq.shift, view.first, c, seq.keys, slope);
        if (!view.whole) {
          const Range seen = seq.seen(i);
          hide(s, c, {seen.begin - view.first, seen.end - view.first});
        }
        if (a.dropout_p > 0.0) dropout.row(seq.index, h, i, view.first + c.begin, c.end - c.begin, w.kept);
        gradient_row(s, g, a.dropout_p > 0.0 ? w.kept : nullptr, c, rule.factor, w.lse[r], w.delta[r]);
      }
      bias.put(r, view.first, g, clamp(a.Tk - view.first, 0, block_keys));
      bias.fetch_next(r, view.first);
      if (a.softcap != 0.0f)
        for (int64_t j = c.begin; j < c.end; j += VL) store(g + j, load(g + j) * load(slope + j));
    }
  }

  // Pairs: weights and gradients as words, across the rows (in place, see View::spread, but for the tile unit), and
  // gradients along them.
  void narrow(Range group, const View& view, BackwardScratch<W>& w) const {
    if (has_tiles) {  // rows beyond the last query
      const int64_t rows = group.begin < group.end ? group.end - group.begin : 0, rest = at_once - rows;
      memset(w.weights + rows * block_keys, 0, sizeof(float) * size_t(rest * block_keys));
      memset(w.grad + rows * block_keys, 0, sizeof(float) * size_t(rest * block_keys));
    }
    for (int64_t r = group.begin; r < (has_tiles ? group.begin + at_once : group.end); r += 2) {
      if (!has_tiles && view.seen[r / tile_rows].empty()) continue;
      const int64_t at = (r - group.begin) * block_keys, across = has_tiles ? r / 2 * block_keys : at;
      float *s = w.weights + at, *g = w.grad + at;
      float *s_across = reinterpret_cast<float*>(w.weights_across + across),
            *g_across = reinterpret_cast<float*>(w.grad_across + across);
      if (!has_tiles && r + 1 == group.end)  // the other half of the words
        memset(s + block_keys, 0, sizeof(float) * block_keys), memset(g + block_keys, 0, sizeof(float) * block_keys);
      Pairs::Word* along = w.grad_along + r * words<W>(block_keys);
      for (int64_t c = 0; c < block_keys; c += 2 * VL) {
        const vf a0 = load(g + c), a1 = load(g + c + VL), b0 = load(g + block_keys + c),
                 b1 = load(g + block_keys + c + VL);
        store_along(along + c / 2, a0, a1), store_along(along + words<W>(block_keys) + c / 2, b0, b1);
        store(g_across + c, as_float(rounded_pairs(a0, b0))), store(g_across + c + VL, as_float(rounded_pairs(a1, b1)));
      }
      for (int64_t c = 0; c < block_keys; c += VL)
        store(s_across + c, as_float(rounded_pairs(load(s + c), load(s + block_keys + c))));
    }
  }

  // One tile of queries. sums null: only the gradient of the bias is wanted.
  void run(const Sequence& seq, const Unit& u, const BiasRows& bias, KeySums* sums, BackwardScratch<W>& w) const {
    const int64_t h = u.kv_head * group + u.member, i0 = u.tile * tile, rows = clamp(seq.queries - i0, 0, tile);
    if (rows == 0) return;
    const ScoreRule rule(a, seq, h);
    load_tile(seq, h, i0, rows, w);
    if (sums) memset(w.dq, 0, sizeof(float) * size_t(round_up(rows, tile_rows) * ldq));
    const Range keys = seq.seen_by(i0, i0 + rows);
    for (int64_t block = 0; block * block_keys < (bias.rows ? a.Tk : keys.end); block++) {
      const int64_t first = block * block_keys;
      if (first >= keys.end || first + block_keys <= keys.begin ||
          !rule.any(i0, i0 + rows, {first, clamp(first + block_keys, 0, seq.keys)})) {
        for (int64_t r = 0; r < rows; r++) bias.put(r, first, nullptr, clamp(a.Tk - first, 0, block_keys));
        continue;
      }
      const View view(seq, block, i0, rows);
      w.head.template ensure<T>(a, seq, u.kv_head, block);
      for (int64_t begin = 0; begin < round_up(rows, has_tiles ? 2 * tile_rows : 1); begin += at_once) {
        const Range group{begin, clamp(begin + at_once, 0, rows)};
        block_gradients(seq, rule, h, i0, rows, group, view, bias, w);
        if constexpr (W::per_word == 2)
          if (sums) narrow(group, view, w);
      }
      if (!sums) continue;
      if constexpr (has_tiles) {
        view.spread_transposed(w.weights_across, w.dout_rows, words<W>(tile), sums_v, sums->dv + first * sums_v);
        view.spread_transposed(w.grad_across, w.q_rows, words<W>(tile), sums_q, sums->dk + first * sums_q);
      } else {
        view.spread(w.weights_across, rows, w.dout_rows, ldv, a.Dv, sums->dv + first * ldv);
        view.spread(w.grad_across, rows, w.q_rows, ldq, a.D, sums->dk + first * ldq);
      }
      view.combine({0, rows}, w.grad_along, words<W>(block_keys), w.head.rows_from(w.head.keys, first, a.D), ldq, a.D,
                   w.dq);
    }
    if (!sums) return;
    for (int64_t r = 0; r < rows; r++)
      write_row(w.dq + r * ldq, a.D, a.scale, row_to_write<T>(a.dq, seq.batch, h, seq.q0 + i0 + r));
  }

  void begin_head(KeySums& sums, const Sequence& seq, int64_t kv_head) const {
    sums.sequence = seq.index, sums.kv_head = kv_head;
    const int64_t rows = round_up(seq.keys, block_keys);
    memset(sums.dk, 0, sizeof(float) * size_t(rows * sums_q)),
        memset(sums.dv, 0, sizeof(float) * size_t(rows * sums_v));
  }

  // Rows begin .. end of blocks of transposed sums, times factor; begin is a block's first row.
  void write_transposed(const float* sums, int64_t width, int64_t n, float factor, const HeadsView& to,
                        const Sequence& seq, int64_t kv_head, int64_t begin, int64_t end) const {
    for (int64_t j = begin; j < end; j += VL)
      for (int64_t d = 0; d < n; d += VL) {
        const float* from = sums + j / block_keys * block_keys * width + j % block_keys + d * block_keys;
        vf x[VL];
        for (int l = 0; l < VL; l++) x[l] = load(from + l * block_keys) * factor;
        transpose(x);
        for (int l = 0; l < clamp(end - j, 0, VL); l++)
          give(row_to_write<T>(to, seq.batch, kv_head, seq.k0 + j + l) + d, x[l], int(clamp(n - d, 0, VL)));
      }
  }

  void write_keys(const KeySums& sums, const Sequence& seq, int64_t begin, int64_t end) const {
    if constexpr (has_tiles) {
      write_transposed(sums.dk, sums_q, a.D, a.scale, a.dk, seq, sums.kv_head, begin, end);
      return write_transposed(sums.dv, sums_v, a.Dv, 1.0f, a.dv, seq, sums.kv_head, begin, end);
    }
    for (int64_t j = begin; j < end; j++) {
      write_row(sums.dk + j * ldq, a.D, a.scale, row_to_write<T>(a.dk, seq.batch, sums.kv_head, seq.k0 + j));
      write_row(sums.dv + j * ldv, a.Dv, 1.0f, row_to_write<T>(a.dv, seq.batch, sums.kv_head, seq.k0 + j));
    }
  }
};

// [begin, end) of every head's rows become zero
template <class T>
void clear(const HeadsView& v, int64_t b, int64_t heads, int64_t begin, int64_t end, int64_t D) {
  for (int64_t h = 0; h < heads; h++)
    for (int64_t t = begin; t < end; t++) memset(row_to_write<T>(v, b, h, t), 0, sizeof(T) * size_t(D));
}

// Rows that belong to no sequence and keys past key_lengths: no tile comes by them.
template <class T>
void clear_unused(const AttentionBackward& a) {
  if (a.cu_seqlens_q.data) {
    const int64_t q = a.sequences ? clamp(index_at(a.cu_seqlens_q, a.sequences), 0, a.Tq) : 0;
    const int64_t k = a.sequences ? clamp(index_at(a.cu_seqlens_k, a.sequences), 0, a.Tk) : 0;
    clear<T>(a.dq, 0, a.Hq, q, a.Tq, a.D);
    clear<T>(a.dk, 0, a.Hkv, k, a.Tk, a.D), clear<T>(a.dv, 0, a.Hkv, k, a.Tk, a.Dv);
  } else if (a.key_lengths.data) {
    for (int64_t b = 0; b < a.B; b++) {
      const int64_t keys = sequence_at(a, b).keys;
      clear<T>(a.dk, b, a.Hkv, keys, a.Tk, a.D), clear<T>(a.dv, b, a.Hkv, keys, a.Tk, a.Dv);
    }
  }
}

// How the gradient of the bias is summed over the heads that share a slice [Tq, Tk] of it.
struct BiasSharing {
  bool batch, heads;  // summed over them
  bool with_keys;     // while dk and dv are computed, else in a pass of its own
  int64_t groups;     // heads of keys that have slices in common belong to a group

  BiasSharing(const AttentionBackward& a, int workers) {
    batch = a.dbias && a.dbias_batch < a.B, heads = a.dbias && a.dbias_heads < a.Hq;
    groups = (batch ? 1 : a.B) * (heads ? 1 : a.Hkv);
    with_keys = shared() && (groups % workers == 0 || groups >= 4 * workers);
  }
  bool shared() const { return batch || heads; }
};

BiasRows bias_rows(const AttentionBackward& a, int64_t s, int64_t h, int64_t i0) {
  if (!a.dbias) return {};
  const bool wide = a.bias_dtype == DType::f32;
  const int64_t slice = (a.dbias_batch == 1 ? 0 : s) * a.dbias_heads + (a.dbias_heads == 1 ? 0 : h);
  const int64_t row = a.Tk * (wide ? 4 : 2);
  return {static_cast<char*>(a.dbias) + (slice * a.Tq + i0) * row, row, wide, false};
}

// The gradient of a bias that heads share: a tile of a slice is summed in fp32 over its heads, one after another. With
// keys a worker has whole groups and sums their dk and dv besides, else it has tiles and computes nothing but these.
template <class T>
class SharedBias {
 public:
  SharedBias(const AttentionBackward& a, const BiasSharing& sharing, int64_t most_keys)
      : a_(a), kernel_(a), sharing_(sharing), most_keys_(most_keys), tiles_(ceil_div(a.Tq, tile)) {}

  void run(int workers, const Parallel& parallel) const {
    const int64_t units = sharing_.with_keys ? sharing_.groups : a_.dbias_batch * a_.dbias_heads * tiles_;
    auto job = [&](int64_t begin, int64_t end) {
      Scratch scratch;
      Worker w(a_, most_keys_);
      for (int pass = 0; pass < 2; pass++) {
        take(w, scratch);
        if (pass == 0) scratch.allocate();
      }
      [[maybe_unused]] const tiles::InUse in_use;
      for (int64_t worker = begin; worker < end; worker++)
        for (int64_t unit = worker; unit < units; unit += workers) {
          if (sharing_.with_keys)
            group(unit, w);
          else
            slice_tile(unit / tiles_ / a_.dbias_heads, unit / tiles_ % a_.dbias_heads, unit % tiles_, false, w);
        }
    };
    parallel(workers, job);
  }

 private:
  struct Worker {
    BackwardScratch<WordsOf<T>> scratch;
    float* bias = nullptr;               // [tile, Tk]
    float *dk = nullptr, *dv = nullptr;  // of the heads of keys of a group
    Worker(const AttentionBackward& a, int64_t most_keys) : scratch(a, most_keys) {}
  };

  void take(Worker& w, Scratch& scratch) const {
    const int64_t rows = sharing_.with_keys ? sequences() * kv_heads() * key_rows() : 0;
    w.scratch.take(scratch), scratch.take(w.bias, tile * a_.Tk);
    scratch.take(w.dk, rows * kernel_.sums_q), scratch.take(w.dv, rows * kernel_.sums_v);
  }

  int64_t key_rows() const { return round_up(most_keys_, block_keys); }
  int64_t sequences() const { return sharing_.batch ? a_.B : 1; }  // of a group
  int64_t kv_heads() const { return sharing_.heads ? a_.Hkv : 1; }

  // where a group's n-th head of keys is summed
  KeySums key_sums(const Worker& w, int64_t n) const {
    return {w.dk + n * key_rows() * kernel_.sums_q, w.dv + n * key_rows() * kernel_.sums_v};
  }

  void group(int64_t g, Worker& w) const {
    const int64_t s0 = sharing_.batch ? 0 : g / (sharing_.heads ? 1 : a_.Hkv), kv0 = sharing_.heads ? 0 : g % a_.Hkv;
    for (int64_t n = 0; n < sequences() * kv_heads(); n++) {
      KeySums sums = key_sums(w, n);
      kernel_.begin_head(sums, sequence_at(a_, s0 + n / kv_heads()), kv0 + n % kv_heads());
    }
    for (int64_t member = 0; member < (sharing_.heads ? 1 : kernel_.group); member++)
      for (int64_t t = 0; t < tiles_; t++) slice_tile(s0, kv0 * kernel_.group + member, t, true, w);
    for (int64_t n = 0; n < sequences() * kv_heads(); n++) {
      KeySums sums = key_sums(w, n);
      sums.kv_head = kv0 + n % kv_heads();
      const Sequence seq = sequence_at(a_, s0 + n / kv_heads());
      kernel_.write_keys(sums, seq, 0, seq.keys);
    }
  }

  void slice_tile(int64_t s0, int64_t h0, int64_t t, bool with_keys, Worker& w) const {
    const int64_t heads = sharing_.heads ? a_.Hq : 1;
    for (int64_t n = 0; n < sequences() * heads; n++) {
      const int64_t s = s0 + n / heads, h = h0 + n % heads;
      KeySums sums = key_sums(w, n / heads * kv_heads() + (h - h0) / kernel_.group);
      const BiasRows rows{reinterpret_cast<char*>(w.bias), a_.Tk * 4, true, n > 0};
      const Unit u{s, h / kernel_.group, h % kernel_.group, t, false, false};
      kernel_.run(sequence_at(a_, s), u, rows, with_keys ? &sums : nullptr, w.scratch);
    }
    const BiasRows to = bias_rows(a_, s0, h0, t * tile);
    for (int64_t r = 0; r < clamp(a_.Tq - t * tile, 0, tile); r++) to.put(r, 0, w.bias + r * a_.Tk, a_.Tk);
  }

  const AttentionBackward& a_;
  const Backward<T> kernel_;
  const BiasSharing& sharing_;
  const int64_t most_keys_, tiles_;
};

// Heads that several workers had: their sums are added in the order of the workers.
template <class T>
void join(const Backward<T>& kernel, KeySums* sums, int64_t count, const Parallel& parallel) {
  for (int64_t n = 0, next; n < count; n = next) {
    for (next = n + 1; next < count && (sums[next].sequence < 0 || sums[next].of(sums[n]));) next++;
    if (sums[n].sequence < 0) {
      next = n + 1;
      continue;
    }
    const Sequence seq = sequence_at(kernel.a, sums[n].sequence);
    const int64_t workers = clamp(parallel.threads, 1, ceil_div(seq.keys + 1, block_keys));
    auto job = [&](int64_t begin, int64_t end) {
      auto block_at = [&](int64_t n) { return clamp(round_up(seq.keys * n / workers, block_keys), 0, seq.keys); };
      const int64_t first = block_at(begin), last = block_at(end);
      for (int64_t m = n + 1; m < next; m++) {
        if (sums[m].sequence < 0) continue;
        auto add = [](float* to, const float* from, int64_t i, int64_t end) {
          for (; i < end; i += VL) store(to + i, load(to + i) + load(from + i));
        };
        add(sums[n].dk, sums[m].dk, first * kernel.sums_q, round_up(last, block_keys) * kernel.sums_q);
        add(sums[n].dv, sums[m].dv, first * kernel.sums_v, round_up(last, block_keys) * kernel.sums_v);
      }
      kernel.write_keys(sums[n], seq, first, last);
    };
    parallel(workers, job);
  }
}

template <class T>
void backward(const AttentionBackward& a, const Parallel& parallel) {
  const Backward<T> kernel(a);
  const Plan plan(a, tile, parallel.threads);
  const int workers = plan.workers();
  const BiasSharing sharing(a, workers);
  if (sharing.with_keys) {
    SharedBias<T>(a, sharing, plan.most_keys()).run(workers, parallel);
    return clear_unused<T>(a);
  }
  const int64_t rows = round_up(plan.most_keys(), block_keys);
  Scratch scratch;
  KeySums* sums = nullptr;  // of each worker: the head that another one began, the head that it begins
  float *dk = nullptr, *dv = nullptr;
  for (int pass = 0; pass < 2; pass++) {
    scratch.take(sums, 2 * workers);
    scratch.take(dk, 2 * workers * rows * kernel.sums_q), scratch.take(dv, 2 * workers * rows * kernel.sums_v);
    if (pass == 0) scratch.allocate();
  }
  for (int n = 0; n < 2 * workers; n++) sums[n] = {dk + n * rows * kernel.sums_q, dv + n * rows * kernel.sums_v};

  auto job = [&](int64_t begin, int64_t end) {
    Scratch local;
    BackwardScratch<WordsOf<T>> w(a, plan.most_keys());
    w.take(local), local.allocate(), w.take(local);
    [[maybe_unused]] const tiles::InUse in_use;
    for (int64_t worker = begin; worker < end; worker++) {
      KeySums *const continued = sums + 2 * worker, *const own = continued + 1, *now = nullptr;
      plan.each(worker, [&](const Unit& u, const Sequence& seq) {
        if (u.first || !now) kernel.begin_head(*(now = u.first ? own : continued), seq, u.kv_head);
        const int64_t h = u.kv_head * kernel.group + u.member;
        const BiasRows bias = sharing.shared() ? BiasRows{} : bias_rows(a, u.sequence, h, u.tile * tile);
        kernel.run(seq, u, bias, now, w);
        if (!u.last) return;
        if (now == own) {
          kernel.write_keys(*own, seq, 0, seq.keys);
          own->sequence = -1;
        }
        now = nullptr;
      });
    }
  };
  parallel(workers, job);
  join(kernel, sums, 2 * workers, parallel);
  clear_unused<T>(a);
  if (sharing.shared()) SharedBias<T>(a, sharing, plan.most_keys()).run(workers, parallel);
}

}  // namespace

void attention_backward(const AttentionBackward& a, const Parallel& p) {
  if (a.dtype == DType::bf16) return backward<bf16>(a, p);
  if constexpr (!has_dot) backward<float>(a, p);  // see dispatch.cpp
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
