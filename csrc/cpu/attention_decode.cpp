#include "cpu/attention_scores.h"
namespace seqfuse {
namespace SEQFUSE_ISA {
void attention_decode(const AttentionDecode&, const Parallel&) {}
void kv_cache_append(const KvCacheAppend&, const Parallel&) {}
}  // namespace SEQFUSE_ISA
}  // namespace seqfuse
