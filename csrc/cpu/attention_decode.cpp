// Attention over a cache of keys and values, for a few queries. Contract: seqfuse/attention.h
//
// What takes the time is reading the cache, so it is read once, in place, for all query heads that share it, and asked
// for `keys_ahead` rows before, for what the hardware fetches ahead ends with each page of memory: for a block of keys
// the scores of every query (dot products along the rows), their softmax (see attention_forward.cpp), and
// the sum over the block's values. Long caches are split among the workers (Dao et al. 2023, "flash decoding"); parts
// are put together by their maxima and sums, in order:
//
//   m = max_n m_n,  l = sum_n l_n 2^(m_n - m),  out = sum_n out_n 2^(m_n - m) / l
#include "cpu/attention_scores.h"

namespace seqfuse {
namespace SEQFUSE_ISA {
namespace {

// Where the keys of one sequence are, for one head.
template <class T>
struct Cache {
  const T* base;
  int64_t row, page_stride;
  int64_t page, pages;  // 0: no pages
  const IndexView* table;
  int64_t first_entry, total_pages;

  SEQFUSE_INLINE T* at(int64_t j) const {
    if (!page) return const_cast<T*>(base) + j * row;
    const int64_t index = clamp(index_at(*table, first_entry + j / page), 0, total_pages - 1);
    return const_cast<T*>(base) + index * page_stride + j % page * row;
  }
};

template <class T, class Args>
Cache<T> cache_of(const Args& a, const HeadsView& v, int64_t b, int64_t kv_head) {
  const T* base = static_cast<const T*>(v.data) + kv_head * v.head + (a.page ? 0 : b * v.batch);
  return {base, v.row, v.batch, a.page, a.pages, &a.block_table, b * a.pages, a.total_pages};
}

constexpr int64_t keys_ahead = 8;

// Scores of VL keys for one query: q is padded with zeros to whole pairs, and in the order of pairs of T. A key is read
// to its end before the next, for that is what the hardware fetches ahead. Fetch: whether to ask for later keys too.
template <bool Fetch, class T>
SEQFUSE_INLINE vf dots(const float* q, const T* const* keys, int64_t D) {
  vf acc[VL];
  for (int l = 0; l < VL; l++) {
    vf even{}, odd{};
    for_pairs(D, [&](int64_t d, int n) __attribute__((always_inline)) {
      if constexpr (Fetch) prefetch_pair(keys[l + keys_ahead] + d);
      const vp key = take_pair(keys[l] + d, n);
      even += load(q + d) * key.a, odd += load(q + d + VL) * key.b;
    });
    acc[l] = even + odd;
  }
  transpose(acc);
#pragma GCC unroll 8
  for (int n = VL / 2; n > 0; n /= 2)
#pragma GCC unroll 8
    for (int l = 0; l < n; l++) acc[l] += acc[l + n];
  return acc[0];
}

// out[0..P pairs) += sum over j < n of weights[j] * values[j][d..], in the order of pairs of T
template <int P, bool Fetch, class T>
SEQFUSE_INLINE void add_values(const float* weights, const T* const* values, int64_t n, int64_t d, float* out) {
  vf acc[2 * P];
#pragma GCC unroll 8
  for (int v = 0; v < 2 * P; v++) acc[v] = load(out + v * VL);
  for (int64_t j = 0; j < n; j++) {
    const vf w = splat(weights[j]);
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      if constexpr (Fetch) prefetch_pair(values[j + keys_ahead] + d + p * PL);
      const vp value = load_pair(values[j] + d + p * PL);
      acc[2 * p] += w * value.a, acc[2 * p + 1] += w * value.b;
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < 2 * P; v++) store(out + v * VL, acc[v]);
}

template <bool Fetch, class T>
SEQFUSE_INLINE void add_all_values(const float* weights, const T* const* values, int64_t n, int64_t Dv, float* out) {
  int64_t d = 0;
  for (; d + 4 * PL <= Dv; d += 4 * PL) add_values<4, Fetch>(weights, values, n, d, out + d);
  for (; d + PL <= Dv; d += PL) add_values<1, Fetch>(weights, values, n, d, out + d);
  if (d == Dv) return;
  for (int64_t j = 0; j < n; j++) {
    const vp value = take_pair(values[j] + d, int(Dv - d));
    store(out + d, load(out + d) + weights[j] * value.a),
        store(out + d + VL, load(out + d + VL) + weights[j] * value.b);
  }
}

// The result so far of all queries of a head group, over one part of its keys.
struct Part {
  float *m, *l, *out;  // [rows], [rows], [rows, round_up(Dv, PL)]; out in the order of pairs
};

template <class T>
struct Decode {
  const AttentionDecode& a;
  const int64_t group, rows, padded_q, padded;

  explicit Decode(const AttentionDecode& a)
      : a(a), group(a.Hq / a.Hkv), rows(group * a.Tq), padded_q(round_up(a.D, PL)), padded(round_up(a.Dv, PL)) {}

  Sequence sequence(int64_t b) const {
    const int64_t length = index_at(a.lengths, b);
    return {b, b, 0, a.Tq, 0, clamp(length, 0, a.Tk), length - a.Tq, a.window_left, a.window_right};
  }

  // Part `part` of `parts` of the keys that any query sees. q: scratch [rows, padded_q], weights: [block_keys].
  void run(int64_t b, int64_t kv_head, int64_t part, int64_t parts, const Part& to, float* q, float* weights) const {
    const Sequence seq = sequence(b);
    const Range seen = seq.seen_by(0, a.Tq);
    const int64_t keys = seen.empty() ? 0 : seen.end - seen.begin;
    const Range mine{seen.begin + keys * part / parts, seen.begin + keys * (part + 1) / parts};
    for (int64_t r = 0; r < rows; r++) {
      to.m[r] = -__builtin_inff(), to.l[r] = 0.0f;
      memset(to.out + r * padded, 0, sizeof(float) * size_t(padded));
      const T* from = row_of<T>(a.q, b, kv_head * group + r / a.Tq, r % a.Tq);
      for_pairs(a.D, [=, this](int64_t d, int n) {
        const vp x = take_pair(from + d, n);
        store(q + r * padded_q + d, x.a), store(q + r * padded_q + d + VL, x.b);
      });
    }
    const Cache<T> keys_of = cache_of<T>(a, a.k, b, kv_head), values_of = cache_of<T>(a, a.v, b, kv_head);
    const T *key[block_keys + keys_ahead], *value[block_keys + keys_ahead];
    for (int64_t first = mine.begin; first < mine.end; first += block_keys) {
      const int64_t n = clamp(mine.end - first, 0, block_keys);
      const Range columns{0, round_up(n, 2 * VL)};
      const int64_t known = clamp(mine.end - first, 0, block_keys + keys_ahead);  // beyond: any key stands in
      for (int64_t j = 0; j < known; j++) key[j] = keys_of.at(first + j), value[j] = values_of.at(first + j);
      for (int64_t j = known; j < block_keys + keys_ahead; j++) key[j] = key[0], value[j] = value[0];
      for (int64_t r = 0; r < rows; r++) {
        const float* query = q + r * padded_q;
        for (int64_t j = 0; j < columns.end; j += VL)
          store(weights + j, r ? dots<false>(query, key + j, a.D) : dots<true>(query, key + j, a.D));
        const int64_t h = kv_head * group + r / a.Tq, i = r % a.Tq;
        const ScoreRule rule = rule_of(b, h);
        if (!rule.plain) rule.apply(weights, i, i + seq.shift, first, columns, seq.keys, nullptr);
        const Range row = seq.seen(i);
        hide(weights, columns, {row.begin - first, clamp(row.end - first, 0, n)});
        softmax_row(weights, columns, rule.factor, to.m[r], to.l[r], to.out + r * padded, padded);
        float* out = to.out + r * padded;
        r ? add_all_values<false>(weights, value, n, a.Dv, out) : add_all_values<true>(weights, value, n, a.Dv, out);
      }
    }
  }

  // puts `parts` parts of one head group together, into the first of them, and writes the result
  void finish(int64_t b, int64_t kv_head, int64_t parts, const Part* part) const {
    for (int64_t r = 0; r < rows; r++) {
      float m = part[0].m[r], l = 0.0f;
      for (int64_t n = 1; n < parts; n++) m = part[n].m[r] > m ? part[n].m[r] : m;
      const bool none = m == -__builtin_inff();
      for (int64_t n = 0; n < parts; n++) {
        const float weight = none || part[n].m[r] == m ? 1.0f : exp2(part[n].m[r] - m);
        float *to = part[0].out + r * padded, *from = part[n].out + r * padded;
        for (int64_t d = 0; d < padded; d += VL)
          store(to + d, n ? load(to + d) + load(from + d) * weight : load(to + d) * weight);
        l += part[n].l[r] * weight;
      }
      const int64_t h = kv_head * group + r / a.Tq, t = r % a.Tq;
      const float *from = part[0].out + r * padded, factor = none ? 1.0f : 1.0f / l;
      T* out = row_to_write<T>(a.out, b, h, t);
      for_pairs(a.Dv, [=](int64_t d, int n) {
        give_pair(out + d, vp{load(from + d) * factor, load(from + d + VL) * factor}, n);
      });
      a.lse[(b * a.Hq + h) * a.Tq + t] = none ? m : natural(m, l);
    }
  }

 private:
  ScoreRule rule_of(int64_t b, int64_t h) const {
    ScoreRule rule{};
    rule.scale = a.scale, rule.softcap = a.softcap;
    rule.slope = a.alibi_slopes ? a.alibi_slopes[b * a.alibi_batch + h] : 0.0f;
    rule.plain = rule.softcap == 0.0f && rule.slope == 0.0f && rule.scale > 0.0f;
    rule.factor = float(rule.plain ? rule.scale * log2_e : log2_e);
    return rule;
  }
};

constexpr int64_t least_part = 4 * block_keys;  // keys that are worth a part of their own

template <class T>
void decode(const AttentionDecode& a, const Parallel& parallel) {
  const Decode<T> kernel(a);
  const int64_t heads = a.B * a.Hkv, rows = kernel.rows;
  int64_t longest = 0, bytes = 0;
  for (int64_t b = 0; b < a.B; b++) {
    const Range seen = kernel.sequence(b).seen_by(0, a.Tq);
    const int64_t keys = seen.empty() ? 0 : seen.end - seen.begin;
    if (keys > longest) longest = keys;
    bytes += keys * a.Hkv * (a.D + a.Dv) * int64_t(sizeof(T));
  }
  const int64_t workers = clamp(bytes * rows / (1 << 17), 1, parallel.threads);
  const int64_t wanted = workers == 1 ? 1 : ceil_div(4 * workers, heads);  // several parts each even out the lengths
  const int64_t parts = clamp(longest / least_part, 1, wanted), tasks = heads * parts;
  Scratch scratch;
  Part* part = nullptr;
  float *q = nullptr, *sums = nullptr, *weights = nullptr, *out = nullptr;
  for (int pass = 0; pass < 2; pass++) {
    scratch.take(part, tasks), scratch.take(sums, tasks * rows * 2), scratch.take(out, tasks * rows * kernel.padded);
    scratch.take(q, workers * rows * kernel.padded_q), scratch.take(weights, workers * block_keys);
    if (pass == 0) scratch.allocate();
  }
  for (int64_t n = 0; n < tasks; n++)
    part[n] = {sums + n * rows * 2, sums + n * rows * 2 + rows, out + n * rows * kernel.padded};
  auto job = [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; worker++)
      for (int64_t n = tasks * worker / workers; n < tasks * (worker + 1) / workers; n++) {
        const int64_t head = n / parts, b = head / a.Hkv, kv_head = head % a.Hkv;
        kernel.run(b, kv_head, n % parts, parts, part[n], q + worker * rows * kernel.padded_q,
                   weights + worker * block_keys);
        if (parts == 1) kernel.finish(b, kv_head, 1, part + n);
      }
  };
  parallel(workers, job);
  if (parts > 1)
    for (int64_t head = 0; head < heads; head++) kernel.finish(head / a.Hkv, head % a.Hkv, parts, part + head * parts);
}

template <class T>
void append(const KvCacheAppend& a, const Parallel& parallel) {
  auto job = [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; head++) {
      const int64_t b = head / a.Hkv, h = head % a.Hkv, length = index_at(a.lengths, b);
      const Cache<T> keys = cache_of<T>(a, a.k_cache, b, h), values = cache_of<T>(a, a.v_cache, b, h);
      for (int64_t t = 0; t < a.Tn; t++) {
        if (length + t < 0 || length + t >= a.Tk) continue;
        memcpy(keys.at(length + t), row_of<T>(a.k, b, h, t), sizeof(T) * size_t(a.D));
        memcpy(values.at(length + t), row_of<T>(a.v, b, h, t), sizeof(T) * size_t(a.Dv));
      }
    }
  };
  const int64_t heads = a.B * a.Hkv;
  if (heads * a.Tn * (a.D + a.Dv) < 1 << 16) return job(0, heads);
  parallel(heads, job);
}

}  // namespace

void attention_decode(const AttentionDecode& a, const Parallel& p) {
  a.dtype == DType::f32 ? decode<float>(a, p) : decode<bf16>(a, p);
}

void kv_cache_append(const KvCacheAppend& a, const Parallel& p) {
  a.dtype == DType::f32 ? append<float>(a, p) : append<bf16>(a, p);
}

}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
