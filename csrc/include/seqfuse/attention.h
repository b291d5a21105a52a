// Contract of scaled dot-product attention. Meaning of every option: pyext/seqfuse/reference/attention.py.
//
//   score(i, j) = softcap(scale * q_i . k_j) - slope * |p_i - j| + bias(i, j), and -inf where key j is hidden from i
//   out_i = sum_j dropout(softmax_j(score(i, j))) v_j,  lse_i = log sum_j exp(score(i, j))
//
// q [B, Hq, Tq, D], k [B, Hkv, Tk, D], v [B, Hkv, Tk, Dv] of `dtype`, Hq a multiple of Hkv, with any strides as long as
// the last dimension is dense. Results must not overlap anything else. Nothing is kept after a call returns, and no
// Tq x Tk matrix is ever made: scratch is linear in Tq and Tk.
#pragma once
#include "seqfuse/types.h"

namespace seqfuse {

// [B, H, T, *] with the strides of its first three dimensions, in elements
struct HeadsView {
  void* data;
  int64_t batch, head, row;
};

// broadcast to [B, Hq, Tq, Tk]: a stride is 0 where the dimension is 1. data null: none
struct ScoresView {
  const void* data;
  int64_t batch, head, row, column;
};

// a vector of int32 or, if wide, int64. data null: none
struct IndexView {
  const void* data;
  bool wide;
};

struct AttentionProblem {
  DType dtype;
  int64_t B, Hq, Hkv, Tq, Tk, D, Dv;
  HeadsView q, k, v;
  ScoresView bias;  // of bias_dtype: `dtype` or f32
  DType bias_dtype;
  ScoresView mask;                       // bytes; 0 hides the key
  const float* alibi_slopes;             // [Hq] or [sequences, Hq]; null: none
  int64_t alibi_batch;                   // stride of a sequence in it: 0 or Hq
  IndexView key_lengths, query_start;    // [B]
  IndexView cu_seqlens_q, cu_seqlens_k;  // [sequences + 1]; then B is 1
  int64_t sequences;                     // B where nothing is packed
  const int64_t* seed;                   // of dropout
  double dropout_p;
  float scale, softcap;               // softcap 0: none
  int64_t window_left, window_right;  // -1: no limit
  bool top_left;
};

struct AttentionForward : AttentionProblem {
  HeadsView out;  // [B, Hq, Tq, Dv]
  float* lse;     // [B, Hq, Tq]
};

struct AttentionBackward : AttentionProblem {
  HeadsView dout, out;
  const float* lse;
  const float* dlse;  // [B, Hq, Tq]; null: zero
  HeadsView dq, dk, dv;
  void* dbias;                       // [dbias_batch, dbias_heads, Tq, Tk] of bias_dtype, dense; null: not wanted
  int64_t dbias_batch, dbias_heads;  // B or 1, Hq or 1: summed over where it is 1
};

// One step of decoding: the last of the Tq queries of sequence b stands at key lengths[b] - 1. k and v are the caches;
// with a block table they are pages [P, Hkv, page, *], and sequence b's keys are in pages table[b, 0], table[b, 1], ...
struct AttentionDecode {
  DType dtype;
  int64_t B, Hq, Hkv, Tq, Tk, D, Dv;  // Tk: of the cache, or pages a sequence may have * page
  HeadsView q, k, v;                  // `batch` of k and v: stride of a page where there are pages
  IndexView lengths, block_table;     // [B], [B, pages]
  int64_t page, pages, total_pages;   // 0 without a table
  const float* alibi_slopes;
  int64_t alibi_batch;
  float scale, softcap;
  int64_t window_left, window_right;
  HeadsView out;
  float* lse;
};

// Writes k, v [B, Hkv, Tn, *] behind the first lengths[b] keys of each sequence's cache.
struct KvCacheAppend {
  DType dtype;
  int64_t B, Hkv, Tn, Tk, D, Dv;
  HeadsView k_cache, v_cache, k, v;
  IndexView lengths, block_table;
  int64_t page, pages, total_pages;
};

void attention_forward_cpu(const AttentionForward&, const Parallel&);
void attention_backward_cpu(const AttentionBackward&, const Parallel&);
void attention_decode_cpu(const AttentionDecode&, const Parallel&);
void kv_cache_append_cpu(const KvCacheAppend&, const Parallel&);

}  // namespace seqfuse
