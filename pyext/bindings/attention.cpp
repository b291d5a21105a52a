// seqfuse::attention_fwd / attention_bwd / attention_decode / kv_cache_append: the schemas. Meaning:
// reference/attention.py.
#include "common.h"

namespace seqfuse {

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

}  // namespace seqfuse
