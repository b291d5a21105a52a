// Launches of attention_forward.cuh and attention_backward.cuh: tensor maps, the order of blocks, the choice of an
// instance. Contract: seqfuse/attention_cuda.h
#include "cuda/attention_backward.cuh"
#include "cuda/attention_forward.cuh"
#include "seqfuse/attention_cuda.h"

namespace seqfuse {
namespace {

using namespace cuda;

// cudaErrorNotSupported, where no CUDA header may be included
constexpr int kNotSupported = 801;
constexpr int64_t kMostBlocks = 0x7fffffff;
constexpr int64_t kSectionBytes = 16 << 20;  // K and V of the heads worked on together, of 50 MB of L2: not yet tuned

struct Heads {
  int64_t B, H, T, D;
};

// TMA's view of a tensor in boxes of `rows` rows. The stride of a dimension of size 1 says nothing: torch lets it be
// anything, TMA does not.
int map_heads(dev::TensorMap& map, DType dtype, const void* data, const Heads& size, const HeadStrides& s, int rows) {
  auto stride = [&](int64_t n, int64_t stride) { return n == 1 ? size.D : stride; };
  for (const int64_t step : {stride(size.T, s.t), stride(size.H, s.h), stride(size.B, s.b)})
    if (step <= 0 || step % 8) return kNotSupported;
  if (!dev::aligned_16(data)) return kNotSupported;
  const dev::Tiled tiled{dtype,
                         data,
                         {size.D, size.T, size.H, size.B},
                         {stride(size.T, s.t), stride(size.H, s.h), stride(size.B, s.b)},
                         rows};
  return dev::make_tensor_map(map, tiled);
}

// `head_bytes` of K and V a key head
Order order_of(int64_t tiles, int64_t heads, int64_t batches, int64_t group, int64_t head_bytes, bool causal) {
  int64_t section = head_bytes > 0 ? kSectionBytes / head_bytes : heads * batches;
  section = (section > 0 ? section : 1) * group;
  if (section > heads * batches) section = heads * batches;
  return {int(tiles), int(heads), int(batches), int(section), causal};
}

// f<D, Causal, T>()
template <class F>
int with_attention_instance(int64_t D, bool causal, DType dtype, F f) {
  auto with_type = [&]<int D_, bool Causal>() {
    if (dtype == DType::bf16) return f.template operator()<D_, Causal, dev::bf16>();
    if (dtype == DType::f16) return f.template operator()<D_, Causal, dev::f16>();
    return kNotSupported;
  };
  auto with_mask = [&]<int D_>() {
    return causal ? with_type.template operator()<D_, true>() : with_type.template operator()<D_, false>();
  };
  if (D == 64) return with_mask.template operator()<64>();
  if (D == 128) return with_mask.template operator()<128>();
  return kNotSupported;
}

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

namespace {

int64_t padded(int64_t Tq) {
  return (Tq + kTileRows - 1) / kTileRows * kTileRows;
}

template <int D, class T>
int launch_delta(const AttentionBackwardCuda& a, const BackwardArguments<T>& p, void* stream) {
  DeltaArguments<T> d{};
  d.out = static_cast<const T*>(a.out), d.dout = static_cast<const T*>(a.dout);
  d.out_b = a.out_strides.b, d.out_h = a.out_strides.h, d.out_t = a.out_strides.t;
  d.dout_b = a.dout_strides.b, d.dout_h = a.dout_strides.h, d.dout_t = a.dout_strides.t;
  d.lse_in = a.lse, d.dlse = a.dlse;
  d.lse = const_cast<float*>(p.lse), d.delta = const_cast<float*>(p.delta);
  d.rows = a.B * a.Hq * p.padded, d.Hq = int(a.Hq), d.Tq = int(a.Tq), d.padded = p.padded;
  const int64_t rows_a_block = kDeltaThreads / (D / 8);
  return dev::launch(&attention_delta<D, T>, {(d.rows + rows_a_block - 1) / rows_a_block}, kDeltaThreads, stream, d);
}

template <int D, bool Causal, class T>
int backward(const AttentionBackwardCuda& a, void* stream) {
  BackwardArguments<T> p{};
  const int64_t row_tiles = padded(a.Tq) / kTileRows, key_tiles = padded(a.Tk) / kTileRows;
  if (padded(a.Tq) * a.B * a.Hq > kMostBlocks || padded(a.Tk) * a.B * a.Hkv > kMostBlocks) return kNotSupported;
  const bool rows = a.Tq > 0, keys = a.Tk > 0;
  // where one side is empty nothing is loaded, but a map must be of something
  auto map = [&](dev::TensorMap& to, const void* data, int64_t H, int64_t T_, const HeadStrides& strides) {
    if (T_) return map_heads(to, a.dtype, data, {a.B, H, T_, D}, strides, kStreamRows);
    return map_heads(to, a.dtype, rows ? a.q : a.k, {1, 1, 1, D}, {}, kStreamRows);
  };
  if (const int error = map(p.q, a.q, a.Hq, a.Tq, a.q_strides)) return error;
  if (const int error = map(p.dout, a.dout, a.Hq, a.Tq, a.dout_strides)) return error;
  if (const int error = map(p.k, a.k, a.Hkv, a.Tk, a.k_strides)) return error;
  if (const int error = map(p.v, a.v, a.Hkv, a.Tk, a.v_strides)) return error;
  p.dq = static_cast<T*>(a.dq), p.dk = static_cast<T*>(a.dk), p.dv = static_cast<T*>(a.dv);
  p.dq_b = a.dq_strides.b, p.dq_h = a.dq_strides.h, p.dq_t = a.dq_strides.t;
  p.dk_b = a.dk_strides.b, p.dk_h = a.dk_strides.h, p.dk_t = a.dk_strides.t;
  p.dv_b = a.dv_strides.b, p.dv_h = a.dv_strides.h, p.dv_t = a.dv_strides.t;
  p.Tq = int(a.Tq), p.Tk = int(a.Tk), p.padded = int(padded(a.Tq));
  p.heads = int(a.Hq), p.group = int(a.Hq / a.Hkv);
  p.lse = a.workspace, p.delta = a.workspace + a.B * a.Hq * padded(a.Tq);
  p.scale = a.scale, p.scale_log2 = a.scale * kLog2E;
  constexpr int64_t kShared = sizeof(BackwardTiles<D>);
  if (rows)
    if (const int error = launch_delta<D>(a, p, stream)) return error;
  if (keys) {  // the first tile of keys is seen by most rows, so the longest stand first already
    p.order = order_of(key_tiles, a.Hkv, a.B, 1, a.Tq * D * 4 * p.group, false);
    const dev::Grid grid{key_tiles * a.B * a.Hkv, 1, 1, kShared};
    if (const int error = dev::launch(&attention_backward<D, Causal, true, T>, grid, kAttentionThreads, stream, p))
      return error;
  }
  if (!rows) return 0;
  p.order = order_of(row_tiles, a.Hq, a.B, p.group, a.Tk * D * 4, Causal);
  const dev::Grid grid{row_tiles * a.B * a.Hq, 1, 1, kShared};
  return dev::launch(&attention_backward<D, Causal, false, T>, grid, kAttentionThreads, stream, p);
}

}  // namespace

int64_t attention_backward_workspace_cuda(int64_t B, int64_t Hq, int64_t Tq) {
  return 2 * B * Hq * padded(Tq);
}

int attention_backward_cuda(const AttentionBackwardCuda& a, void* stream) {
  if (dev::capability() != 90 || !(a.scale > 0.0f)) return kNotSupported;
  for (const HeadStrides& s : {a.out_strides, a.dout_strides})  // those of one row, head or batch say nothing
    if ((a.Tq > 1 && s.t % 8) || (a.Hq > 1 && s.h % 8) || (a.B > 1 && s.b % 8)) return kNotSupported;
  if (!a.B || !a.Hq || (!a.Tq && !a.Tk)) return 0;
  return with_attention_instance(a.D, a.causal, a.dtype,
                                 [&]<int D, bool Causal, class T>() { return backward<D, Causal, T>(a, stream); });
}

}  // namespace seqfuse
