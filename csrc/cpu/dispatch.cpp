// The public CPU entry points: each call goes to the copy of the kernel compiled for the active instruction set.
#include "seqfuse/attention.h"
#include "seqfuse/beam.h"
#include "seqfuse/cross_entropy.h"
#include "seqfuse/gated.h"
#include "seqfuse/layer_norm.h"
#include "seqfuse/linear.h"
#include "seqfuse/luong.h"
#include "seqfuse/matrix_product.h"
#include "seqfuse/rnn.h"
#include "seqfuse/rnn_cell.h"
#include "seqfuse/rnn_ragged.h"
#include "seqfuse/rope.h"

#define SEQFUSE_CASE(level, kernel) \
  case Isa::level:                  \
    return kernel(args, parallel);
#define SEQFUSE_DECLARE(level, fn, Args)        \
  namespace level {                             \
  void fn(const Args& args, const Parallel& p); \
  }

// one line an op: entry point, kernel, arguments
#define SEQFUSE_CPU_OPS(X)                                     \
  X(attention_decode_cpu, attention_decode, AttentionDecode)   \
  X(kv_cache_append_cpu, kv_cache_append, KvCacheAppend)       \
  X(beam_step_cpu, beam_step, BeamStep)                        \
  X(luong_readout_cpu, luong_readout, LuongReadout)            \
  X(rope_cpu, rope, Rope)                                      \
  X(rnn_cell_forward_cpu, rnn_cell_forward, RnnCellForward)    \
  X(rnn_cell_backward_cpu, rnn_cell_backward, RnnCellBackward) \
  X(rnn_ragged_copy_cpu, rnn_ragged_copy, RaggedCopy)          \
  X(rnn_ragged_shift_cpu, rnn_ragged_shift, RaggedShift)       \
  X(matrix_product_cpu, matrix_product, MatrixProduct)

// those whose bf16 calls multiply pairs where the processor does, quickly
#define SEQFUSE_CPU_OPS_WITH_DOTS(X) X(linear_forward_cpu, linear_forward, LinearForward)

// and tiles
#define SEQFUSE_CPU_OPS_WITH_TILES(X)                              \
  X(attention_forward_cpu, attention_forward, AttentionForward)    \
  X(attention_backward_cpu, attention_backward, AttentionBackward) \
  X(rnn_forward_cpu, rnn_forward_scan, RnnForward)                 \
  X(rnn_backward_cpu, rnn_backward_scan, RnnBackward)              \
  X(rnn_cell_step_cpu, rnn_cell_step, RnnCellStep)                 \
  X(rnn_cell_products_cpu, rnn_cell_products, RnnCellProducts)

// those whose bf16 calls narrow by an instruction where the processor has one
#define SEQFUSE_CPU_OPS_THAT_NARROW(X)                            \
  X(cross_entropy_rows_cpu, cross_entropy_rows, CrossEntropyRows) \
  X(kl_rows_cpu, kl_rows, KlRows)                                 \
  X(gated_forward_cpu, gated_forward, GatedForward)               \
  X(gated_backward_cpu, gated_backward, GatedBackward)            \
  X(layer_norm_forward_cpu, layer_norm_forward, LayerNormForward) \
  X(layer_norm_backward_cpu, layer_norm_backward, LayerNormBackward)

namespace seqfuse {

// isa: of a call in bf16; others, and fp32, use nothing above AVX-512
#define SEQFUSE_DEFINE(entry, fn, Args, isa, cases)        \
  void entry(const Args& args, const Parallel& parallel) { \
    switch (isa) {                                         \
      cases;                                               \
      default:                                             \
        return baseline::fn(args, parallel);               \
    }                                                      \
  }

#if defined(__x86_64__)
#define SEQFUSE_LEVELS(fn, Args)      \
  SEQFUSE_DECLARE(baseline, fn, Args) \
  SEQFUSE_DECLARE(avx2, fn, Args) SEQFUSE_DECLARE(avx512, fn, Args)
#define SEQFUSE_CASES(fn) SEQFUSE_CASE(avx2, avx2::fn) SEQFUSE_CASE(avx512, avx512::fn)
#define SEQFUSE_BF16_CASE(level, fn, ns) SEQFUSE_CASE(level, (args.dtype == DType::bf16 ? ns::fn : avx512::fn))
#define SEQFUSE_OP(entry, fn, Args)             \
  SEQFUSE_LEVELS(fn, Args)                      \
  SEQFUSE_DEFINE(entry, fn, Args, isa_active(), \
                 SEQFUSE_CASES(fn) SEQFUSE_CASE(avx512_bf16, avx512::fn) SEQFUSE_CASE(amx, avx512::fn))
#define SEQFUSE_OP_OF_TWO(entry, fn, Args, isa)                                    \
  SEQFUSE_LEVELS(fn, Args)                                                         \
  SEQFUSE_DECLARE(avx512_bf16, fn, Args)                                           \
  SEQFUSE_DEFINE(entry, fn, Args, isa,                                             \
                 SEQFUSE_CASES(fn) SEQFUSE_BF16_CASE(avx512_bf16, fn, avx512_bf16) \
                     SEQFUSE_BF16_CASE(amx, fn, avx512_bf16))
#define SEQFUSE_OP_THAT_NARROWS(entry, fn, Args) SEQFUSE_OP_OF_TWO(entry, fn, Args, isa_active())
#define SEQFUSE_OP_WITH_DOTS(entry, fn, Args) SEQFUSE_OP_OF_TWO(entry, fn, Args, isa_for_bf16_products())
#define SEQFUSE_OP_WITH_TILES(entry, fn, Args)             \
  SEQFUSE_LEVELS(fn, Args)                                 \
  SEQFUSE_DECLARE(avx512_bf16, fn, Args)                   \
  SEQFUSE_DECLARE(amx, fn, Args)                           \
  SEQFUSE_DEFINE(entry, fn, Args, isa_for_bf16_products(), \
                 SEQFUSE_CASES(fn) SEQFUSE_BF16_CASE(avx512_bf16, fn, avx512_bf16) SEQFUSE_BF16_CASE(amx, fn, amx))
#else
#define SEQFUSE_OP(entry, fn, Args)   \
  SEQFUSE_DECLARE(baseline, fn, Args) \
  SEQFUSE_DEFINE(entry, fn, Args, isa_active(), )
#define SEQFUSE_OP_THAT_NARROWS SEQFUSE_OP
#define SEQFUSE_OP_WITH_DOTS SEQFUSE_OP
#define SEQFUSE_OP_WITH_TILES SEQFUSE_OP
#endif

SEQFUSE_CPU_OPS(SEQFUSE_OP)
SEQFUSE_CPU_OPS_THAT_NARROW(SEQFUSE_OP_THAT_NARROWS)
SEQFUSE_CPU_OPS_WITH_DOTS(SEQFUSE_OP_WITH_DOTS)
SEQFUSE_CPU_OPS_WITH_TILES(SEQFUSE_OP_WITH_TILES)

}  // namespace seqfuse
