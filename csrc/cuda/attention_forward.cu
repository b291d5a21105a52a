// The launch of attention_forward.cuh, contract: seqfuse/attention_cuda.h.
#include "cuda/attention_forward.cuh"
#include "cuda/attention_launch.cuh"
#include "seqfuse/attention_cuda.h"

namespace seqfuse {
namespace {

using namespace cuda;

template <int D, bool Causal, class T>
int forward(const AttentionForwardCuda& a, void* stream) {
  ForwardArguments<T> p{};
  const int64_t tiles = (a.Tq + kTileRows - 1) / kTileRows, blocks = tiles * a.B * a.Hq;
  if (blocks > kMostBlocks || a.Tk > kMostBlocks) return kNotSupported;
  // where there are no keys nothing is loaded, but a map must be of something
  const bool keys = a.Tk > 0;
  const HeadStrides nothing{};
  if (const int error = map_heads(p.q, a.dtype, a.q, {a.B, a.Hq, a.Tq, D}, a.q_strides, kTileRows)) return error;
  const Heads kv{a.B, a.Hkv, keys ? a.Tk : 1, D};
  const Heads one{1, 1, 1, D};
  if (const int error =
          map_heads(p.k, a.dtype, keys ? a.k : a.q, keys ? kv : one, keys ? a.k_strides : nothing, kTileRows))
    return error;
  if (const int error =
          map_heads(p.v, a.dtype, keys ? a.v : a.q, keys ? kv : one, keys ? a.v_strides : nothing, kTileRows))
    return error;
  p.out = static_cast<T*>(a.out), p.lse = a.lse;
  p.out_b = a.out_strides.b, p.out_h = a.out_strides.h, p.out_t = a.out_strides.t;
  p.Tq = int(a.Tq), p.Tk = int(a.Tk), p.group = int(a.Hq / a.Hkv);
  p.order = order_of(tiles, a.Hq, a.B, p.group, a.Tk * D * 4, Causal);
  p.scale_log2 = a.scale * kLog2E;
  return dev::launch(&attention_forward<D, Causal, T>, {blocks, 1, 1, int64_t(sizeof(ForwardTiles<D>))},
                     kAttentionThreads, stream, p);
}

}  // namespace

int attention_forward_cuda(const AttentionForwardCuda& a, void* stream) {
  if (dev::capability() != 90 || !(a.scale > 0.0f)) return kNotSupported;
  if (!a.B || !a.Hq || !a.Tq) return 0;
  return with_attention_instance(a.D, a.causal, a.dtype,
                                 [&]<int D, bool Causal, class T>() { return forward<D, Causal, T>(a, stream); });
}

}  // namespace seqfuse
