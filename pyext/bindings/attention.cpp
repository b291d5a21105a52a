// seqfuse::attention_fwd / attention_bwd / attention_decode / kv_cache_append. Meaning: reference/attention.py;
// contract: csrc/include/seqfuse/attention.h
#include "seqfuse/attention.h"

#include "common.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace seqfuse {
namespace {

// [B, H, T, D] as kernels take it; a tensor whose last dimension is not dense is copied
Tensor rows_dense(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, name, " must have four dimensions, [B, H, T, D], not ", t.dim());
  return t.stride(3) == 1 || t.size(3) <= 1 ? t : torch::stable::contiguous(t);
}

HeadsView view_of(const Tensor& t) {
  return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

void check_cpu_dtype(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16, name,
                  ": the CPU kernel takes float32 and bfloat16");
}

void check_like(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, " must have the dtype of q");
  check_same_device(t, like, name);
}

void check_shape(const Tensor& t, std::initializer_list<int64_t> shape, const char* name) {
  bool same = t.dim() == int64_t(shape.size());
  int64_t i = 0;
  for (int64_t n : shape) same = same && t.size(i++) == n;
  STD_TORCH_CHECK(same, name, " has the wrong shape");
}

// The layout of ops/attention_op.py's empty_like: [B, H, T, width], in the order of dimensions of t.
Tensor empty_like(const Tensor& t, int64_t width) {
  const int64_t B = t.size(0), H = t.size(1), T = t.size(2);
  if (T > 1 && t.stride(1) < t.stride(2)) return torch::stable::transpose(empty(t, {B, T, H, width}), 1, 2);
  return empty(t, {B, H, T, width});
}

// Fresh memory costs a page fault for each 4 KiB: 2.7 ns a float in a virtual machine in which all of a backward pass
// took 9 ns a score. Asks for pages of 2 MiB, which the system may give or not.
void ask_for_huge_pages(const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096, worth_it = 8 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t end = begin + uintptr_t(t.numel()) * uintptr_t(t.element_size());
  const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
  if (end - begin >= worth_it) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// A dense vector of indices of its own, or null.
IndexView indices(std::optional<Tensor>& t, const Tensor& like, int64_t count, const char* name) {
  if (!t) return {nullptr, false};
  check_same_device(*t, like, name);
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Int || t->scalar_type() == ScalarType::Long, name,
                  " must be int32 or int64");
  STD_TORCH_CHECK(t->numel() == count, name, " must have ", count, " elements");
  t = dense(*t);
  return {t->const_data_ptr(), t->scalar_type() == ScalarType::Long};
}

// t broadcast over [B, Hq, Tq, Tk]; rows: whether its third dimension must be Tq
ScoresView scores_view(const std::optional<Tensor>& t, const AttentionProblem& a, const Tensor& like,
                       const char* name) {
  if (!t) return {};
  check_same_device(*t, like, name);
  STD_TORCH_CHECK(t->dim() == 4, name, " must have four dimensions");
  const int64_t full[4] = {a.B, a.Hq, a.Tq, a.Tk};
  int64_t strides[4];
  for (int64_t i = 0; i < 4; i++) {
    STD_TORCH_CHECK(t->size(i) == full[i] || t->size(i) == 1, name, " must be broadcastable to [B, Hq, Tq, Tk]");
    strides[i] = t->size(i) == 1 ? 0 : t->stride(i);
  }
  return {t->const_data_ptr(), strides[0], strides[1], strides[2], strides[3]};
}

const float* slopes_of(std::optional<Tensor>& t, const Tensor& like, int64_t sequences, int64_t heads,
                       int64_t* stride) {
  *stride = 0;
  if (!t) return nullptr;
  check_same_device(*t, like, "alibi_slopes");
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float, "alibi_slopes must be float32");
  const bool single = t->dim() == 1 || (t->dim() == 2 && t->size(0) == 1);
  STD_TORCH_CHECK(t->size(t->dim() - 1) == heads && (single || (t->dim() == 2 && t->size(0) == sequences)),
                  "alibi_slopes must be [Hq] or [B, Hq]");
  t = dense(*t);
  if (!single) *stride = heads;
  return static_cast<const float*>(t->const_data_ptr());
}

// The ops' arguments behind q, k, v, in their order, and what must live as long as the kernel runs.
struct Options {
  std::optional<Tensor> bias, mask, alibi_slopes, key_lengths, cu_seqlens_q, cu_seqlens_k, query_start, seed;
  double scale;
  int64_t window_left, window_right;
  bool top_left;
  double softcap, dropout_p;

  void fill(AttentionProblem& a, const Tensor& q, const Tensor& k, const Tensor& v) {
    check_cpu_dtype(q, "q");
    check_like(k, q, "k"), check_like(v, q, "v");
    a.dtype = dtype_of(q, "q");
    a.B = q.size(0), a.Hq = q.size(1), a.Tq = q.size(2), a.D = q.size(3);
    a.Hkv = k.size(1), a.Tk = k.size(2), a.Dv = v.size(3);
    check_shape(k, {a.B, a.Hkv, a.Tk, a.D}, "k"), check_shape(v, {a.B, a.Hkv, a.Tk, a.Dv}, "v");
    STD_TORCH_CHECK(a.Hkv ? a.Hq % a.Hkv == 0 : a.Hq == 0, "q's ", a.Hq, " heads must be a multiple of k's ", a.Hkv);
    a.q = view_of(q), a.k = view_of(k), a.v = view_of(v);
    a.bias = scores_view(bias, a, q, "bias"), a.mask = scores_view(mask, a, q, "mask");
    if (bias) {
      a.bias_dtype = dtype_of(*bias, "bias");
      STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float || bias->scalar_type() == q.scalar_type(),
                      "bias must have the dtype of q, or be float32");
    }
    STD_TORCH_CHECK(!mask || mask->scalar_type() == ScalarType::Bool, "mask must be bool");
    STD_TORCH_CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(), "cu_seqlens_q and cu_seqlens_k go together");
    a.sequences = a.B;
    if (cu_seqlens_q) {
      STD_TORCH_CHECK(a.B == 1, "packed sequences need a batch of 1");
      STD_TORCH_CHECK(!bias && !mask && !key_lengths && !query_start,
                      "packed sequences go with neither bias, mask, key_lengths nor query_start");
      STD_TORCH_CHECK(cu_seqlens_q->numel() >= 1, "cu_seqlens_q must not be empty");
      a.sequences = cu_seqlens_q->numel() - 1;
    }
    a.cu_seqlens_q = indices(cu_seqlens_q, q, a.sequences + 1, "cu_seqlens_q");
    a.cu_seqlens_k = indices(cu_seqlens_k, q, a.sequences + 1, "cu_seqlens_k");
    a.key_lengths = indices(key_lengths, q, a.B, "key_lengths");
    a.query_start = indices(query_start, q, a.B, "query_start");
    a.alibi_slopes = slopes_of(alibi_slopes, q, a.sequences, a.Hq, &a.alibi_batch);
    STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p <= 1.0, "dropout_p must be between 0 and 1");
    if (dropout_p > 0.0) {
      STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                      "dropout needs a seed: int64 [1]");
      a.seed = static_cast<const int64_t*>(seed->const_data_ptr());
    }
    a.scale = float(scale), a.softcap = float(softcap), a.dropout_p = dropout_p;
    a.window_left = window_left, a.window_right = window_right, a.top_left = top_left;
  }
};

#define SEQFUSE_OPTION_PARAMETERS                                                                                \
  std::optional<Tensor> bias, std::optional<Tensor> mask, std::optional<Tensor> alibi_slopes,                    \
      std::optional<Tensor> key_lengths, std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k, \
      std::optional<Tensor> query_start, std::optional<Tensor> seed, double scale, int64_t window_left,          \
      int64_t window_right, bool top_left, double softcap, double dropout_p
#define SEQFUSE_OPTION_ARGUMENTS                                                     \
  {bias, mask,  alibi_slopes, key_lengths,  cu_seqlens_q, cu_seqlens_k, query_start, \
   seed, scale, window_left,  window_right, top_left,     softcap,      dropout_p}

std::tuple<Tensor, Tensor> forward_cpu(Tensor q_in, Tensor k_in, Tensor v_in, SEQFUSE_OPTION_PARAMETERS) {
  const Tensor q = rows_dense(q_in, "q"), k = rows_dense(k_in, "k"), v = rows_dense(v_in, "v");
  Options options SEQFUSE_OPTION_ARGUMENTS;
  AttentionForward a{};
  options.fill(a, q, k, v);
  Tensor out = empty_like(q_in, a.Dv), lse = empty(q, {a.B, a.Hq, a.Tq}, ScalarType::Float);
  a.out = view_of(out), a.lse = pointer<float>(lse);
  if (lse.numel()) attention_forward_cpu(a, torch_threads());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cpu(Tensor dout_in, std::optional<Tensor> dlse_in, Tensor q_in,
                                                        Tensor k_in, Tensor v_in, Tensor out_in, Tensor lse_in,
                                                        SEQFUSE_OPTION_PARAMETERS, bool want_dbias,
                                                        bool deterministic) {
  const Tensor q = rows_dense(q_in, "q"), k = rows_dense(k_in, "k"), v = rows_dense(v_in, "v");
  const Tensor dout = rows_dense(dout_in, "dout"), out = rows_dense(out_in, "out"), lse = dense(lse_in);
  Options options SEQFUSE_OPTION_ARGUMENTS;
  AttentionBackward a{};
  options.fill(a, q, k, v);
  check_like(dout, q, "dout"), check_like(out, q, "out");
  check_shape(dout, {a.B, a.Hq, a.Tq, a.Dv}, "dout"), check_shape(out, {a.B, a.Hq, a.Tq, a.Dv}, "out");
  check_shape(lse, {a.B, a.Hq, a.Tq}, "lse");
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float, "lse must be float32");
  std::optional<Tensor> dlse;
  if (dlse_in) {
    dlse = dense(*dlse_in);
    check_shape(*dlse, {a.B, a.Hq, a.Tq}, "dlse");
    STD_TORCH_CHECK(dlse->scalar_type() == ScalarType::Float, "dlse must be float32");
  }
  STD_TORCH_CHECK(!want_dbias || bias, "want_dbias needs a bias");
  a.dout = view_of(dout), a.out = view_of(out), a.lse = static_cast<const float*>(lse.const_data_ptr());
  a.dlse = static_cast<const float*>(pointer_or_null(dlse));
  Tensor dq = empty_like(q_in, a.D), dk = empty_like(k_in, a.D), dv = empty_like(v_in, a.Dv);
  a.dq = view_of(dq), a.dk = view_of(dk), a.dv = view_of(dv);
  Tensor dbias = want_dbias ? new_like(*bias) : empty(q, {0});
  if (want_dbias) {
    a.dbias_batch = bias->size(0), a.dbias_heads = bias->size(1);
    STD_TORCH_CHECK(bias->size(2) == a.Tq && bias->size(3) == a.Tk, "a bias with gradient must be [1|B, 1|Hq, Tq, Tk]");
    a.dbias = pointer(dbias);
    ask_for_huge_pages(dbias);
  }
  if (a.B && a.Hq) {
    attention_backward_cpu(a, torch_threads());
  } else {
    for (Tensor t : {dq, dk, dv, dbias})
      if (t.numel()) torch::stable::zero_(t);
  }
  return {dq, dk, dv, dbias};
}

// What a dense cache [B, Hkv, T, *] and pages [P, Hkv, page, *] with a table [B, M] have in common: sets Tk, page,
// pages, total_pages and block_table of decode's or append's arguments.
template <class Args>
void fill_cache(Args& a, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, std::optional<Tensor>& table) {
  check_cpu_dtype(q, "q");
  check_like(k_cache, q, "k_cache"), check_like(v_cache, q, "v_cache");
  a.dtype = dtype_of(q, "q");
  a.Hkv = k_cache.size(1), a.D = k_cache.size(3), a.Dv = v_cache.size(3), a.Tk = k_cache.size(2);
  check_shape(v_cache, {k_cache.size(0), a.Hkv, a.Tk, a.Dv}, "v_cache");
  if (table) {
    STD_TORCH_CHECK(table->dim() == 2 && table->size(0) == a.B, "block_table must be [B, pages of a sequence]");
    a.page = a.Tk, a.pages = table->size(1), a.total_pages = k_cache.size(0), a.Tk = a.page * a.pages;
    STD_TORCH_CHECK(a.total_pages > 0 && a.page > 0, "k_cache has no pages");
    a.block_table = indices(table, q, a.B * a.pages, "block_table");
  } else {
    STD_TORCH_CHECK(k_cache.size(0) == a.B, "k_cache must have the batch of q, or a block_table");
  }
}

std::tuple<Tensor, Tensor> decode_cpu(Tensor q_in, Tensor k_in, Tensor v_in, Tensor lengths_in,
                                      std::optional<Tensor> block_table, std::optional<Tensor> alibi_slopes,
                                      double scale, int64_t window_left, int64_t window_right, double softcap) {
  const Tensor q = rows_dense(q_in, "q"), k = rows_dense(k_in, "k_cache"), v = rows_dense(v_in, "v_cache");
  AttentionDecode a{};
  a.B = q.size(0), a.Hq = q.size(1), a.Tq = q.size(2);
  fill_cache(a, q, k, v, block_table);
  STD_TORCH_CHECK(q.size(3) == a.D, "q and k_cache must have one head dimension");
  STD_TORCH_CHECK(a.Hkv ? a.Hq % a.Hkv == 0 : a.Hq == 0, "q's ", a.Hq, " heads must be a multiple of the cache's ",
                  a.Hkv);
  std::optional<Tensor> lengths = lengths_in;
  a.lengths = indices(lengths, q, a.B, "lengths");
  a.alibi_slopes = slopes_of(alibi_slopes, q, a.B, a.Hq, &a.alibi_batch);
  a.q = view_of(q), a.k = view_of(k), a.v = view_of(v);
  a.scale = float(scale), a.softcap = float(softcap), a.window_left = window_left, a.window_right = window_right;
  Tensor out = empty_like(q_in, a.Dv), lse = empty(q, {a.B, a.Hq, a.Tq}, ScalarType::Float);
  a.out = view_of(out), a.lse = pointer<float>(lse);
  if (lse.numel()) attention_decode_cpu(a, torch_threads());
  return {out, lse};
}

void append_cpu(Tensor k_cache, Tensor v_cache, Tensor k_in, Tensor v_in, Tensor lengths_in,
                std::optional<Tensor> block_table) {
  const Tensor k = rows_dense(k_in, "k"), v = rows_dense(v_in, "v");
  for (const Tensor& t : {k_cache, v_cache})
    STD_TORCH_CHECK(t.dim() == 4 && (t.stride(3) == 1 || t.size(3) <= 1),
                    "a cache must be dense in its last dimension");
  KvCacheAppend a{};
  a.B = k.size(0), a.Tn = k.size(2);
  fill_cache(a, k, k_cache, v_cache, block_table);
  check_like(v, k, "v");
  check_shape(k, {a.B, a.Hkv, a.Tn, a.D}, "k"), check_shape(v, {a.B, a.Hkv, a.Tn, a.Dv}, "v");
  std::optional<Tensor> lengths = lengths_in;
  a.lengths = indices(lengths, k, a.B, "lengths");
  for (int64_t b = 0; b < a.B; b++) {
    const int64_t n = a.lengths.wide ? static_cast<const int64_t*>(a.lengths.data)[b]
                                     : int64_t(static_cast<const int32_t*>(a.lengths.data)[b]);
    STD_TORCH_CHECK(n >= 0 && n + a.Tn <= a.Tk, "sequence ", b, " has ", n, " keys and gets ", a.Tn,
                    " more, but its cache holds ", a.Tk);
  }
  a.k_cache = view_of(k_cache), a.v_cache = view_of(v_cache), a.k = view_of(k), a.v = view_of(v);
  kv_cache_append_cpu(a, torch_threads());
}

}  // namespace

// the options are the fields of reference.AttentionOptions, in their order
#define SEQFUSE_ATTENTION_OPTIONS                                                                                    \
  "Tensor? bias, Tensor? mask, Tensor? alibi_slopes, Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? "            \
  "cu_seqlens_k, Tensor? query_start, Tensor? seed, float scale, int window_left, int window_right, bool top_left, " \
  "float softcap, float dropout_p"

STABLE_TORCH_LIBRARY_FRAGMENT(seqfuse, m) {
  m.def("attention_fwd(Tensor q, Tensor k, Tensor v, " SEQFUSE_ATTENTION_OPTIONS ") -> (Tensor out, Tensor lse)");
  m.def(
      "attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor "
      "lse, " SEQFUSE_ATTENTION_OPTIONS
      ", bool want_dbias, bool deterministic) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)");
  m.def(
      "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? block_table, "
      "Tensor? alibi_slopes, float scale, int window_left, int window_right, float softcap) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "kv_cache_append(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor lengths, "
      "Tensor? block_table) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(seqfuse, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&forward_cpu));
  m.impl("attention_bwd", TORCH_BOX(&backward_cpu));
  m.impl("attention_decode", TORCH_BOX(&decode_cpu));
  m.impl("kv_cache_append", TORCH_BOX(&append_cpu));
}

}  // namespace seqfuse
